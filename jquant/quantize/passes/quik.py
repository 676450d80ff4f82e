"""QUIK: keep the inputs with the largest activations, round the others, and let the kept ones make up for the rounding.

    minimise  trace((W - Q) H (W - Q)^T),   Q = grid(codes) on the base columns, free on the kept ones     W [N, K]

(arXiv 2310.09259, section 3, and the released weight quantizer.) With amax [K] the largest absolute value that
calibration saw in each input:

- Kept ("outlier") columns are the `count` largest amax; they stay in floating point, and so do their activations.
- Scales are one a row, from the original base columns, before anything is compensated: absmax / (2**(bits - 1) - 1), or
  the p of that range, p = 1.00, 0.99, ... 0.21, with the least sum |error|**2.4.
- The GPTQ loop visits the base columns, then the kept ones. Those are not rounded, so they only absorb error.
- Base columns are visited by rising amax ("ascending", the released code) or falling diag H ("act_order", GPTQ's own
  heuristic).
- With 2:4 sparsity two of every four base columns, in visiting order, are pruned in the same loop (`sparsegpt`).

How many columns to keep. The paper takes 256 everywhere and more for wide down projections, by three rules that do not
agree; a caller passes a number, these make one:

    paper, table of outliers       3.5 times as many for LLaMA-2-70B's down projection, 896     (no formula given)
    released accuracy scripts      `scaled_count`    whole multiples of the hidden size: 768 there
    released kernel scripts        `fraction_count`  a fraction of the inputs, 1/32 giving 896 there

A layer whose largest activation is at most a threshold T keeps none (`outlier_count`); the paper takes 2T for layers
that it leaves at 8 bits.

`quik` is jittable and goes under `vmap` for equal shapes; where H is unusable it says ok = False. `quik_or_rtn` raises
the damping as `gptq_or_rtn` does, in the end rounds the base columns to nearest, and says what it did.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.format.weights import base_columns
from jquant.quantize.grid import (
    Grid,
    check_grid,
    dequantize_grid,
    fit_grid,
    quantize_to_grid,
    round_to_storage,
    storage_dtype,
)
from jquant.quantize.passes.gptq import GPTQReport, compensated_rounding, raise_damping
from jquant.quantize.passes.sparsegpt import Pattern, check_pattern, magnitude_mask, sparse_rounding

Order = Literal["ascending", "act_order"]


class QuikResult(NamedTuple):
    """A layer split into base and kept columns; base columns are ascending everywhere but in `order`.

    codes   int32 [N, K - k]    in 0 .. 2**bits - 1; a pruned weight has the code of zero
    scales  [N, 1]              W = scales * (codes - zeros), zeros 2**(bits - 1) where None
    zeros   int32 [N, 1] | None
    weight  float32 [N, k]      the kept columns after compensation, in the order of index
    mask    bool [N, K - k] | None    survivors of the pattern
    order   int32 [K - k]       the base column visited at each position: the order in which a pattern holds
    ok      bool                False: H was unusable, and so is the result
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    weight: jax.Array
    mask: jax.Array | None
    order: jax.Array
    ok: jax.Array


def outlier_columns(amax: jax.Array, count: int) -> jax.Array:
    """The `count` inputs with the largest amax [K], ascending int32 [count]; the lower index first among equals.

    An input that saw NaN counts as infinite. ValueError unless 0 <= count <= K.
    """
    if not 0 <= count <= amax.shape[0]:
        raise ValueError(f"{count} columns cannot be kept of {amax.shape[0]}; expected 0 to {amax.shape[0]}")
    largest_first = jnp.argsort(-_finite(amax), stable=True)
    return jnp.sort(largest_first[:count]).astype(jnp.int32)


def outlier_count(amax: jax.Array, columns: int, count: int, *, threshold: float = 0.0) -> int:
    """`count`, or 0 where no activation of the layer's `columns` inputs exceeds threshold. For a concrete amax [K]."""
    if amax.shape != (columns,):
        raise ValueError(f"amax has shape {amax.shape}; expected one value for each of {columns} inputs")
    return 0 if columns == 0 or float(jnp.max(_finite(amax))) <= threshold else count


def scaled_count(count: int, columns: int, hidden: int) -> int:
    """count times the whole number of hidden sizes in a layer's inputs (`--fp_relative` of the released scripts).

    A layer narrower than the hidden size keeps count, where the scripts would keep none.
    """
    return max(columns // hidden, 1) * count


def fraction_count(fraction: float, columns: int, least: int = 0) -> int:
    """A fraction of a layer's inputs, but at least `least` (`--fp_features_frac` of the released kernel scripts)."""
    return max(int(columns * fraction), least)


def row_grid(
    base: jax.Array, bits: int, *, symmetric: bool = True, clip_search: bool = True, scale_dtype: Any = jnp.float16
) -> Grid:
    """QUIK's grid of the base columns [N, K], one scale a row.

    Without clip search a symmetric scale is absmax / (2**(bits - 1) - 1): no weight is clipped, code 0 is idle.
    """
    if clip_search or not symmetric:
        return fit_grid(base, bits, None, symmetric, "in", clip_search, scale_dtype)
    check_grid(bits, None, "in")
    peak = jnp.max(jnp.abs(base.astype(jnp.float32)), axis=1, keepdims=True)
    # As in fit_grid: a scale too small for its type becomes the smallest one, a row of zeros gets 1.
    scale = jnp.maximum(peak / (2 ** (bits - 1) - 1), float(jnp.finfo(scale_dtype).tiny))
    scale = jnp.where(peak == 0, 1.0, round_to_storage(scale, scale_dtype))
    return Grid(scale.astype(scale_dtype), None, bits, None, "in")


@partial(
    jax.jit,
    static_argnames=("bits", "clip_search", "order", "symmetric", "sparsity", "scale_dtype", "block_size"),
)
def quik(
    W: jax.Array,
    H: jax.Array,
    amax: jax.Array,
    bits: int,
    index: jax.Array,
    *,
    damping: jax.Array | float = 0.01,
    clip_search: bool = True,
    order: Order = "ascending",
    symmetric: bool = True,
    sparsity: Pattern | None = None,
    scale_dtype: Any = jnp.float16,
    block_size: int = 128,
) -> QuikResult:
    """QUIK of W [N, K] with H [K, K] and amax [K], keeping the columns index [k] int32, ascending.

    sparsity None or (2, 4). No index is GPTQ in the given order; every column kept is W itself.
    ValueError for shapes that do not fit, an unknown order, 2:4 with zero points, or 2:4 of K - k columns that do not
    divide by four.
    """
    _check(W, H, amax, index, order, symmetric, sparsity)
    check_grid(bits, None, "in")
    columns, kept = W.shape[1], index.shape[0]
    visit = _base_order(amax if order == "ascending" else -jnp.diagonal(H), index)
    if kept == columns:
        return _all_kept(W, symmetric, sparsity, scale_dtype)
    place = base_columns(index, columns - kept)
    grid = row_grid(W[:, place], bits, symmetric=symmetric, clip_search=clip_search, scale_dtype=scale_dtype)
    is_kept = jnp.zeros((columns,), bool).at[index].set(True)

    def quantize_column(_: Any, w: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = quantize_to_grid(w[:, None], grid)
        return codes[:, 0], jnp.where(is_kept[k], w, dequantize_grid(codes, grid)[:, 0])

    full = jnp.concatenate([place[visit], index.astype(jnp.int32)])
    mask = None
    if sparsity is None:
        codes, decoded, ok = compensated_rounding(
            W, H, quantize_column, order=full, damping=damping, block_size=block_size
        )
        codes = codes.T[:, place]
    else:
        codes, decoded, mask, ok = sparse_rounding(
            W,
            H,
            quantize_column,
            sparsity,
            order=full,
            prunable=columns - kept,
            damping=damping,
            block_size=block_size,
        )
        mask = mask[:, place]
        codes = jnp.where(mask, codes.T[:, place], 2 ** (bits - 1))
    return QuikResult(codes, grid.scales, grid.zeros, decoded[:, index], mask, visit, ok)


def quik_or_rtn(
    W: jax.Array,
    H: jax.Array,
    amax: jax.Array,
    bits: int,
    index: jax.Array,
    *,
    damping: float = 0.01,
    scale_dtype: Any = None,
    **options: Any,
) -> tuple[QuikResult, GPTQReport]:
    """`quik` with ten times the damping after each failure, up to 10; then base columns rounded to nearest.

    The fallback leaves the kept columns as they were and prunes, if asked, the smallest weights in the order of amax.
    For concrete arrays, outside jit; `options` are the others of `quik`. scale_dtype None is float16 where that holds
    every scale, float32 elsewhere. ValueError as in `quik`, or if index is not ascending.
    """
    places = np.asarray(index)
    if places.size and (places[0] < 0 or places[-1] >= W.shape[1] or np.any(np.diff(places) <= 0)):
        raise ValueError(f"index must be ascending columns of 0 .. {W.shape[1] - 1}, each once")
    symmetric, clip_search = options.get("symmetric", True), options.get("clip_search", True)
    sparsity = options.get("sparsity")
    _check(W, H, amax, index, options.get("order", "ascending"), symmetric, sparsity)
    if places.size == W.shape[1]:
        dead = int(jnp.sum((jnp.diagonal(H) == 0).astype(jnp.int32)))
        kind = jnp.float16 if scale_dtype is None else scale_dtype
        return _all_kept(W, symmetric, sparsity, kind), GPTQReport(None, dead, None)
    base = W[:, base_columns(index, W.shape[1] - places.size)]
    if scale_dtype is None:
        fitted = row_grid(base, bits, symmetric=symmetric, clip_search=clip_search, scale_dtype=jnp.float32)
        scale_dtype = storage_dtype(fitted.scales)
    attempt = partial(quik, W, H, amax, bits, index, scale_dtype=scale_dtype, **options)
    result, report = raise_damping(lambda amount: attempt(damping=amount), H, damping)
    if result is not None:
        return result, report
    grid = row_grid(base, bits, symmetric=symmetric, clip_search=clip_search, scale_dtype=scale_dtype)
    codes, visit, mask = quantize_to_grid(base, grid), _base_order(amax, index), None
    if sparsity is not None:
        mask = magnitude_mask(base.astype(jnp.float32), visit, sparsity)
        codes = jnp.where(mask, codes, 2 ** (bits - 1))
    kept = W[:, index].astype(jnp.float32)
    return QuikResult(codes, grid.scales, grid.zeros, kept, mask, visit, jnp.bool_(True)), report


def _base_order(key: jax.Array, index: jax.Array) -> jax.Array:
    """Base columns by rising key [K], as places among the base columns: int32 [K - k]. Equal ones keep their order."""
    base = key[base_columns(index, key.shape[0] - index.shape[0])]
    return jnp.argsort(_finite(base), stable=True).astype(jnp.int32)


def _finite(key: jax.Array) -> jax.Array:
    """NaN, which argsort would put last whatever the sign, as infinity."""
    return jnp.where(jnp.isnan(key), jnp.inf, key)


def _all_kept(W: jax.Array, symmetric: bool, sparsity: Pattern | None, scale_dtype: Any) -> QuikResult:
    rows = W.shape[0]
    return QuikResult(
        codes=jnp.zeros((rows, 0), jnp.int32),
        scales=jnp.ones((rows, 1), scale_dtype),
        zeros=None if symmetric else jnp.zeros((rows, 1), jnp.int32),
        weight=W.astype(jnp.float32),
        mask=None if sparsity is None else jnp.zeros((rows, 0), bool),
        order=jnp.zeros((0,), jnp.int32),
        ok=jnp.bool_(True),
    )


def _check(
    W: jax.Array,
    H: jax.Array,
    amax: jax.Array,
    index: jax.Array,
    order: str,
    symmetric: bool,
    sparsity: Pattern | None,
) -> None:
    columns = W.shape[-1]
    if W.ndim != 2 or H.shape != (columns, columns) or amax.shape != (columns,):
        raise ValueError(f"W {W.shape} must be [N, K], H {H.shape} [K, K] and amax {amax.shape} [K] over its columns")
    if index.ndim != 1 or index.shape[0] > columns:
        raise ValueError(f"index {index.shape} must list at most the {columns} columns of W")
    if order not in ("ascending", "act_order"):
        raise ValueError(f"order={order!r} is unknown; expected 'ascending' (amax) or 'act_order' (falling diag H)")
    if sparsity is not None:
        if sparsity != (2, 4):
            raise ValueError(f"sparsity={sparsity} has no packed form; expected None or (2, 4)")
        if not symmetric:
            raise ValueError("2:4 weights are stored without zero points; use symmetric=True")
        check_pattern(sparsity, columns - index.shape[0])
