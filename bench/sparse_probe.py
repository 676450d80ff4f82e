"""What sparse entries cost beside a packed base on a GPU: `python -m bench.sparse_probe [--kinds GLOB ...]`.

Three layers of 28672 x 8192 for each kind of weight and number of tokens, all through `jq.linear` under jit:

    base     the packed weight alone
    rows     the entries in a product of their own, `pallas_kernels.sparse_matmul.add_rows`
    fused    the entries added to the decoded weights, `pallas_kernels.sparse_matmul.tiles`

with the device time by CUPTI (median, two weights read in turns), the time over the base's, the ratio to XLA's dense
bfloat16 product of the same shape in the same process, and the relative error against float32 arithmetic on the decoded
weight: of all outputs, and of the worst single output, where an entry that is missing would show. Kinds with "uneven"
have some rows and columns full of entries. Results go to a file if --out names one; a row that fails says why.

With --rows it is `add_rows` alone, without a base, for each number of tokens up to 32 (`--tokens 1,2,4,8,16`): the
kernel that gathers through the cache in its default configuration, the one that gathers from shared memory for each
number of parts, its default first, then others of the former (`SWEEP`). A transposition of x that XLA makes beside it
is counted; differences are to the first in float32, bfloat16's rounding of the result included.
"""

import argparse
import dataclasses
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jquant as jq
from bench.device_time import device_time, warm_up
from bench.matmul import dense_times, random_weight, tokens_of
from jquant.format.spec import QuantSpec
from jquant.format.weights import sparse_residual
from pallas_kernels.sparse_matmul import (
    Config,
    SharedConfig,
    SparseRows,
    add_rows,
    default_config,
    default_shared,
    prepare_rows,
    shape_of,
)

N, K = 28672, 8192
TOKENS = (1, 8, 16, 64, 256, 2048)
KINDS = {
    "W3 codebook": "w3-codebook+s0.45%",
    "W4 g128": "w4-g128-sym+s0.45%",
    "W3 codebook, uneven": "w3-codebook+s0.45%",
    "W4 codebook": "w4-codebook+s0.45%",
}
SWEEP = [  # block_n, chunk, depth, block_m, num_warps
    Config(*each)
    for each in [
        *[(32, 16, 4, 1, 4), (32, 16, 2, 1, 4), (16, 16, 4, 1, 2), (64, 16, 4, 1, 8), (16, 32, 2, 1, 4)],
        *[(32, 64, 1, 1, 4), (32, 4, 8, 4, 4), (32, 4, 4, 4, 4)],
        *[(32, 4, 8, 8, 4), (32, 4, 4, 8, 4), (16, 8, 8, 8, 4), (16, 8, 4, 8, 4), (32, 8, 4, 8, 8)],
        *[(16, 4, 8, 16, 4), (16, 4, 4, 16, 4), (32, 2, 8, 16, 4), (8, 8, 4, 16, 4), (32, 4, 4, 16, 8)],
    ]
]

PARTS, WARPGROUPS = (132, 264), (4, 6, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["W3 codebook", "W4 g128"], metavar="GLOB")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--size", default=f"{N},{K}", help="N,K")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", action="store_true", help="only the product by row, either kernel in many ways")
    options = parser.parse_args()
    n, k = (int(text) for text in options.size.split(","))
    tokens = [int(text) for text in options.tokens.split(",")]
    if options.rows:
        sweep_rows(n, k, [m for m in tokens if m <= 32])
        return
    results: list[dict[str, Any]] = []
    dense = dense_times(n, k, tokens)
    for name, spec in KINDS.items():
        if not any(fnmatchcase(name, each) for each in options.kinds):
            continue
        layers = [layer_of(spec, n, k, seed, "uneven" in name) for seed in range(2)]
        decoded = jax.jit(jq.dequantize)(layers[0])
        plain = jax.jit(jq.dequantize)(dataclasses.replace(layers[0], residual=None))
        for m in tokens:
            base_us = None
            for way in ("base", "rows", "fused"):
                row: dict[str, Any] = {"kind": name, "n": n, "k": k, "m": m, "way": way, "dense_us": dense[m]}
                try:
                    row |= measure([variant(layer, way) for layer in layers], m, k, plain if way == "base" else decoded)
                    base_us = row["us"] if way == "base" else base_us
                    row |= {"over_base": row["us"] / base_us if base_us else None, "ratio": dense[m] / row["us"]}
                except Exception as error:
                    row["failed"] = f"{type(error).__name__}: {error}"[:300]
                results.append(row)
                print(describe(row), flush=True)
                if options.out is not None:
                    options.out.write_text(json.dumps(results, indent=1) + "\n")


def sweep_rows(n: int, k: int, tokens: list[int]) -> None:
    """Prints the time of `add_rows` for rows of about 0.45 % of the inputs: either kernel, in each configuration."""
    copies = {parts: [entries_of(n, k, seed, parts) for seed in range(16)] for parts in PARTS}  # 75 MB, past the L2
    for m in tokens:
        first = tokens_of(m, k), jax.random.normal(jax.random.key(0), (m, n))
        default = default_config(m)
        expected = add_rows(first[1], first[0], copies[PARTS[0]][0], config=default)
        tries: list[tuple[Config | SharedConfig, int]] = [(default, PARTS[0])]
        for parts in PARTS:
            shape = shape_of(first[0], copies[parts][0], first[0].dtype)
            usual = default_shared(shape)
            others = (SharedConfig(usual.block_m, w, r * usual.lanes) for r in (1, 2) for w in WARPGROUPS)
            tries += [(each, parts) for each in (usual, *(other for other in others if other != usual))]
        tries += [(each, PARTS[0]) for each in SWEEP if each != default and each.block_m < 2 * m <= 8 * each.block_m]
        for config, parts in tries:
            run = jax.jit(lambda xy, rows, c=config: add_rows(xy[1], xy[0], rows, out_dtype=xy[0].dtype, config=c))
            try:
                worst = float(jnp.max(jnp.abs(run(first, copies[parts][0]) - expected)))
                warm_up(run, first, copies[parts])
                text = f"{device_time(run, first, copies[parts]):8.2f} us, largest difference {worst:.1e}"
            except Exception as error:
                text = f"FAILED {type(error).__name__}: {error}"[:300]
            print(f"rows alone M={m:<4d} {parts} parts {config}: {text}", flush=True)


def entries_of(n: int, k: int, seed: int, parts: int) -> SparseRows:
    """Random entries by row, as many in each row whatever the seed."""
    rng = np.random.default_rng(seed)
    counts = np.random.default_rng(0).binomial(k, 0.0045, n)
    columns = rng.integers(0, k, counts.sum()).astype(np.uint16)
    pointer = np.concatenate([[0], np.cumsum(counts)])
    return prepare_rows(rng.normal(size=columns.size).astype(np.float16), columns, pointer, parts=parts)


def layer_of(spec: str, n: int, k: int, seed: int, uneven: bool) -> Any:
    """A random prepared layer with values of normal distribution, some places of which are crowded if `uneven`."""
    layer = random_weight(QuantSpec.parse(spec), n, k, seed)
    keys = jax.random.key(n), jax.random.key(100 + seed)  # the same places in every layer: one program serves all

    @jax.jit
    def made(share: jax.Array) -> tuple[jax.Array, jax.Array]:
        row, column = jnp.arange(n)[:, None], jnp.arange(k)[None]
        crowded = jnp.where(row % 3001 == 5, 0.3, jnp.where(column % 2003 == 7, 0.5, share * 0.8))
        mask = jax.random.uniform(keys[0], (n, k)) < (crowded if uneven else share)
        return mask, jax.random.normal(keys[1], (n, k), jnp.float16)

    mask, values = made(jnp.float32(0.0045))
    rest = sparse_residual(mask, values, jnp.float16)
    ready = jq.prepare(dataclasses.replace(layer, residual=rest))
    by_row = prepare_rows(*(np.asarray(a) for a in (rest.values, rest.columns, rest.row_pointer)))
    return dataclasses.replace(ready, residual=dataclasses.replace(ready.residual, by_row=by_row))


def variant(layer: Any, way: str) -> Any:
    """The layer with one of the two layouts of its entries, or without entries; `linear` takes the layout there is."""
    if way == "base":
        return dataclasses.replace(layer, residual=None)
    other = "by_tile" if way == "rows" else "by_row"
    return dataclasses.replace(layer, residual=dataclasses.replace(layer.residual, **{other: None}))


def measure(layers: list[Any], m: int, k: int, decoded: jax.Array) -> dict[str, Any]:
    x, run = tokens_of(m, k), jax.jit(lambda x, w: jq.linear(x, w, implementation="pallas"))
    few = x[: min(m, 256)].astype(jnp.float32)
    expected = jnp.dot(few, decoded.T, precision="highest")
    got = run(x, layers[0])[: few.shape[0]].astype(jnp.float32)
    worst = jnp.max(jnp.sqrt(jnp.mean((got - expected) ** 2, axis=0)) / jnp.sqrt(jnp.mean(few**2)))
    warm_up(run, x, layers)
    return {
        "us": device_time(run, x, layers),
        "error": float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)),
        "worst": float(worst / jnp.sqrt(jnp.mean(jnp.sum(decoded**2, axis=1)))),
    }


def describe(row: dict[str, Any]) -> str:
    head = f"{row['kind']:20s} M={row['m']:<5d} {row['way']:6s}"
    if "failed" in row:
        return f"{head} FAILED {row['failed']}"
    over = "" if row["over_base"] is None else f"  {row['over_base']:5.3f} of the base"
    errors = f"error {row['error']:.1e}, worst output {row['worst']:.1e}"
    return f"{head} {row['us']:8.1f} us{over}  {row['ratio']:5.2f}x of {row['dense_us']:7.1f}  {errors}"


if __name__ == "__main__":
    main()
