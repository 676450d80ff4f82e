"""Numbers and speed of the matrix kernels in many configurations: `python -m bench.kernel_probe --out OUT.json`.

Every row is a shape, a kind of product and a configuration: the relative error against float32, the device time by
CUPTI (median, weights rotated past the L2) and its ratio to XLA's dense bfloat16 product of the same shape in the same
process. A kernel that hangs or faults takes its process with it, so a second process does the work: the first one
starts it again behind the row that failed. `--dry` does everything but running kernels.

`--more` and `--tables` are other kinds of weights. Of tables of int8 entries, bfloat16 rows contain the launch that
makes their tokens float16, and float16 rows show the product of float16 alone. The only token of 16 bits beside tables
is made three of int8 by their kernel, that of other rows comes as int8.
"""

import argparse
import dataclasses
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench.device_time import alone, device_time, warm_up
from bench.kernel_rows import MAIN, MORE, SHAPES, TABLES, TOKENS, Row, chosen, in_pieces, rows
from pallas_kernels import affine_matmul as affine, codebook_matmul as codebook
from pallas_kernels.fragments import fragments_shape, slot_order, unpack_fragments
from pallas_kernels.half_tokens import half_rows

PATIENCE = 45.0  # seconds for one row, its compilation and its reference included, for each process of a device


class Bench:
    """Arrays and references of the shape that is being measured; rows come ordered by shape."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.cache: dict[Any, Any] = {}

    def once(self, key: Any, make: Any) -> Any:
        """What belongs to another shape or kind is forgotten: dense float32 weights take a gigabyte."""
        scope = key[1]
        for old in [old for old in self.cache if old[0] == key[0] and old[1] != scope]:
            del self.cache[old]
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def weights(self, row: Row) -> list[dict[str, jax.Array]]:
        """As many copies as exceed the L2 cache (50 MB) twice."""
        kind = row.kind
        size = row.n * row.k * kind.bits // 8
        copies = 1 if self.dry else max(2, min(16, -(-110_000_000 // size)))
        groups = 1 if kind.group_size is None else row.k // kind.group_size
        made = []
        for copy in range(copies):
            keys = jax.random.split(jax.random.key(copy), 3)
            shape = (row.n,) if kind.entry is not None else (groups, row.n)
            arrays = {
                "words": jax.random.bits(keys[0], fragments_shape((row.n, row.k), kind.bits), jnp.uint32),
                "scales": jax.random.uniform(keys[1], shape, jnp.bfloat16, 0.01, 0.02),
            }
            if kind.entry is not None:
                entries = jax.random.randint(keys[2], (row.n, 2**kind.bits), -127, 128)
                arrays["codebook"] = entries.astype(jnp.dtype(kind.entry))
                arrays["tables"] = codebook.prepare_tables(arrays["codebook"], kind.entry)
                if kind.entry != "int8":
                    fixed, units = codebook.fixed_point_tables(arrays["codebook"])
                    arrays["byte_tables"] = codebook.prepare_tables(fixed, jnp.uint16)
                    arrays["byte_scales"] = units * arrays["scales"].astype(jnp.float32)
            if kind.two_level:
                arrays["scales"] = jax.random.randint(keys[1], shape, 1, 17).astype(jnp.uint8)
                arrays["steps"] = jax.random.uniform(keys[2], (row.n,), jnp.float32, 0.001, 0.002)
            if kind.zeros:
                arrays["zeros"] = jax.random.randint(keys[2], (groups, row.n), 0, 2**kind.bits).astype(jnp.uint8)
            made.append(arrays)
        return made

    def inputs(self, row: Row) -> tuple[dict[str, jax.Array], jax.Array]:
        """What the kernel takes besides weights, and x in float32."""
        key = jax.random.key(99)
        if row.kind.x != "int8":
            x = jax.random.normal(key, (row.m, row.k), jnp.float32).astype(jnp.dtype(row.kind.x))
            return {"x": x}, x.astype(jnp.float32)
        codes = jax.random.randint(key, (row.m, row.k), -127, 128)
        scales = jax.random.uniform(key, (row.m,), jnp.float32, 0.005, 0.01)
        slots = codes[:, slot_order(row.k)].astype(jnp.int8)
        return {"x": slots, "x_scales": scales}, codes.astype(jnp.float32) * scales[:, None]

    def dense_weight(self, row: Row, arrays: dict[str, jax.Array]) -> jax.Array:
        kind = row.kind

        @jax.jit
        def dense(arrays: dict[str, jax.Array]) -> jax.Array:
            if kind.entry is not None:
                codes = unpack_fragments(arrays["words"], kind.bits, "rows", (row.n, row.k)).astype(jnp.int32)
                entries = jnp.take_along_axis(arrays["codebook"].astype(jnp.float32), codes, axis=1)
                return entries * arrays["scales"].astype(jnp.float32)[:, None]
            codes = unpack_fragments(arrays["words"], kind.bits, "pairs", (row.n, row.k)).astype(jnp.float32)
            size = kind.group_size or row.k
            zeros = arrays["zeros"].astype(jnp.float32) if kind.zeros else jnp.float32(2 ** (kind.bits - 1))
            grid = codes.reshape(row.n, -1, size) - (zeros.T[:, :, None] if kind.zeros else zeros)
            found = (grid * arrays["scales"].astype(jnp.float32).T[:, :, None]).reshape(row.n, row.k)
            return found * arrays["steps"][:, None] if kind.two_level else found

        return dense(arrays)

    def reference(self, row: Row, x: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
        weight = self.once(("weight", (row.n, row.k, row.kind)), lambda: self.dense_weight(row, arrays))
        return jnp.dot(x, weight.T, precision="highest")

    def dense_time(self, row: Row) -> float:
        def make() -> float:
            copies = max(2, min(8, -(-220_000_000 // (row.n * row.k))))
            weights = [jax.random.normal(jax.random.key(i), (row.n, row.k), jnp.bfloat16) for i in range(copies)]
            x = jax.random.normal(jax.random.key(1), (row.m, row.k), jnp.bfloat16)
            product = jax.jit(lambda x, w: x @ w.T)
            warm_up(product, x, weights)
            return device_time(product, x, weights)

        return 1.0 if self.dry else self.once((("dense", row.m), (row.n, row.k)), make)

    def run(self, row: Row) -> dict[str, Any]:
        kind = row.kind
        group = (row.n, row.k, kind)
        with alone():
            weights = jax.block_until_ready(self.once(("weights", group), lambda: self.weights(row)))
            inputs, x = self.once(("inputs", (group, row.m)), lambda: self.inputs(row))
        config = row.config or chosen(row)

        def product(inputs: dict[str, jax.Array], arrays: dict[str, jax.Array]) -> jax.Array:
            static: dict[str, Any] = dict(bits=kind.bits, outputs=row.n, config=config, out_dtype=jnp.bfloat16)
            if kind.entry is None:
                return affine.affine_matmul(**inputs, **arrays, **static, group_size=kind.group_size)
            if in_pieces(row) and kind.entry != "int8":
                arrays |= {"tables": arrays["byte_tables"], "scales": arrays["byte_scales"]}
            arrays = {name: arrays[name] for name in ("words", "tables", "scales")}
            if in_pieces(row):
                static["pieces"] = codebook.PIECES
            elif kind.entry == "int8" and kind.x == "bfloat16":
                half, powers = half_rows(inputs["x"])
                inputs = {"x": half, "x_scales": powers}
            return codebook.codebook_matmul(**inputs, **arrays, **static)

        result: dict[str, Any] = {"row": row.name(), "config": dataclasses.asdict(config)}
        if self.dry:
            jax.jit(product).trace(inputs, weights[0]).lower(lowering_platforms=("cuda",))
            return result | {"error": 0.0, "us": 1.0, "dense_us": 1.0, "ratio": 1.0}
        compiled = jax.jit(product).lower(inputs, weights[0]).compile()
        with alone():
            return result | self.measured(row, compiled, inputs, x, weights)

    def measured(
        self, row: Row, product: Any, inputs: dict[str, jax.Array], x: jax.Array, weights: list[Any]
    ) -> dict[str, float]:
        group = (row.n, row.k, row.kind)
        got = product(inputs, weights[0]).astype(jnp.float32)
        expected = self.once(("reference", (group, row.m)), lambda: self.reference(row, x, weights[0]))
        error = float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))
        dense = self.dense_time(row)
        warm_up(product, inputs, weights)
        taken = device_time(product, inputs, weights)
        return {"error": error, "us": taken, "dense_us": dense, "ratio": dense / taken}


def work(todo: list[Row], dry: bool) -> None:
    """The second process: a line of JSON a row. A failure other than a refusal ends it, the GPU may be in disorder."""
    bench = Bench(dry)
    for row in todo:
        try:
            result = bench.run(row)
        except ValueError as reason:
            result = {"row": row.name(), "failed": str(reason)[:300]}
        except Exception as reason:
            print(json.dumps({"row": row.name(), "failed": repr(reason)[:600], "fatal": True}), flush=True)
            os._exit(3)
        print(json.dumps(result), flush=True)


def supervise(todo: list[Row], options: argparse.Namespace) -> list[dict[str, Any]]:
    started, results = time.monotonic(), []
    patience = PATIENCE * options.share[1]

    def save() -> None:
        if options.out is not None:
            options.out.write_text(json.dumps(results, indent=1))

    while len(results) < len(todo) and time.monotonic() - started < options.seconds:
        command = [sys.executable, "-m", "bench.kernel_probe", "--worker", str(len(results)), *sys.argv[1:]]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True).start()
        while len(results) < len(todo) and time.monotonic() - started < options.seconds:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                reason = f"no answer in {patience} s"
                line = json.dumps({"row": todo[len(results)].name(), "failed": reason, "fatal": True})
            if line is None:
                reason = f"the process ended with {process.wait()}"
                results.append({"row": todo[len(results)].name(), "failed": reason})
                show(results[-1])
                break
            result = json.loads(line)
            results.append(result)
            show(result)
            save()
            if "fatal" in result:
                break
        process.kill()
        process.wait()
    save()
    return results


def _forward(stream: Any, lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        if line.startswith("{"):
            lines.put(line)
    lines.put(None)


def show(result: dict[str, Any]) -> None:
    if "failed" in result:
        print(f"{result['row']:74s} FAILED {result['failed'][:200]}", flush=True)
        return
    numbers = f"{result['us']:8.1f} us  {result['ratio']:5.2f}x of {result['dense_us']:7.1f}"
    print(f"{result['row']:74s} {numbers}  error {result['error']:.1e}", flush=True)


def part_of(text: str) -> tuple[int, int]:
    """(2, 3) from 2/3."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; expected one like 2/3")
    return int(part), int(parts)


def shape_of(text: str) -> tuple[int, int]:
    """(28672, 8192) from 28672x8192."""
    n, _, k = text.partition("x")
    if not (n.isdigit() and k.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; expected one like 28672x8192")
    return int(n), int(k)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where raw results go (default: nowhere)")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--more", action="store_true", help="other kinds of weights")
    parser.add_argument("--tables", action="store_true", help="codebooks of int8 and of 16-bit entries")
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--chosen", action="store_true", help="only the configurations that `choose` gives")
    parser.add_argument("--only", default="", help="rows whose name matches this regular expression")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--share", type=part_of, default="1/1", help="2/3: the second third, if three share a device")
    parser.add_argument("--seconds", type=float, default=110.0)
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    tokens = tuple(int(m) for m in options.tokens.split(","))
    kinds = TABLES if options.tables else MORE if options.more else MAIN
    todo = rows(kinds, tokens, options.shapes, not options.chosen)
    todo = [row for row in todo if re.search(options.only, row.name())]
    part, parts = options.share
    todo = todo[len(todo) * (part - 1) // parts : len(todo) * part // parts]
    if options.worker is not None:
        work(todo[options.worker :], options.dry)
        return
    print(f"{len(todo)} rows", flush=True)
    results = supervise(todo, options)
    failed = [result for result in results if "failed" in result or not result["error"] < 0.02]
    print(f"{len(results)} of {len(todo)} rows, {len(failed)} failed or wrong", flush=True)


if __name__ == "__main__":
    main()
