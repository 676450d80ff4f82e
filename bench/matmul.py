"""One linear layer on a GPU: `python -m bench.matmul [--shapes GLOB ...] [--ops GLOB ...] [--tokens 1,16,...]`.

Every row is `jq.linear` of a packed weight as `jq.prepare` leaves it, under jit, activations quantized inside where
the spec says so: device time by CUPTI (median, weights read in turns so that none stays in the L2 cache) beside XLA's
dense bfloat16 product of the same shape in the same process. "xla int4" and "xla w8a8" are the two plain JAX forms
that XLA fuses itself, always measured; --implementation xla shows what XLA alone makes of our weights.

    ceiling   the ratio that the roofline allows: bytes over the copy bandwidth, or operations over the peak, of this
              run, against those of bfloat16
    bandwidth percent of the copy bandwidth at which the packed weight, the tokens and the outputs pass
    error     relative Frobenius error against float32 arithmetic on the decoded weight; activations as quantized

Random weights: a layer of [N, K] is named by its model and place. Results go to bench/results and into the README.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jquant as jq
from bench import record
from bench.device_time import alone, ceilings, copies_of, device_time, warm_up
from jquant.format.activations import ActivationQuant, fake_quantize
from jquant.format.spec import QuantSpec
from jquant.format.weights import affine_weight, base_columns, codebook_weight, sparse_residual
from jquant.linear.choice import choose

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 2048)
QUICK = (1, 16, 64, 256, 2048)
HEADLINE = "70b gate"
SHAPES = {
    HEADLINE: (28672, 8192),
    "7b qkv": (12288, 4096),
    "7b o": (4096, 4096),
    "7b gate+up": (22016, 4096),
    "7b down": (4096, 11008),
    "13b qkv": (15360, 5120),
    "13b o": (5120, 5120),
    "13b gate+up": (27648, 5120),
    "13b down": (5120, 13824),
    "70b qkv": (10240, 8192),
    "70b o": (8192, 8192),
    "70b gate+up": (57344, 8192),
    "70b down": (8192, 28672),
    "llama-3-8b qkv": (6144, 4096),
    "llama-3-8b gate+up": (28672, 4096),
    "llama-3-8b down": (4096, 14336),
}

_COMPILERS = ThreadPoolExecutor(8)


class Op(NamedTuple):
    """A kind of packed layer: its spec, and the bits of its activations in the product."""

    label: str
    spec: str
    note: str = ""


OPS = (
    Op("W4A16 g128", "w4-g128-sym"),
    Op("W4A16 g128, two levels", "w4-g128-sym-twolevel"),
    Op("W4A16 g128, zeros", "w4-g128"),
    Op("W4A8 g128", "w4a8-g128-sym-actsym"),
    Op("W4A8 g128, two levels", "w4a8-g128-sym-twolevel-actsym"),
    Op("W3A16 codebook", "w3-codebook"),
    Op("W3A16 codebook + 0.45 %", "w3-codebook+s0.45%"),
    Op("W4A16 codebook", "w4-codebook"),
    Op("W4A16 g128 + 0.45 %", "w4-g128-sym+s0.45%"),
    Op("W4A16 codebook int8", "w4-codebook-int8"),
    Op("W4A8 codebook int8", "w4a8-codebook-int8-actsym"),
    Op("W3A16 codebook int8", "w3-codebook-int8"),
    Op("W8A8", "w8a8-sym-actsym"),
    Op("QUIK W4A4, 256 columns", "w4a4-sym+o256"),
    Op("W3A16 g128", "w3-g128-sym"),
    Op("W2A16 g128", "w2-g128-sym"),
    Op("W8A16", "w8-sym"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--ops", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--quick", action="store_true", help=f"{HEADLINE} and 7b o, {len(QUICK)} numbers of tokens")
    parser.add_argument("--implementation", choices=("xla", "pallas"))
    parser.add_argument("--out", type=Path, help="(default: in bench/results)")
    options = parser.parse_args()
    tokens = QUICK if options.quick else tuple(int(text) for text in options.tokens.split(","))
    wanted = [HEADLINE, "7b o"] if options.quick else options.shapes
    shapes = {name: shape for name, shape in SHAPES.items() if any(fnmatchcase(name, each) for each in wanted)}
    ops = [op for op in OPS if any(fnmatchcase(op.label, each) for each in options.ops)]
    if not shapes or not ops:
        parser.error(f"nothing matches; shapes: {', '.join(SHAPES)}; ops: {', '.join(op.label for op in OPS)}")

    with alone():
        result: dict[str, Any] = {"environment": record.environment(), "ceilings": ceilings(), "rows": []}
    print("  ".join(f"{name} {value:.3g}" for name, value in result["ceilings"].items()), flush=True)
    for name, (n, k) in shapes.items():
        dense = dense_times(n, k, tokens)
        for op, run in [(op, functools.partial(packed_rows, op, options.implementation)) for op in ops] + BASELINES:
            about = {"op": op.label, "spec": op.spec, "shape": name, "n": n, "k": k}
            try:
                found = run(n, k, tokens)
            except Exception as error:
                found = {m: failure(error) for m in tokens}
            for m, numbers in found.items():
                row = about | {"m": m, "dense_us": dense[m]} | numbers
                result["rows"].append(row if "us" not in row else row | compare(row, result["ceilings"]))
                print(describe(result["rows"][-1]), flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.out is None:
        record.save("matmul", result)


def failure(error: Exception) -> dict[str, Any]:
    return {"error_text": f"{type(error).__name__}: {error}"[:300]}


def timed(
    f: Callable[[Any, Any], Any],
    k: int,
    tokens: Sequence[int],
    weights: Sequence[Any],
    about: Callable[..., Any],
    tries: bool = True,
) -> dict[int, dict[str, Any]]:
    """For each number of tokens m the time of f(x, w) and about(m, y, x), or the error.

    Compiled for all numbers of tokens at once: it is most of the time of a run, and the host has cores to spare.
    Nothing is timed before all are done, nor, if XLA has products of f to try out on the device, while another process
    times."""
    xs = {m: tokens_of(m, k) for m in tokens}
    with alone() if tries else contextlib.nullcontext():
        compiled = {m: _COMPILERS.submit(lambda x: jax.jit(f).lower(x, weights[0]).compile(), x) for m, x in xs.items()}
        wait(compiled.values())
    rows = {}
    with alone():
        for place, (m, program) in enumerate(compiled.items()):
            try:
                run = program.result()
                if place == 0:
                    warm_up(run, xs[m], weights)
                rows[m] = {"us": device_time(run, xs[m], weights)} | about(m, run(xs[m], weights[0]), xs[m])
            except Exception as error:
                rows[m] = failure(error)
    return rows


def tokens_of(m: int, k: int) -> jax.Array:
    return jax.random.normal(jax.random.key(99), (m, k), jnp.bfloat16)


def random_weights(spec: str, n: int, k: int) -> list[Any]:
    """Random packed weights, prepared."""
    parsed = QuantSpec.parse(spec)
    made = [jq.prepare(random_weight(parsed, n, k, 0))]
    return made + [jq.prepare(random_weight(parsed, n, k, i)) for i in range(1, copies_of(jq.size_bytes(made[0])))]


def random_weight(spec: QuantSpec, n: int, k: int, seed: int) -> Any:
    keys = jax.random.split(jax.random.key(seed), 5)
    columns = k - spec.outliers
    codes = jax.random.randint(keys[0], (n, columns), 0, 2**spec.bits).astype(jnp.uint8)
    if spec.grid == "codebook":
        base: Any = random_codebook(codes, spec, keys[1])
    else:
        groups = -(-columns // (spec.group_size or columns))
        scales = jax.random.uniform(keys[1], (n, groups), jnp.float32, 0.01, 0.02).astype(jnp.float16)
        if spec.two_level:  # multiples of a step, 2**-11 or a half more
            steps = jnp.where(scales[:, :1] > 0.015, 1.5, 1.0).astype(jnp.float16) * jnp.float16(2.0**-11)
            scales = steps * jax.random.randint(keys[1], (n, groups), 8, 17).astype(jnp.float16)
        zeros = None
        if not spec.symmetric:
            zeros = jax.random.randint(keys[2], (n, groups), 0, 2**spec.bits).astype(jnp.uint8)
        base = affine_weight(codes, scales, zeros, spec.bits, spec.group_size, "in")
    kept = None
    if spec.outliers:
        index = jnp.sort(jax.random.permutation(keys[3], k)[: spec.outliers]).astype(jnp.int32)
        kept = jq.OutlierColumns(index, 0.05 * jax.random.normal(keys[4], (n, spec.outliers), jnp.float16))
    rest = None
    if spec.sparse:
        # at the same places in every copy: their number is part of the shape, and one program is to serve all copies
        mask = jax.random.uniform(jax.random.key(n), (n, k)) < spec.sparse / 100
        rest = sparse_residual(mask, jnp.ones((n, k), jnp.float16), jnp.float16)
    act = spec.activation
    quantizer = None if act is None else ActivationQuant(None, None, act.bits, act.symmetric)
    return jq.QuantizedLinear(base, kept, rest, activation=quantizer)


def random_codebook(codes: jax.Array, spec: QuantSpec, key: jax.Array) -> Any:
    """A table a row of normal entries, as they are or on an int8 grid."""
    table = jnp.sort(jax.random.normal(key, (codes.shape[0], 2**spec.bits)), axis=1)
    if not spec.int8_table:
        return codebook_weight(codes, table.astype(jnp.float16), spec.bits)
    scales = (jnp.max(jnp.abs(table), axis=1) / 127).astype(jnp.float16)
    entries = jnp.round(table / scales.astype(jnp.float32)[:, None])
    return codebook_weight(codes, jnp.clip(entries, -127, 127).astype(jnp.int8), spec.bits, scales)


def packed_rows(op: Op, implementation: Any, n: int, k: int, tokens: Sequence[int]) -> dict[int, dict[str, Any]]:
    with alone():
        weights = jax.block_until_ready(random_weights(op.spec, n, k))
    size, int8 = jq.size_bytes(weights[0]), weights[0].activation is not None

    def about(m: int, y: jax.Array, x: jax.Array) -> dict[str, Any]:
        path = choose(weights[0], m, implementation).implementation
        error = error_of(y, x, weights[0])
        return {"bytes": size + 2 * m * (k + n), "path": path, "error": error, "int8": int8}

    run = functools.partial(jq.linear, implementation=implementation)
    return timed(run, k, tokens, weights, about, tries=implementation == "xla")


def error_of(y: jax.Array, x: jax.Array, w: Any) -> float:
    """Of at most 64 tokens, against float32 on the decoded weight, and on the activations as they are quantized."""
    count = min(64, x.shape[0])  # filled up with zeros, to be compiled once
    full = jnp.zeros((64, x.shape[1]), x.dtype).at[:count].set(x[:count])
    expected = float_product(*decoded(full, w))[:count]
    return float(jnp.linalg.norm(y[:count].astype(jnp.float32) - expected) / jnp.linalg.norm(expected))


@jax.jit
def decoded(x: jax.Array, w: Any) -> tuple[jax.Array, jax.Array]:
    """Tokens as they are quantized, and the weight, in float32."""
    x = x.astype(jnp.float32)
    if w.activation is not None:
        columns = slice(None) if w.outliers is None else base_columns(w.outliers.index, w.weight.shape[1])
        x = x.at[:, columns].set(fake_quantize(x[:, columns], w.activation))
    return x, jq.dequantize(dataclasses.replace(w, activation=None)).astype(jnp.float32)


@jax.jit
def float_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """By itself: XLA takes ten seconds to compile it, once for all kinds of weights of a shape."""
    return jnp.dot(x, w.T, precision="highest")


def dense_times(n: int, k: int, tokens: Sequence[int]) -> dict[int, float]:
    """Microseconds of XLA's bfloat16 product. RuntimeError where it fails: there is nothing to compare with then."""
    weights = [jax.random.normal(jax.random.key(i), (n, k), jnp.bfloat16) for i in range(copies_of(2 * n * k))]
    rows = timed(lambda x, w: x @ w.T, k, tokens, weights, lambda *_: {})
    for m, row in rows.items():
        if "us" not in row:
            raise RuntimeError(f"the dense product of {m} x {k} by {n} x {k} failed: {row['error_text']}")
    return {m: row["us"] for m, row in rows.items()}


def int4_rows(n: int, k: int, tokens: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Weight-only int4 as plain JAX has it, which XLA fuses itself."""

    def made(seed: int) -> tuple[jax.Array, jax.Array]:
        codes = jax.random.randint(jax.random.key(seed), (n, k), -8, 8).astype(jnp.int4)
        return codes, jnp.full((n,), 0.01, jnp.bfloat16)

    def about(m: int, *_: Any) -> dict[str, Any]:
        return {"bytes": n * k // 2 + 2 * m * (k + n), "path": "xla", "error": None, "int8": False}

    weights = [made(i) for i in range(copies_of(n * k // 2))]
    return timed(lambda x, w: (x @ w[0].astype(jnp.bfloat16).T) * w[1], k, tokens, weights, about)


def w8a8_rows(n: int, k: int, tokens: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Dynamic W8A8 as plain JAX has it."""

    def run(x: jax.Array, w: tuple[jax.Array, jax.Array]) -> jax.Array:
        scale = jnp.max(jnp.abs(x), axis=1, keepdims=True).astype(jnp.float32) / 127
        codes = jnp.round(x.astype(jnp.float32) / scale).astype(jnp.int8)
        y = jax.lax.dot_general(codes, w[0], (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return (y.astype(jnp.float32) * scale * w[1]).astype(jnp.bfloat16)

    def made(seed: int) -> tuple[jax.Array, jax.Array]:
        codes = jax.random.randint(jax.random.key(seed), (n, k), -127, 128).astype(jnp.int8)
        return codes, jnp.full((n,), 0.01, jnp.float32)

    def about(m: int, *_: Any) -> dict[str, Any]:
        return {"bytes": n * k + 2 * m * (k + n), "path": "xla", "error": None, "int8": True}

    return timed(run, k, tokens, [made(i) for i in range(copies_of(n * k))], about)


BASELINES = [(Op("xla int4 per row", "int4"), int4_rows), (Op("xla w8a8", "int8"), w8a8_rows)]


def compare(row: dict[str, Any], measured: dict[str, float]) -> dict[str, Any]:
    """Ratio to dense, the ratio that the roofline allows, and the share of the copy bandwidth."""
    n, k, m, copy = row["n"], row["k"], row["m"], measured["copy_bytes_per_second"]
    peaks = {name: measured[f"{name}_operations_per_second"] for name in ("bfloat16", "int8")}

    def floor(count_bytes: float, peak: float) -> float:
        return 1e6 * max(count_bytes / copy, 2 * n * k * m / peak)

    dense = floor(2 * (n * k + m * (n + k)), peaks["bfloat16"])
    own = floor(row["bytes"], peaks["int8" if row["int8"] else "bfloat16"])
    return {
        "ratio": row["dense_us"] / row["us"],
        "ceiling": dense / own,
        "bandwidth": 100 * 1e6 * row["bytes"] / row["us"] / copy,
    }


def describe(row: dict[str, Any]) -> str:
    head = f"{row['op']:24s} {row['shape']:18s} M={row['m']:<5d}"
    if "error_text" in row:
        return f"{head} {row['error_text']}"
    error = "" if row["error"] is None else f"  error {row['error']:.1e}"
    return (
        f"{head} {row['us']:9.1f} us  {row['ratio']:5.2f}x of {row['dense_us']:8.1f}  ceiling {row['ceiling']:5.2f}  "
        f"{row['bandwidth']:5.1f} %  {row['path']}{error}"
    )


if __name__ == "__main__":
    main()
