"""SqueezeLLM: a sensitivity-weighted codebook for every row, and a few entries kept aside as a sparse residual.

    minimise  sum_i F_i (w_i - codebook[q_i])**2  per row,   F = diagonal Fisher = mean squared gradient    [N, K]
    W ~ codebook[codes] + residual,   residual = W - codebook[codes] on the entries set aside, 0 elsewhere

Entries are set aside in two disjoint groups (dense-and-sparse, arXiv 2306.07629, section 4.2 and its released code):

    sensitive   the largest Fisher values of each matrix, whatever their weight
    outliers    of the rest, those with |w| >= T,  T = max(|q1 - R iqr|, |q3 + R iqr|)

q1, q3 are the quartiles of one original matrix, iqr = q3 - q1, and R is one number for the whole model, found by
`outlier_range` so that the model-wide share of outliers meets its target. What is set aside is replaced by 0 with
weight 0 for the codebook, and still receives the code nearest to 0; decode + residual is exact up to float32 rounding.

Differences from the released code, all deliberate:
- It keeps F > (k-th largest), thus k - 1 entries less ties, and fails for k = 0. Here exactly round(fraction * numel)
  entries are sensitive, the lower index first among equals; never one with F = 0, which has no sensitivity to keep.
- It gives weight 0 to weights that happen to be 0. Here a true zero keeps its Fisher weight: its error counts too.
- R is found by search rather than by hand.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.quantize.codebook import assign_codes, codebook_lookup, fit_codebook, fit_codebook_exact
from jquant.quantize.grid import round_to_storage

Matrices = Sequence[Any] | Callable[[], Iterable[Any]]

CANDIDATES = 256  # values of R tried in one pass over the matrices
TOLERANCE = 1e-6  # of the entries of the model: 1e-4 percentage points


class Split(NamedTuple):
    """Disjoint masks [N, K] of the entries set aside; `mask` is their union."""

    sensitive: jax.Array
    outliers: jax.Array

    @property
    def mask(self) -> jax.Array:
        return self.sensitive | self.outliers


class SqueezeLLMReport(NamedTuple):
    """What a fit achieved with its residual: sum f (w - w_hat)**2 / sum f w**2, and the same with f = 1."""

    weighted_error: float
    relative_error: float
    kept: int  # entries in the residual
    reason: str | None  # why the Fisher was not used, or None


def outlier_range(matrices: Matrices, fraction: float) -> float:
    """The multiplier R at which a share `fraction` of all entries satisfies |w| >= T(R).

    matrices: a sequence of arrays, or a function that returns a fresh iterator over them; it is walked three to six
    times, with one matrix in memory at a time. The share is met within 1e-6, or as nearly as equal magnitudes allow.
    fraction 0 gives infinity (no outliers). Raises ValueError for a fraction outside [0, 0.5) or no entries at all.
    """
    if not 0 <= fraction < 0.5:
        raise ValueError(f"outlier fraction {fraction} is not a share of the weights; expected 0 <= fraction < 0.5")
    if fraction == 0:
        return math.inf
    walk: Callable[[], Iterable[Any]] = matrices if callable(matrices) else lambda: matrices
    spreads, total = [], 0
    for W in walk():
        spreads.append(np.asarray(quartiles(jnp.asarray(W))))
        total += int(W.size)
    if total == 0:
        raise ValueError("no matrices to measure; expected at least one weight matrix with entries")
    target = fraction * total

    def outside(ranges: np.ndarray) -> np.ndarray:
        counts = np.zeros(len(ranges), np.int64)
        for W, (q1, q3) in zip(walk(), spreads, strict=True):
            limits = outlier_threshold(jnp.float32(q1), jnp.float32(q3), jnp.asarray(ranges, jnp.float32))
            counts += np.asarray(_count_outside(jnp.asarray(W), limits)).astype(np.int64)
        return counts

    low, high = 0.0, 32.0
    while True:
        ranges = np.linspace(low, high, CANDIDATES).astype(np.float32)
        counts = outside(ranges)
        best = int(np.argmin(np.abs(counts - target)))
        if abs(counts[best] - target) <= TOLERANCE * total:
            return float(ranges[best])
        if counts[-1] > target:
            if high > 1e9:  # the remaining outliers are so far out that no finite range would exclude them
                return float(ranges[best])
            low, high = high, high * CANDIDATES
            continue
        after = int(np.argmax(counts <= target))  # counts never increase with R
        adjacent = np.nextafter(ranges[after - 1], ranges[after]) == ranges[after]
        # A single entry, or equal magnitudes, between two values of R: the target itself is not attainable.
        if after == 0 or counts[after - 1] - counts[after] <= 1 or adjacent:
            return float(ranges[best])
        low, high = float(ranges[after - 1]), float(ranges[after])


@jax.jit
def quartiles(W: jax.Array) -> jax.Array:
    """[q1, q3] float32 of all entries of W, with linear interpolation between neighbours, as np.percentile.

    Found by bisection on the bits of the values: 32 counting passes, no sort and no copy.
    """
    word = jax.lax.bitcast_convert_type(W.astype(jnp.float32).reshape(-1), jnp.int32)
    key = jnp.where(word < 0, word ^ 0x7FFFFFFF, word)

    def kth(k: int) -> jax.Array:
        def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = bounds
            middle = (low >> 1) + (high >> 1) + (low & high & 1)
            enough = jnp.sum((key <= middle).astype(jnp.int32)) > k
            return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

        start = (jnp.int32(-(2**31)), jnp.int32(2**31 - 1))
        found = jax.lax.fori_loop(0, 32, halve, start)[1]
        above = jnp.min(jnp.where(key > found, key, 2**31 - 1))
        next_one = jnp.where(jnp.sum((key <= found).astype(jnp.int32)) > k + 1, found, above)
        pair = jnp.stack([found, next_one])
        return jax.lax.bitcast_convert_type(jnp.where(pair < 0, pair ^ 0x7FFFFFFF, pair), jnp.float32)

    def quantile(q: float) -> jax.Array:
        place = q * (key.size - 1)
        low, high = kth(math.floor(place))
        share = place - math.floor(place)
        return low if share == 0 else low + share * (high - low)

    return jnp.stack([quantile(0.25), quantile(0.75)])


def outlier_threshold(q1: jax.Array, q3: jax.Array, multiplier: Any) -> jax.Array:
    """T = max(|q1 - R iqr|, |q3 + R iqr|); infinity (no outliers) where iqr = 0: such a matrix shows no scale."""
    multiplier = jnp.asarray(multiplier, jnp.float32)
    iqr = q3 - q1
    # An infinite multiplier is left out of the product: inf * 0 would be NaN.
    reach = jnp.where(jnp.isfinite(multiplier), multiplier, 0.0) * iqr
    limit = jnp.maximum(jnp.abs(q1 - reach), jnp.abs(q3 + reach))
    return jnp.where(jnp.isfinite(multiplier) & (iqr > 0), limit, jnp.inf)


@partial(jax.jit, static_argnames=("sensitive_fraction",))
def split(W: jax.Array, fisher: jax.Array, sensitive_fraction: float = 0.0005, multiplier: Any = math.inf) -> Split:
    """Which entries of W [N, K] to set aside; fisher [N, K], multiplier = R of `outlier_range` (infinity: no outliers).

    Where any Fisher value is not finite nothing is sensitive. Raises ValueError for a fraction outside [0, 1).
    """
    if not 0 <= sensitive_fraction < 1:
        raise ValueError(f"sensitive fraction {sensitive_fraction} is not a share of the weights; expected 0 <= it < 1")
    W = W.astype(jnp.float32)
    count = round(sensitive_fraction * W.size)
    sensitive = jnp.zeros((W.size,), bool)
    if count:
        value, index = jax.lax.top_k(fisher.astype(jnp.float32).reshape(-1), count)
        sensitive = sensitive.at[index].set((value > 0) & jnp.all(jnp.isfinite(fisher)))
    sensitive = sensitive.reshape(W.shape)
    q1, q3 = quartiles(W)
    return Split(sensitive, (jnp.abs(W) >= outlier_threshold(q1, q3, multiplier)) & ~sensitive)


@partial(jax.jit, static_argnames=("bits", "codebook_dtype", "exact"))
def fit(
    W: jax.Array,
    fisher: jax.Array,
    bits: int,
    mask: jax.Array | None = None,
    codebook_dtype: Any = jnp.float32,
    exact: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(codebook [N, 2**bits] in codebook_dtype, codes [N, K] int32) of W [N, K] less the entries of mask [N, K] bool.

    Codes are computed against the codebook as rounded to `codebook_dtype`, so they are nearest in what will be stored.
    exact: tables by dynamic programming over every entry (`fit_codebook_exact`).
    A Fisher with a value that is not finite is ignored as a whole; a row whose Fisher sums to 0 is unweighted.
    """
    if mask is None:
        mask = jnp.zeros(W.shape, bool)
    weights = jnp.where(jnp.all(jnp.isfinite(fisher)), fisher.astype(jnp.float32), 1.0)
    # The all-zero rule is applied here, before masking: unweighted rows must not weigh what was set aside.
    weights = jnp.where(jnp.any((weights > 0) & ~mask, axis=1, keepdims=True), weights, 1.0)
    dense = jnp.where(mask, 0.0, W.astype(jnp.float32))
    search = fit_codebook_exact if exact else fit_codebook
    codebook, codes = search(dense, jnp.where(mask, 0.0, weights), bits)
    if codebook_dtype != jnp.float32:
        codebook = round_to_storage(codebook, codebook_dtype)
        codes = assign_codes(dense, codebook)
    return codebook.astype(codebook_dtype), codes


@jax.jit
def residual_values(W: jax.Array, codebook: jax.Array, codes: jax.Array, mask: jax.Array) -> jax.Array:
    """W - codebook[codes] on mask, 0 elsewhere, float32 [N, K]: what the sparse part stores."""
    return jnp.where(mask, W.astype(jnp.float32) - codebook_lookup(codebook, codes), 0.0)


def report(W: jax.Array, fisher: jax.Array, codebook: jax.Array, codes: jax.Array, mask: jax.Array) -> SqueezeLLMReport:
    """The `SqueezeLLMReport` of a finished fit; concrete arrays of the shapes above."""
    reason = unusable_fisher(fisher)
    weighted, plain = _relative_errors(W, jnp.ones_like(fisher) if reason else fisher, codebook, codes, mask)
    return SqueezeLLMReport(float(weighted), float(plain), int(jnp.sum(mask.astype(jnp.int32))), reason)


def unusable_fisher(fisher: jax.Array) -> str | None:
    """Why a concrete Fisher [N, K] cannot weight anything, or None."""
    if not bool(jnp.all(jnp.isfinite(fisher))):
        return "Fisher has values that are not finite; codebook is unweighted and nothing was kept as sensitive"
    if not bool(jnp.any(fisher > 0)):
        return "Fisher is zero everywhere; codebook is unweighted and nothing was kept as sensitive"
    return None


@jax.jit
def _relative_errors(W, fisher, codebook, codes, mask) -> tuple[jax.Array, jax.Array]:
    W, f = W.astype(jnp.float32), fisher.astype(jnp.float32)
    f = f / jnp.maximum(jnp.max(f), float(jnp.finfo(jnp.float32).tiny))
    size = jnp.max(jnp.abs(W))
    size = jnp.where(size > 0, size, 1.0)  # keeps the squares of huge and tiny weights inside float32
    W, error = W / size, jnp.where(mask, 0.0, W - codebook_lookup(codebook, codes)) / size

    def ratio(f: jax.Array) -> jax.Array:
        whole = jnp.sum(f * W * W)
        return jnp.where(whole > 0, jnp.sum(f * error * error) / jnp.where(whole > 0, whole, 1.0), 0.0)

    return ratio(f), ratio(jnp.ones_like(f))


@jax.jit
def _count_outside(W: jax.Array, limits: jax.Array) -> jax.Array:
    """How many |w| >= each of `limits` [C] (ascending): int32 [C], from one histogram."""
    place = jnp.searchsorted(limits, jnp.abs(W.astype(jnp.float32)).reshape(-1), side="right", method="scan")
    counts = jnp.zeros((limits.size + 1,), jnp.int32).at[place].add(1)
    return jnp.cumsum(counts[::-1])[::-1][1:]
