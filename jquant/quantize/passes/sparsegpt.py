"""SparseGPT: GPTQ in which most of a pattern's columns are zeros.

    of every `of` columns visited one after another, each row keeps `keep`: those with the largest |w_k| / U_kk,
    w as compensated so far, H^-1 = U^T U                                        (arXiv 2301.00774, section 3.3)

Removing w_k and compensating for it costs (w_k / U_kk)**2 / 2, so the cheapest go. Survivors are then rounded and the
errors of both kinds passed on, column by column, in the loop of `gptq.compensated_rounding`: joint pruning and
quantization. (2, 4) is what NVIDIA's sparse matrix units take. The pattern holds in visiting order, not in the original
one: whoever packs it needs the order.

Inputs never seen in calibration (H_kk = 0) are the first to go, but survive where there is room: SparseGPT zeroes them
all. Among equals the column visited first goes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jquant.quantize.passes.gptq import QuantizeColumn, compensated_rounding

Pattern = tuple[int, int]  # (kept, of how many)


def sparse_rounding(
    W: jax.Array,
    H: jax.Array,
    quantize_column: QuantizeColumn,
    pattern: Pattern,
    *,
    order: jax.Array,
    prunable: int,
    damping: jax.Array | float = 0.01,
    block_size: int = 128,
) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """(recorded, decoded W [N, K], mask bool [N, K], ok) like `compensated_rounding`, with the first columns pruned.

    The pattern covers the first `prunable` columns of the visiting order [K]; later ones always survive. mask marks
    survivors; the others decode to zero, and what quantize_column(None, w, k) records for them means nothing.
    ValueError unless `of` divides prunable and 0 < keep < of.
    """
    keep, of = check_pattern(pattern, prunable)
    place = jnp.argsort(order).astype(jnp.int32)
    live = jnp.pad((jnp.diagonal(H) != 0)[order], (0, of))

    def start_window(_: jax.Array, w: jax.Array, factor: jax.Array, position: jax.Array) -> jax.Array:
        return survivors(w, factor, jax.lax.dynamic_slice_in_dim(live, position, of), keep)

    def prune_or_quantize(chosen: jax.Array, w: jax.Array, k: jax.Array) -> tuple[Any, jax.Array]:
        recorded, decoded = quantize_column(None, w, k)
        survives = chosen[place[k] % of] | (place[k] >= prunable)
        return (recorded, survives), jnp.where(survives, decoded, 0.0)

    (recorded, mask), decoded, ok = compensated_rounding(
        W,
        H,
        prune_or_quantize,
        order=order,
        damping=damping,
        block_size=block_size,
        start_window=start_window,
        window=of,
        state=jnp.zeros((of, W.shape[0]), bool),
    )
    return recorded, decoded, mask.T, ok


def magnitude_mask(W: jax.Array, order: jax.Array, pattern: Pattern) -> jax.Array:
    """bool [N, K]: the `keep` largest |W| of every `of` columns in the visiting order [K]. What needs no Hessian."""
    keep, of = check_pattern(pattern, W.shape[1])
    groups = W.T[order].reshape(-1, of, W.shape[0])
    one = jnp.ones((of,), W.dtype)
    mask = jax.vmap(lambda w: survivors(w, one, one > 0, keep))(groups)
    return mask.reshape(W.shape[1], -1)[jnp.argsort(order)].T


def survivors(w: jax.Array, factor: jax.Array, live: jax.Array, keep: int) -> jax.Array:
    """bool [of, N]: the `keep` of w [of, N] with the largest |w| / factor, factor [of], dead columns last."""
    score = jnp.abs(w) / factor[:, None]
    first = jnp.arange(w.shape[0])
    # goes_first[i, j]: i is pruned before j. Pairwise, because a sort of four is a kernel of its own.
    equal = (score[:, None] == score[None, :]) & (first[:, None] < first[None, :])[..., None]
    cheaper = (score[:, None] < score[None, :]) | equal
    same = (live[:, None] == live[None, :])[..., None]
    goes_first = jnp.where(same, cheaper, (~live[:, None] & live[None, :])[..., None])
    return jnp.sum(goes_first.astype(jnp.int32), axis=0) >= w.shape[0] - keep


def check_pattern(pattern: Pattern, columns: int) -> Pattern:
    """The pattern; ValueError unless it prunes something, keeps something, and divides the columns."""
    keep, of = pattern
    if not 0 < keep < of:
        raise ValueError(f"pattern {keep}:{of} prunes nothing or everything; expected 0 < kept < of, say (2, 4)")
    if columns % of:
        raise ValueError(
            f"{columns} columns do not divide into groups of {of} for the pattern {keep}:{of}; keep {columns % of} "
            f"more of them as outliers, or leave this layer dense"
        )
    return keep, of
