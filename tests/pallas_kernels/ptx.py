"""Carries out the few PTX instructions that sparse entries are added with, on NumPy, for the 32 lanes of one warp.

Registers are int64 [32] holding unsigned values, predicates bool [32]. Shared memory begins at generic address SHARED.
A branch that says so has to be the same for all lanes, a load to be aligned and inside: both are asserted. Lanes that
take another branch, forward, rest until its label. PTX ISA, chapter 9.7.
"""

import re
from typing import Any

import ml_dtypes
import numpy as np

SHARED, GLOBAL = 1 << 40, 1 << 41
_FLOATS: dict[str, Any] = {"bf16x2": ml_dtypes.bfloat16, "f16x2": np.float16}


class Warp:
    """32 lanes over shared memory (bytes from address 0) and global memory (bytes from GLOBAL)."""

    def __init__(self, shared: np.ndarray, memory: np.ndarray) -> None:
        self.shared, self.memory = shared.view(np.uint8), memory.view(np.uint8)
        self.registers: dict[str, np.ndarray] = {}
        self.counts: dict[str, int] = {}

    def run(self, text: str) -> None:
        lines = [line for line in re.split(r"[;\n]\s*|(?<=:)\s+", text.strip().strip("{}")) if line]
        lines = [line.strip() for line in lines if line.strip() and not line.strip().startswith((".reg", "}"))]
        labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
        place, resting, until = 0, np.zeros(32, bool), ""
        while place < len(lines):
            line, place = lines[place], place + 1
            if line.endswith(":"):
                resting = resting & (line[:-1] != until)
                continue
            active = ~resting
            if line.startswith("@"):
                name, line = line[1:].split(maxsplit=1)
                active = active & self.registers[name].astype(bool)
            name, _, rest = line.partition(" ")
            self.counts[name] = self.counts.get(name, 0) + 1
            operands = [operand.strip(" {}") for operand in rest.split(",")]
            if name == "bra.uni":
                assert not resting.any() and (active.all() or not active.any()), line
                place = labels[operands[0]] if active.all() else place
                continue
            if name == "bra":
                assert not resting.any() and labels[operands[0]] >= place, line
                resting, until = active, operands[0]
                continue
            loads = name.startswith("ld.")
            results = self._load(name, operands[-1], active) if loads else [self._result(name, operands[1:])]
            for register, result in zip(operands, results, strict=False):
                result = np.broadcast_to(result, 32)
                old = self.registers.get(register, np.zeros(32, result.dtype))
                self.registers[register] = np.where(active, result, old)

    def _value(self, operand: str) -> np.ndarray:
        return np.full(32, int(operand, 0)) if operand[0] in "-0123456789" else self.registers[operand].astype(np.int64)

    def _result(self, name: str, operands: list[str]) -> Any:
        kind, *rest = name.split(".")
        values = [self._value(operand) for operand in operands]
        word = 2**32 - 1
        if kind == "mov" or name in ("cvt.u64.u32", "cvt.u32.u16"):
            return values[0]
        if name == "cvt.u16.u32":
            return values[0] & 0xFFFF
        if name == "cvt.f32.f16":
            return values[0].astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
        if name in ("cvt.rn.bf16.f32", "cvt.rn.f16.f32"):
            kind = _FLOATS[f"{rest[1]}x2"]
            return values[0].astype(np.uint32).view(np.float32).astype(kind).view(np.uint16).astype(np.int64)
        if name == "add.rn.f32":
            a, b = (value.astype(np.uint32).view(np.float32) for value in values)
            return (a + b).view(np.uint32).astype(np.int64)
        if name == "shl.b32":
            return values[0] << values[1] & word
        if name == "shf.l.wrap.b32":
            return (values[1] << 32 | values[0]) << (values[2] & 31) >> 32 & word
        if name == "shr.u32":
            return values[0] >> values[1]
        if name == "fma.rn.f32":
            a, b, c = (value.astype(np.uint32).view(np.float32).astype(np.float64) for value in values)
            return (a * b + c).astype(np.float32).view(np.uint32)
        if name == "cvta.shared.u64":
            return values[0] + SHARED
        if name in ("and.b32", "and.pred"):
            return values[0] & values[1]
        if name == "popc.b32":
            return np.array([int(value).bit_count() for value in values[0]])
        if name in ("add.u32", "sub.u32"):
            return (values[0] + (values[1] if kind == "add" else -values[1])) & word
        if name == "add.s64":
            return values[0] + values[1]
        if name == "selp.b32":
            return np.where(values[2] != 0, values[0], values[1])
        if name == "mul.lo.u32":
            return values[0] * values[1] & word
        if name in ("mad.lo.u32", "mad.lo.s32"):
            return (values[0] * values[1] + values[2]) & word
        if name == "mad.wide.u32":
            return values[0] * values[1] + values[2]
        if kind == "setp":
            compare = {"ne": np.not_equal, "eq": np.equal, "lt": np.less, "le": np.less_equal, "ge": np.greater_equal}[
                rest[0]
            ]
            if rest[-1] == "s32":
                values[:2] = [value.astype(np.uint32).view(np.int32) for value in values[:2]]
            found = compare(values[0], values[1])
            return found & (values[2] != 0) if rest[1] == "and" else found
        if kind == "prmt":
            pair, selector = values[0] | values[1] << 32, values[2]
            assert not np.any(selector & 0x8888)
            return sum((pair >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i for i in range(4))
        halves = [value.astype(np.uint32).view(_FLOATS[rest[-1]]) for value in values]
        assert name.startswith("add.rn."), name
        found = (halves[0].astype(np.float64) + halves[1].astype(np.float64)).astype(_FLOATS[rest[-1]])
        return np.ascontiguousarray(found).view(np.uint32).astype(np.int64)

    def _load(self, name: str, place: str, active: np.ndarray) -> list[np.ndarray]:
        """The registers that a load of one or two writes."""
        base, _, offset = place.strip("[]").partition("+")
        address = self._value(base.strip()) + int(offset or 0)
        if ".shared" in name:
            address = address + SHARED
        size, count = {"u8": 1, "u16": 2, "b32": 4}[name.rpartition(".")[2]], 2 if ".v2" in name else 1
        found = np.zeros((count, 32), np.int64)
        for lane in np.flatnonzero(active):
            memory, start = (self.memory, GLOBAL) if address[lane] >= GLOBAL else (self.shared, SHARED)
            first, end = int(address[lane]) - start, int(address[lane]) - start + count * size
            assert first % (count * size) == 0 and 0 <= first and end <= memory.size, (name, place, lane)
            found[:, lane] = memory[first:end].reshape(count, size).astype(np.int64) @ (1 << 8 * np.arange(size))
        return list(found)


class Cta(Warp):
    """All threads of a CTA, of which always those furthest behind in the text go on: they meet again where they can.

    memory: arrays by name; their addresses are in `registers`, among which the caller puts the rest. Shared memory
    begins as garbage. A barrier needs all threads that it is for, a shuffle all lanes of a warp: both are asserted.
    """

    def __init__(self, threads: int, shared: int, memory: dict[str, np.ndarray]) -> None:
        super().__init__(np.full(shared, 0xAA, np.uint8), np.zeros(0, np.uint8))
        self.threads, self.arrays = threads, [array.reshape(-1).view(np.uint8) for array in memory.values()]
        for i, name in enumerate(memory):
            self.registers[name] = np.full(threads, GLOBAL + (i << 36))

    def run(self, text: str) -> None:
        lines = [line.strip() for line in re.split(r";\s*|(?<=:)\s+", text.strip().strip("{}"))]
        lines = [line for line in lines if line and not line.startswith((".reg", ".pragma"))]
        labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
        places = np.zeros(self.threads, np.int64)
        while (place := int(places.min())) < len(lines):
            line, now = lines[place], places == place
            places[now] += 1
            if line.endswith(":") or line == "cp.async.wait_all":
                continue
            active = now
            if line.startswith("@"):
                name, line = line[1:].split(maxsplit=1)
                active = now & self.registers[name].astype(bool)
            name, _, rest = line.partition(" ")
            self.counts[name] = self.counts.get(name, 0) + int(active.any())
            operands = re.findall(r"\[[^]]*\]|[\w.-]+", rest)
            if name.startswith("bra"):
                places[active] = labels[operands[0]]
                assert name == "bra" or active.all() or not active.any() or np.all(self._warps(active) % 32 == 0), line
            elif name == "bar.sync":
                for barrier in np.unique(self._value(operands[0])[active]):
                    there = active & (self._value(operands[0]) == barrier)
                    assert there.sum() == (int(operands[1]) if len(operands) > 1 else self.threads), line
            elif name == "bar.red.and.pred":
                assert active.all(), line
                self.registers[operands[0]] = np.full(self.threads, self.registers[operands[2]].all())
            elif name.startswith("cp.async.ca"):
                kind, registers = f"v{int(operands[2]) // 4}.b32", [f"copied{i}" for i in range(int(operands[2]) // 4)]
                self._write(f"ld.global.{kind}", [*registers, operands[1]], active)
                self._store(f"st.shared.{kind}", [operands[0], *registers], active)
            elif name.startswith("st."):
                self._store(name, operands, active)
            else:
                self._write(name, operands, active)

    def _warps(self, active: np.ndarray) -> np.ndarray:
        return active.reshape(-1, 32).sum(axis=1)

    def _write(self, name: str, operands: list[str], active: np.ndarray) -> None:
        if name.startswith("shfl.sync.bfly"):
            assert np.all(self._warps(active) % 32 == 0), name
            results = [self.registers[operands[1]][np.arange(self.threads) ^ int(operands[2])]]
        elif name.startswith("ld."):
            results = self._load(name, operands[-1], active)
        else:
            results = [self._result(name, operands[1:])]
        for register, result in zip(operands, results, strict=False):
            result = np.broadcast_to(result, self.threads)
            self.registers[register] = np.where(active, result, self.registers.get(register, np.zeros_like(result)))

    def _value(self, operand: str) -> np.ndarray:
        if operand[0] in "-0123456789":
            return np.full(self.threads, int(operand, 0))
        return self.registers[operand].astype(np.int64)

    def _places(self, name: str, operand: str, active: np.ndarray) -> tuple[list[tuple[int, np.ndarray, int]], int]:
        """(thread, array, first byte) of every active thread, and how many bytes a register has."""
        base, _, offset = operand.strip("[]").partition("+")
        address, size = (
            self._value(base.strip()) + int(offset or 0),
            {"u16": 2, "b16": 2, "b32": 4}[name.rpartition(".")[2]],
        )
        whole, found = size * self._count(name), []
        for thread in np.flatnonzero(active):
            where = int(address[thread])
            array = self.shared if ".shared" in name else self.arrays[(where - GLOBAL) >> 36]
            first = where if ".shared" in name else (where - GLOBAL) & (1 << 36) - 1
            assert first % whole == 0 and 0 <= first and first + whole <= array.size, (name, operand, thread)
            found.append((thread, array, first))
        return found, size

    @staticmethod
    def _count(name: str) -> int:
        return int(found[1]) if (found := re.search(r"\.v(\d)", name)) else 1

    def _load(self, name: str, place: str, active: np.ndarray) -> list[np.ndarray]:
        found, (places, size) = np.zeros((self._count(name), self.threads), np.int64), self._places(name, place, active)
        for thread, array, first in places:
            found[:, thread] = array[first : first + size * len(found)].view(f"u{size}")
        return list(found)

    def _store(self, name: str, operands: list[str], active: np.ndarray) -> None:
        places, size = self._places(name, operands[0], active)
        values = np.stack([self.registers[register] for register in operands[1:]]).astype(f"u{size}")
        for thread, array, first in places:
            array[first : first + size * len(values)] = np.ascontiguousarray(values[:, thread]).view(np.uint8)
