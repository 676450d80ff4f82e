"""Entries by tile hold what they were made from: the instructions that add them, carried out by NumPy, add each once.

The instructions are the very text that the kernel assembles; `tests.pallas_kernels.ptx` says what each means.
"""

import functools
import string
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_matmul import EntryTiles, prepare_tiles
from pallas_kernels.sparse_matmul.adder import add_text, fetch_text, multiply_text
from pallas_kernels.sparse_matmul.tiles import BLOCK, HEADER, TILE
from tests.pallas_kernels.ptx import GLOBAL, Warp

LANE = np.arange(32)


def _entries(name: str) -> tuple[np.ndarray, int]:
    """A matrix of float64 with zeros where it has no entry, N and K no multiples of anything; and its seed."""
    rng = np.random.default_rng(len(name))
    shape = (70, 330)
    share = {"even": 0.0045, "many": 0.03, "none": 0.0, "one row": 0.002, "one tile": 0.002, "one column": 0.002}[name]
    there = rng.random(shape) < share
    if name == "one row":
        there[41] = True
    if name == "one tile":
        there[:64, 64:128] = True
    if name == "one column":
        there[:, 300] = True
    return np.where(there, rng.normal(size=shape), 0.0), len(name)


def _compressed(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    row, column = np.nonzero(dense)
    pointer = np.searchsorted(row, np.arange(dense.shape[0] + 1))
    return dense[row, column].astype(np.float32), column.astype(np.uint16), pointer.astype(np.int32)


class _Threads:
    """The warps that hold a tile of 64 rows, as the kernel sets them up; `counts`: instructions of the longest way."""

    def __init__(self, tiles: EntryTiles, behind: np.ndarray | None = None) -> None:
        """behind: 16-bit words that lie in shared memory behind the slots of 64 rows."""
        self.slots, self.overflow = np.asarray(tiles.slots), np.asarray(tiles.overflow)
        self.operand = {"bfloat16": "bf16", "float16": "f16"}[tiles.dtype]
        self.tiles, self.words = 2 * self.slots.shape[1], self.slots.shape[2]
        self.behind = np.zeros(0, np.uint8) if behind is None else behind.view(np.uint8)
        self.place_behind = 4 * self.words * self.slots.shape[1]
        self.counts: dict[str, int] = {}

    def run(self, i: int, tile: int, w: int, registers: dict[str, np.ndarray], text: Any) -> dict[str, np.ndarray]:
        """The registers of warp w after it fetched its entries of a tile and ran text(offset, half)."""
        block, half = divmod(tile, 2)
        slots = np.ascontiguousarray(self.slots[i]).reshape(-1).view(np.uint8)
        warp = Warp(np.concatenate([slots, self.behind]), self.overflow)
        warp.registers = registers | {
            "lists": np.full(32, 8 * w),
            "bit": 1 << LANE,
            "below": (1 << LANE) - 1,
            "overflow": np.full(32, GLOBAL),
            "x": np.full(32, self.place_behind),
        }
        # both texts have names of their own beside those of their operands
        names = {name: f"given_{name}" for name in ("entry", "second")} | {name: name for name in warp.registers}
        for each in (fetch_text, text):
            warp.run(string.Template(each(4 * self.words * block, half)).substitute(names))
        for name, count in warp.counts.items():
            self.counts[name] = max(self.counts.get(name, 0), count)
        return warp.registers


def _added(tiles: EntryTiles, base: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """base [64 * blocks, 128 * blocks] plus the entries, as the threads of the kernel add them, and the counts."""
    kind = jnp.dtype(tiles.dtype)
    threads, result = _Threads(tiles), base.astype(kind)
    for i, tile, w in np.ndindex(tiles.slots.shape[0], threads.tiles, 4):
        places, registers = [], {}
        for step, register in np.ndindex(4, 4):
            row = TILE * i + 16 * w + LANE // 4 + 8 * (register % 2)
            column = TILE * tile + 16 * step + 2 * (LANE % 4) + 8 * (register // 2)
            places.append((row[:, None], column[:, None] + np.arange(2)))
            halves = np.ascontiguousarray(result[places[-1]]).view(np.uint16).astype(np.int64)
            registers[f"a{4 * step + register}"] = halves[:, 0] | halves[:, 1] << 16
        registers = threads.run(i, tile, w, registers, functools.partial(add_text, operand=threads.operand))
        for j, place in enumerate(places):
            both = np.stack([registers[f"a{j}"] & 0xFFFF, registers[f"a{j}"] >> 16], axis=1)
            result[place] = both.astype(np.uint16).view(kind)
    return result.astype(np.float64), threads.counts


def _multiplied(tiles: EntryTiles, x: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """The entries times one token x [128 * blocks], as the threads of the kernel sum them, and the counts."""
    threads = _Threads(tiles, x.astype(jnp.dtype(tiles.dtype)).view(np.uint16))
    y = np.zeros(tiles.slots.shape[0] * TILE)
    for i, w in np.ndindex(tiles.slots.shape[0], 4):
        registers = {name: np.zeros(32, np.int64) for name in ("sum0", "sum1")}
        for tile in range(threads.tiles):
            text = functools.partial(multiply_text, operand=threads.operand, first_input=128 * tile)
            registers = threads.run(i, tile, w, registers, text)
        for h in range(2):
            row = TILE * i + 16 * w + LANE // 4 + 8 * h
            np.add.at(y, row, registers[f"sum{h}"].astype(np.uint32).view(np.float32))
    return y, threads.counts


@pytest.mark.parametrize("name", ["even", "many", "none", "one row", "one tile", "one column"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_entry_is_added_once_and_nothing_else(name: str, dtype: str) -> None:
    dense, seed = _entries(name)
    tiles = prepare_tiles(*_compressed(dense), dense.shape[1], dtype)
    blocks, words = tiles.slots.shape[:2], tiles.slots.shape[2]
    assert blocks == (2, 3) and words % 32 == 0 and words <= 256
    base = np.random.default_rng(seed).normal(size=(blocks[0] * TILE, blocks[1] * BLOCK))
    base = base.astype(np.float32).astype(jnp.dtype(dtype)).astype(np.float64)
    full = np.zeros(base.shape)
    full[: dense.shape[0], : dense.shape[1]] = dense.astype(np.float32).astype(jnp.dtype(dtype))
    found, counts = _added(tiles, base)
    # the value rounded once, then the sum
    np.testing.assert_array_equal(found, (base + full).astype(np.float32).astype(jnp.dtype(dtype)).astype(np.float64))
    # rounds: all 32 weights of a lane in a full tile, its 16 in the row of a full row
    rounds = {"none": 1, "one row": 16, "one tile": 32, "one column": 2}
    operand = "bf16" if dtype == "bfloat16" else "f16"
    if name in rounds:
        # one more where another entry meets a full row; for a list elsewhere, two before the loop that add nothing, and
        # two in it, because lanes past the sixteenth wait for the third
        assert counts[f"add.rn.{operand}x2"] // 16 - rounds[name] in ((4,) if name == "one tile" else (0, 1))
    # a full tile, 1024 entries a list, lies elsewhere
    assert name != "one tile" or tiles.overflow.size > 4 * 1024


@pytest.mark.parametrize("name", ["many", "one row", "one tile"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_entry_is_multiplied_once_by_its_input(name: str, dtype: str) -> None:
    dense, seed = _entries(name)
    tiles = prepare_tiles(*_compressed(dense), dense.shape[1], dtype)
    x = np.zeros(tiles.slots.shape[1] * BLOCK, np.float32)
    x[: dense.shape[1]] = np.random.default_rng(seed).normal(size=dense.shape[1])
    y, _ = _multiplied(tiles, x)
    exact = [array.astype(np.float32).astype(jnp.dtype(dtype)).astype(np.float64) for array in (dense, x)]
    expected = exact[0] @ exact[1][: dense.shape[1]]
    # at most 330 float32 products of order one
    np.testing.assert_allclose(y[: dense.shape[0]], expected, atol=3e-5)
    np.testing.assert_array_equal(y[dense.shape[0] :], 0)


def test_a_list_takes_few_instructions() -> None:
    dense, _ = _entries("none")
    tiles = prepare_tiles(*_compressed(dense), dense.shape[1], "bfloat16")
    for counts, most in ((_added(tiles, np.zeros((128, 384)))[1], 42), (_multiplied(tiles, np.zeros(384))[1], 29)):
        # moves of numbers are parts of the instruction that follows; seven tests of bits that lead around an addition
        # are one instruction, and there are two more such tests in a byte of their own
        tests = counts.get("bra", 0)
        assert tests in (0, 16)
        others = sum(count for name, count in counts.items() if not name.startswith("mov")) - 3 * tests
        assert others + tests // 4 == most


def test_few_lists_have_more_than_two_rounds() -> None:
    there = np.random.default_rng(0).random((1024, 2048)) < 0.0045
    tiles = prepare_tiles(*_compressed(there.astype(np.float64)), 2048, "bfloat16")
    follows = np.asarray(tiles.slots[:, :, 1:HEADER:2]) >> 8 & 0xFF
    # 1024 weights, 32 a lane: a lane has two entries or more with probability 0.0092, three with 0.0004
    assert abs(np.mean(follows > 0) - 0.26) < 0.03
    assert np.mean(follows > 1) < 0.025


def test_slots_are_few_for_few_entries() -> None:
    rng = np.random.default_rng(0)
    for share, words in ((0.0, 32), (0.0005, 32), (0.0045, 64), (0.01, 128)):
        dense = np.where(rng.random((1024, 2048)) < share, 1.0, 0.0)
        tiles = prepare_tiles(*_compressed(dense), 2048, "bfloat16")
        assert tiles.slots.shape == (16, 16, words), share
        used = np.asarray(tiles.slots[:, :, HEADER:])
        assert np.count_nonzero(used) + np.count_nonzero(tiles.overflow) >= np.count_nonzero(dense)
        assert tiles.overflow.size <= 0.1 * tiles.slots.size


def test_what_cannot_be_added_to_16_bit_weights_is_said() -> None:
    one = np.ones(1, np.float32), np.zeros(1, np.uint16), np.array([0, 1])
    with pytest.raises(ValueError, match="float32; expected bfloat16 or float16"):
        prepare_tiles(*one, 64, jnp.float32)
    with pytest.raises(ValueError, match="do not fit float16"):
        prepare_tiles(1e6 * one[0], *one[1:], 64, jnp.float16)
