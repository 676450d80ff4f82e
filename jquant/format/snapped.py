"""Codebooks snapped to an integer grid a row, so that look-ups give the 8-bit operand of an integer product.

    codebook[n, c] ~ scale[n] * q[n, c],   q int8 in [-127, 127]

The scale minimises sum_c importance[n, c] * (codebook[n, c] - scale[n] * q[n, c])^2 by a search: candidate scales
give q by rounding, every q its best scale by linear regression, and the best pair stays. A table has so few entries
that the search matters: it saves a quarter to two thirds of the squared error of the scale max |codebook| / 127.

The result is an ordinary `CodebookWeight`: codebook int8 [N, 2**bits] and scales [N].

Shapes: codebook [N, 2**bits], q int8 [N, 2**bits], scale float32 [N].
"""

import functools

import jax
import jax.numpy as jnp

LARGEST = 127
_SMALLEST_LARGEST = 64.0  # below half of the grid another candidate is twice as fine
_CANDIDATES = 256


@functools.partial(jax.jit, static_argnames=("candidates",))
def snap_codebook(
    codebook: jax.Array, importance: jax.Array | None = None, candidates: int = _CANDIDATES
) -> tuple[jax.Array, jax.Array]:
    """The int8 table [N, 2**bits] and float32 scale [N] with the least weighted squared error.

    importance [N, 2**bits], zero or more, is how much an entry's error counts, for instance how many weights use it;
    None counts all alike. A row of zeros gets scale 1.
    """
    if candidates < 1:
        raise ValueError(f"candidates={candidates} leaves nothing to choose from; expected 1 or more")
    if importance is not None and importance.shape != codebook.shape:
        raise ValueError(
            f"importance has shape {importance.shape}, the codebook {codebook.shape}; expected the same shape"
        )
    table = codebook.astype(jnp.float32)
    weight = jnp.ones_like(table) if importance is None else importance.astype(jnp.float32)
    peak = jnp.max(jnp.abs(table), axis=1)
    peak = jnp.where(peak > 0, peak, jnp.float32(LARGEST))  # scale 1
    # In units of the peak nothing overflows or vanishes when squared.
    table = table / peak[:, None]

    def attempt(largest: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q = jnp.clip(jnp.round(table * largest), -LARGEST, LARGEST)
        norm = jnp.sum(weight * q * q, axis=1)
        fitted = jnp.sum(weight * q * table, axis=1) / jnp.where(norm > 0, norm, 1.0)
        scale = jnp.where(norm > 0, fitted, 1.0 / largest)
        error = jnp.sum(weight * (table - scale[:, None] * q) ** 2, axis=1)
        return q, scale, error

    def improve(best: tuple[jax.Array, jax.Array, jax.Array], largest: jax.Array):
        q, scale, error = attempt(largest)
        better = error < best[2]
        return (
            jnp.where(better[:, None], q, best[0]),
            jnp.where(better, scale, best[1]),
            jnp.where(better, error, best[2]),
        ), None

    largest = jnp.linspace(float(LARGEST), _SMALLEST_LARGEST, candidates, dtype=jnp.float32)
    (q, scale, _), _ = jax.lax.scan(improve, attempt(largest[0]), largest[1:])
    return q.astype(jnp.int8), scale * peak


def snapping_error(codebook: jax.Array, q: jax.Array, scale: jax.Array, importance: jax.Array | None = None):
    """The root mean square of codebook - scale * q, relative to that of codebook, of all rows together: float32 []."""
    table = codebook.astype(jnp.float32)
    weight = jnp.ones_like(table) if importance is None else importance.astype(jnp.float32)
    error = jnp.sum(weight * (table - scale[:, None] * q.astype(jnp.float32)) ** 2)
    norm = jnp.sum(weight * table**2)
    return jnp.sqrt(error / jnp.where(norm > 0, norm, 1.0))
