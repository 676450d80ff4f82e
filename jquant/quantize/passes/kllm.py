"""KLLM's weights: one codebook for the whole matrix, a scale for every row (arXiv 2507.23035, section on quantizers).

    minimise  sum_nk f_nk (w_nk - s_n codebook[q_nk])**2      over codebook [2**bits], scales s [N] and codes q [N, K]

f is the diagonal Fisher [N, K], or 1. For given scales the codebook is a k-means of c = w / s with weights f s**2, on
all N K values at once: they are gathered in 4096 bins, evenly spaced in c / (|c| + 4 mean|c|), which resolve the body
to 1 % of a 4-bit cell and have room for any tail; their means are clustered by dynamic programming. Codes are the
nearest entries to the values themselves.

The paper says "one scale a row" without saying which, and gives no weighting. Its literal reading is named here
row_scale="rms", refit=False, fisher=None. Real matrices hold single weights at 28 times their row's rms: a table in
units of the rms spends entries on them or clips them. Hence the defaults:

    refit   rounds of: fit the table; then search each row's scale for the least error of that row, among factors
            exp(-r) ... exp(r) of the present one, r falling from round to round. The better of every two states is
            kept, so no round makes the result worse. The search crosses local minima that the closed form
            s = sum f w C[q] / sum f C[q]**2 stops at: on the layers below, 16 rounds of that end above 6 of these
    "best"  starts from the rms and from the largest magnitude of each row, and keeps what has the lower error

    relative weighted error, 4 bits, SmolLM2-135M    rms      rms      absmax   absmax   best     table
    (Fisher of 12 x 512 tokens)                               refit             refit             a row
    layers.1.self_attn.q_proj                        0.0064   0.0019   0.0047   0.0017   0.0017   0.0008
    layers.1.mlp.down_proj                           0.0158   0.0126   0.0115   0.0094   0.0094   0.0066
    layers.29.mlp.down_proj                          0.0133   0.0080   0.0110   0.0082   0.0080   0.0031

    perplexity of the whole model, 2 windows of 1024 tokens, 20.2 unquantized: 32.0 by rms and 28.0 by absmax without
    refit, 23.2 by the defaults, 22.5 by a table a row; the paper's literal reading 2172.

Give a Fisher: without one the error of all weights counts alike, and less of it is no better model (35 by absmax
without refit, 43 by the defaults).

A table a row (table="row") is `squeezellm.fit`: lower error for 2**bits stored values a row instead of one.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jquant.format.activations import pick_nearest
from jquant.quantize.codebook import assign_codes, fit_codebook
from jquant.quantize.grid import round_to_storage
from jquant.quantize.passes import squeezellm

RowScale = Literal["best", "rms", "absmax"]
Table = Literal["matrix", "row"]

BINS = 4096
PARTS = 64  # partial sums of each bin: rows apart do not wait for each other, and float32 sums stay short
REACHES = (0.7, 0.45, 0.28, 0.17, 0.1, 0.06)  # r of the rounds
FACTORS = 10  # tried in a round, besides the present scale


class KLLMReport(NamedTuple):
    """What a fit achieved: sum f (w - w_hat)**2 / sum f w**2, and the same with f = 1."""

    weighted_error: float
    relative_error: float
    reason: str | None  # why the Fisher was not used, or None


@partial(jax.jit, static_argnames=("bits", "table", "row_scale", "refit", "codebook_dtype", "scale_dtype"))
def kllm(
    W: jax.Array,
    bits: int,
    fisher: jax.Array | None = None,
    *,
    table: Table = "matrix",
    row_scale: RowScale = "best",
    refit: bool = True,
    mask: jax.Array | None = None,
    codebook_dtype: Any = jnp.float32,
    scale_dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(codebook [1, 2**bits] ascending, codes [N, K] int32, scales [N]) of W [N, K]; W_hat = scales * codebook[codes].

    table="row" gives (codebook [N, 2**bits], codes, None); row_scale and refit say nothing there. Entries of `mask`
    [N, K] bool are kept elsewhere: they do not count, and receive the code nearest to 0.

    What is returned is rounded to its types before errors are compared and codes are computed. A row of zeros has
    scale 0 and decodes to zeros exactly (the table need not hold a 0), with the codes of the entry nearest 0. A Fisher
    with a value that is not finite, or with none above 0, is ignored as a whole; a row with none above 0 does not pull
    at the table, and its scale is that of least plain error. Raises ValueError for bits outside
    1..8, shapes that differ, or an unknown `table` or `row_scale`.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} gives no codebook; expected 1 to 8 bits")
    if table not in ("matrix", "row"):
        raise ValueError(f"table={table!r} is unknown; expected 'matrix' (one for all rows) or 'row' (one a row)")
    if row_scale not in ("best", "rms", "absmax"):
        raise ValueError(f"row_scale={row_scale!r} is unknown; expected 'best', 'rms' or 'absmax'")
    for name, other in (("fisher", fisher), ("mask", mask)):
        if W.ndim != 2 or (other is not None and other.shape != W.shape):
            raise ValueError(f"W {W.shape} and {name} {None if other is None else other.shape} must be alike [N, K]")
    dense = W.astype(jnp.float32) if mask is None else jnp.where(mask, 0.0, W.astype(jnp.float32))
    weights = _usable_weights(dense, fisher, mask)
    if table == "row":
        codebook, codes = squeezellm.fit(W, weights, bits, mask, codebook_dtype=codebook_dtype)
        return codebook, codes, None
    # In units of the largest weight, so that squares of huge and tiny matrices stay inside float32.
    size = jnp.max(jnp.abs(dense))
    size = jnp.where(size > 0, size, 1.0)
    state = _best_of_starts(dense / size, weights, size, bits, row_scale, refit, codebook_dtype, scale_dtype)
    scales = _stored(state.scales, size, scale_dtype) * size
    codes = assign_codes(dense / _divisor(scales)[:, None], state.codebook[None])
    return state.codebook[None].astype(codebook_dtype), codes, scales.astype(scale_dtype)


def dense_table(codebook: jax.Array, scales: jax.Array | None, rows: int) -> jax.Array:
    """scales * codebook as a table a row, float32 [rows, 2**bits]: what `codebook_lookup` decodes."""
    wide = jnp.broadcast_to(codebook.astype(jnp.float32), (rows, codebook.shape[1]))
    return wide if scales is None else wide * scales.astype(jnp.float32)[:, None]


def unusable_fisher(fisher: jax.Array | None, mask: jax.Array | None = None) -> str | None:
    """Why `kllm` ignores this Fisher, or None if it does not (or there is none)."""
    if fisher is None:
        return None
    if not bool(jnp.all(jnp.isfinite(fisher))):
        return "Fisher has values that are not finite; weights count alike"
    if not bool(jnp.any((fisher > 0) if mask is None else (fisher > 0) & ~mask)):
        return "Fisher is zero everywhere; weights count alike"
    return None


def report(
    W: jax.Array,
    fisher: jax.Array | None,
    codebook: jax.Array,
    codes: jax.Array,
    scales: jax.Array | None,
    mask: jax.Array | None = None,
) -> KLLMReport:
    """The `KLLMReport` of a finished fit; concrete arrays of the shapes above."""
    reason = unusable_fisher(fisher, mask)
    f = jnp.ones(W.shape, jnp.float32) if fisher is None or reason else fisher
    mask = jnp.zeros(W.shape, bool) if mask is None else mask
    found = squeezellm.report(W, f, dense_table(codebook, scales, W.shape[0]), codes, mask)
    return KLLMReport(found.weighted_error, found.relative_error, reason)


class _State(NamedTuple):
    """The best so far; the codebook [2**bits] as stored, scales [N] in units of `size`, before rounding."""

    error: jax.Array
    scales: jax.Array
    codebook: jax.Array


def _usable_weights(W: jax.Array, fisher: jax.Array | None, mask: jax.Array | None) -> jax.Array:
    """Non-negative weights [N, K] with a largest value of 1; 0 where masked."""
    weights = jnp.ones(W.shape, jnp.float32)
    open_entries = weights if mask is None else jnp.where(mask, 0.0, 1.0)
    if fisher is None:
        return open_entries
    f = jnp.maximum(fisher.astype(jnp.float32), 0.0) * open_entries
    largest = jnp.max(f)
    usable = jnp.all(jnp.isfinite(fisher)) & (largest >= float(jnp.finfo(jnp.float32).tiny))
    return jnp.where(usable, f / jnp.where(usable, largest, 1.0), open_entries)


def _best_of_starts(
    W: jax.Array,
    f: jax.Array,
    size: jax.Array,
    bits: int,
    row_scale: RowScale,
    refit: bool,
    codebook_dtype: Any,
    scale_dtype: Any,
) -> _State:
    absmax = jnp.max(jnp.abs(W), axis=1)
    rms = absmax * jnp.sqrt(jnp.mean(jnp.square(W / _divisor(absmax)[:, None]), axis=1))
    starts = {"best": [rms, absmax], "rms": [rms], "absmax": [absmax]}[row_scale]
    # A row that weighs nothing pulls nothing, but its own scale should still suit it.
    felt = jnp.any(f > 0, axis=1)
    own = jnp.where(felt[:, None], f, 1.0)

    def improve(state: tuple[jax.Array, _State], reach: jax.Array) -> tuple[tuple[jax.Array, _State], None]:
        scales, best = state
        codebook = _fit_table(W, f, _stored(scales, size, scale_dtype), bits)
        codebook = round_to_storage(codebook, codebook_dtype)

        def attempt(found: tuple[jax.Array, jax.Array], factor: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            error = _row_errors(W, own, _stored(scales * factor, size, scale_dtype), codebook)
            better = error < found[0]
            return (jnp.where(better, error, found[0]), jnp.where(better, scales * factor, found[1])), None

        found = (_row_errors(W, own, _stored(scales, size, scale_dtype), codebook), scales)
        if refit:
            factors = jnp.exp(reach * jnp.linspace(-1.0, 1.0, FACTORS))
            found, _ = jax.lax.scan(attempt, found, factors)
        new = _State(jnp.sum(jnp.where(felt, found[0], 0.0)), found[1], codebook)
        best = jax.tree.map(lambda a, b: jnp.where(new.error < best.error, a, b), new, best)
        return (found[1], best), None

    def run(best: _State, start: jax.Array) -> tuple[_State, None]:
        reaches = jnp.asarray(REACHES if refit else REACHES[:1], jnp.float32)
        return jax.lax.scan(improve, (start, best), reaches)[0][1], None

    nothing = _State(jnp.float32(jnp.inf), absmax, jnp.zeros((2**bits,), jnp.float32))
    return jax.lax.scan(run, nothing, jnp.stack(starts))[0]


def _fit_table(W: jax.Array, f: jax.Array, scales: jax.Array, bits: int) -> jax.Array:
    """[2**bits] ascending: weighted k-means of W / scales [N, K] by the means of its bins."""
    c = W / _divisor(scales)[:, None]
    weights = f * jnp.square(scales)[:, None]
    unit = 4 * jnp.mean(jnp.abs(c))
    place = (0.5 * BINS * (1 + c / (jnp.abs(c) + jnp.where(unit > 0, unit, 1.0)))).astype(jnp.int32)
    part = jnp.arange(W.shape[0], dtype=jnp.int32)[:, None] % PARTS
    place = jnp.clip(place, 0, BINS - 1) + BINS * part
    mass, moment = (
        jnp.sum(jnp.zeros((PARTS * BINS,), jnp.float32).at[place].add(v).reshape(PARTS, BINS), axis=0)
        for v in (weights, weights * c)
    )
    # Empty bins stand at 0 with weight 0: they pull nothing.
    return fit_codebook((moment / jnp.where(mass > 0, mass, 1.0))[None], mass[None], bits)[0][0]


def _row_errors(W: jax.Array, f: jax.Array, scales: jax.Array, codebook: jax.Array) -> jax.Array:
    """[N]: sum_k f (w - s codebook[q])**2 with the nearest codes."""
    nearest = pick_nearest(W / _divisor(scales)[:, None], codebook, codebook)
    return jnp.sum(f * jnp.square(W - scales[:, None] * nearest), axis=1)


def _stored(scales: jax.Array, size: jax.Array, dtype: Any) -> jax.Array:
    """Scales in units of `size` that `dtype` holds exactly once multiplied by it; 0 stays 0, no other becomes 0."""
    least = jnp.maximum(scales * size, float(jnp.finfo(dtype).tiny))
    return jnp.where(scales > 0, round_to_storage(least, dtype) / size, 0.0)


def _divisor(scales: jax.Array) -> jax.Array:
    return jnp.where(scales > 0, scales, 1.0)
