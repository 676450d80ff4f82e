"""Activation quantizers: what a layer does to its inputs, token by token, while it runs.

x [M, K]: M tokens, K inputs of one layer. Every token has its own scale; nothing is shared between tokens but a table.

Integers (codebook None), codes q in [-h, h - 1] with h = 2**(bits - 1), rounding half to even; QUIK, arXiv 2310.09259:

    asymmetric, "kernel"      s = max((max - min) / (2**bits - 1), 1e-6)     q = round((x - min) / s) - h
                              the range need not contain 0                   x_hat = s q + (min + h s)
    asymmetric, "simulation"  range widened to 0, zp = round(-min / s)       q = clip(round(x / s) + zp, 0, 2h - 1) - h
                                                                             x_hat = s q + s (h - zp)
    symmetric (either mode)   s = max|x| / (h - 1)                           q = clip(round(x / s), -h, h - 1)
                                                                             x_hat = s q
    "kernel" is what QUIK's GPU kernels compute, "simulation" what its published perplexities were measured with.

Table (codebook [2**bits], ascending; KLLM, arXiv 2507.23035):

    s = mean_k |x_k|      q = entry nearest to x / s, ties to the lower      x_hat = s codebook[q]

Kept entries are exact, and integer ranges are taken over the others. The table's scale is taken over all of them:
so an implementation can start quantizing before it knows what is kept.

    dynamic   the k largest and the k smallest signed values of each token, k = ceil(outlier_percent / 100 * K);
              among equals the lower index, as `jax.lax.top_k`. From 2 k >= K on, everything is kept
    static    thresholds [low, high]: what lies outside in units of the token's mean |x|, however many that are

Tokens of zeros give zeros. A token with a value that is not finite becomes NaN as a whole, other tokens do not notice.
Arithmetic is float32 whatever the type of x.
"""

import dataclasses
import functools
import math
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import topk_outliers
from pallas_kernels.device import no_hopper

Mode = Literal["kernel", "simulation"]

SMALLEST_SCALE = 1e-6  # of the "kernel" mode
BLOCK = 16  # boundaries compared in one fused pass
_TINY = float(jnp.finfo(jnp.float32).tiny)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codebook", "thresholds"],
    meta_fields=["bits", "symmetric", "mode", "outlier_percent"],
)
@dataclasses.dataclass(frozen=True)
class ActivationQuant:
    """How the inputs of a layer are quantized. Fields marked § are static: part of the tree's structure.

    codebook: [2**bits] ascending, in units of a token's mean |x|; None means integers.
    thresholds: float32 [2], low and high in the same units: entries outside are kept; None chooses them in each token.
    symmetric, mode: of integers only.
    outlier_percent: of a token's entries kept at either end when there are no thresholds; 0 keeps none.
    """

    codebook: jax.Array | None
    thresholds: jax.Array | None
    bits: int  # § 2 to 8
    symmetric: bool = False  # §
    mode: Mode = "kernel"  # §
    outlier_percent: float = 0.0  # §


class Tokens(NamedTuple):
    """Integer tokens: x_hat = scales * codes + offsets. codes int8 [M, K]; scales, offsets float32 [M, 1]."""

    codes: jax.Array
    scales: jax.Array
    offsets: jax.Array | None  # None when symmetric


@jax.jit
def fake_quantize(x: jax.Array, a: ActivationQuant) -> jax.Array:
    """x_hat [M, K] float32, the specification of every product with quantized inputs: exact where kept."""
    x = x.astype(jnp.float32)
    keep = keep_mask(x, a) if _keeps(a) else None
    if a.codebook is None:
        value = dequantize_tokens(_integer_tokens(x, a, keep))
    else:
        z, scales = normalize_tokens(x)
        codebook = a.codebook.astype(jnp.float32)
        value = scales * pick_nearest(z, codebook, codebook)
    return value if keep is None else jnp.where(keep, x, value)


@jax.jit
def quantize_tokens(x: jax.Array, a: ActivationQuant) -> Tokens:
    """Integer codes of x [M, K] with their scales and offsets; a kept entry gets the code nearest to it.

    Raises ValueError if `a` has a table: its codes are no integers to calculate with, see `assign_tokens`.
    """
    if a.codebook is not None:
        raise ValueError("activations with a codebook have no integer form; use assign_tokens or fake_quantize")
    x = x.astype(jnp.float32)
    return _integer_tokens(x, a, keep_mask(x, a) if _keeps(a) else None)


def dequantize_tokens(tokens: Tokens) -> jax.Array:
    """scales * codes + offsets, float32 [M, K]."""
    value = tokens.scales * tokens.codes.astype(jnp.float32)
    return value if tokens.offsets is None else value + tokens.offsets


@jax.jit
def assign_tokens(x: jax.Array, a: ActivationQuant) -> tuple[jax.Array, jax.Array]:
    """(codes uint8 [M, K] into a.codebook, scales float32 [M, 1]), for all entries, kept ones included.

    A token of zeros has scale 0, one with a value that is not finite has scale NaN. Raises ValueError without a table.
    """
    if a.codebook is None:
        raise ValueError("integer activations have no codebook to assign to; use quantize_tokens")
    z, scales = normalize_tokens(x)
    return pick_nearest(z, a.codebook, jnp.arange(a.codebook.shape[0], dtype=jnp.uint8)), scales


def pick_nearest(z: jax.Array, codebook: jax.Array, entries: jax.Array) -> jax.Array:
    """entries[i] where codebook[i] (ascending, [C]) is nearest to z, ties to the lower: z's shape, entries' type [C].

    With `entries` the codebook itself this rounds z to it; with 0 ... C - 1 it gives codes.
    """
    boundaries = 0.5 * codebook[:-1].astype(jnp.float32) + 0.5 * codebook[1:].astype(jnp.float32)
    # Compared in blocks: XLA fuses 16 at a time into one pass over z, never writes [..., C], and gathers nothing.
    pad = (0, -boundaries.shape[0] % BLOCK)
    boundaries, above = jnp.pad(boundaries, pad, constant_values=jnp.inf), jnp.pad(entries[1:], pad)

    def compare(block: jax.Array, picked: jax.Array) -> jax.Array:
        for i in range(BLOCK):
            place = block * BLOCK + i
            picked = jnp.where(z > boundaries[place], above[place], picked)
        return picked

    return jax.lax.fori_loop(0, boundaries.shape[0] // BLOCK, compare, jnp.broadcast_to(entries[0], z.shape))


@jax.jit
def keep_mask(x: jax.Array, a: ActivationQuant) -> jax.Array:
    """Which entries of x [M, K] stay exact, bool [M, K]; nothing in a token with a value that is not finite."""
    if a.thresholds is None:
        keep = outlier_mask(x, a.outlier_percent)
    else:
        z, _ = normalize_tokens(x)
        low, high = a.thresholds.astype(jnp.float32)
        keep = (z < low) | (z > high)
    return keep & jnp.all(jnp.isfinite(x), axis=1, keepdims=True)


def outlier_mask(x: jax.Array, percent: float) -> jax.Array:
    """The ceil(percent / 100 * K) largest and as many smallest values of each token of x [M, K], bool [M, K].

    A token whose values are nearly all equal may keep fewer than 2 k: the lower index wins at both ends.
    """
    tokens, columns = x.shape
    count = keep_count(percent, columns)
    if count == 0:
        return jnp.zeros(x.shape, bool)
    if 2 * count >= columns:
        return jnp.ones(x.shape, bool)
    if no_hopper() is None and topk_outliers.supported(tokens, columns, x.dtype) is None:
        # sorting a token is what a GPU does worst; a mask has no gradient to lose
        return topk_outliers.mask_rows(jax.lax.stop_gradient(x), count).astype(bool)
    return mask_by_sorting(x, count)


def mask_by_sorting(x: jax.Array, count: int) -> jax.Array:
    """The `count` largest and `count` smallest values of each token of x [M, K], bool [M, K]; 0 < 2 count < K."""
    x = x.astype(jnp.float32)
    x = jnp.where(x == 0, 0.0, x)  # top_k tells -0 from 0
    row = jnp.arange(x.shape[0])[:, None]
    mask = jnp.zeros(x.shape, bool)
    for side in (x, -x):
        mask = mask.at[row, jax.lax.top_k(side, count)[1]].set(True)
    return mask


def keep_count(percent: float, columns: int) -> int:
    """ceil(percent / 100 * columns), exactly: 1.1 % of 1000 is 11 although 0.011 * 1000 > 11 in floating point."""
    if not 0.0 <= percent <= 50.0:
        raise ValueError(f"{percent} % of a token's entries kept at either end; expected 0 <= percent <= 50")
    return math.ceil(Fraction(str(float(percent))) * columns / 100)


def normalize_tokens(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x / s float32 [M, K], s = mean_k |x_k| float32 [M, 1]); zeros and s = 0 for a token of zeros.

    A token with a value that is not finite has s = NaN.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    safe = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    # Relative to the largest, so that a sum of huge values stays inside float32.
    scales = safe * jnp.mean(jnp.abs(x) / safe, axis=1, keepdims=True)
    scales = jnp.where(largest > 0, jnp.maximum(scales, _TINY), 0.0)
    scales = _or_nan(jnp.isfinite(largest), scales)
    return x / jnp.where(scales == 0, 1.0, scales), scales


def validate_activation(a: ActivationQuant, path: str) -> None:
    """Checks the static fields and the arrays' shapes and types; ValueError names the field and the path."""
    if not 2 <= a.bits <= 8:
        raise ValueError(f"{path}: activation.bits is {a.bits}; expected 2 to 8")
    if a.mode not in ("kernel", "simulation"):
        raise ValueError(f"{path}: activation.mode is {a.mode!r}; expected 'kernel' or 'simulation'")
    if not 0.0 <= a.outlier_percent <= 50.0:
        raise ValueError(f"{path}: activation.outlier_percent is {a.outlier_percent}; expected 0 to 50")
    _check_array(path, "codebook", a.codebook, 2**a.bits)
    _check_array(path, "thresholds", a.thresholds, 2)


def _check_array(path: str, name: str, array: Any, size: int) -> None:
    if array is None:
        return
    if tuple(array.shape) != (size,):
        raise ValueError(f"{path}: activation.{name} has shape {tuple(array.shape)}; expected {(size,)}")
    if str(array.dtype) not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"{path}: activation.{name} is {array.dtype}; expected float32, float16 or bfloat16")


def _keeps(a: ActivationQuant) -> bool:
    return a.thresholds is not None or a.outlier_percent > 0


def _integer_tokens(x: jax.Array, a: ActivationQuant, keep: jax.Array | None) -> Tokens:
    if not 2 <= a.bits <= 8:
        raise ValueError(f"activations of {a.bits} bits have no int8 codes; expected 2 to 8 bits")
    if a.mode not in ("kernel", "simulation"):
        raise ValueError(f"activation mode is {a.mode!r}; expected 'kernel' or 'simulation'")
    low, high, finite = _ranges(x, keep)
    half, steps = 2 ** (a.bits - 1), 2**a.bits - 1
    # By a divisor that it knows XLA would multiply with the rounded reciprocal.
    divisor = jnp.where(finite, jnp.float32(half - 1 if a.symmetric else steps), 1.0)
    offsets = None
    if a.symmetric:
        scales = _positive(jnp.maximum(-low, high) / divisor)
        codes = jnp.clip(jnp.round(x / scales), -half, half - 1)
    elif a.mode == "kernel":
        scales = jnp.maximum(_spacing(low, high, divisor), SMALLEST_SCALE)
        codes = jnp.clip(jnp.round((x - low) / scales), 0, steps) - half
        offsets = low + half * scales
    else:
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        scales = _positive(_spacing(low, high, divisor))
        zeros = jnp.clip(jnp.round(-low / scales), 0, steps)
        codes = jnp.clip(jnp.round(x / scales) + zeros, 0, steps) - half
        offsets = scales * (half - zeros)
    codes = jnp.where(finite, codes, 0.0).astype(jnp.int8)
    return Tokens(codes, _or_nan(finite, scales), None if offsets is None else _or_nan(finite, offsets))


def _ranges(x: jax.Array, keep: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(least, largest, whether all of it is finite) of each token [M, 1]; of the entries that are not kept."""
    finite = jnp.all(jnp.isfinite(x), axis=1, keepdims=True)
    low = high = x
    if keep is not None:
        low, high = jnp.where(keep, jnp.inf, x), jnp.where(keep, -jnp.inf, x)
    low, high = jnp.min(low, axis=1, keepdims=True), jnp.max(high, axis=1, keepdims=True)
    # Of no entries at all, or of a token that becomes NaN anyway, any range will do.
    usable = finite & (low <= high)
    return jnp.where(usable, low, 0.0), jnp.where(usable, high, 0.0), finite


def _spacing(low: jax.Array, high: jax.Array, steps: jax.Array) -> jax.Array:
    """(high - low) / steps, also where the difference leaves float32."""
    whole = high - low
    return jnp.where(jnp.isfinite(whole), whole / steps, high / steps - low / steps)


def _positive(scales: jax.Array) -> jax.Array:
    return jnp.where(scales == 0, 1.0, jnp.maximum(scales, _TINY))


def _or_nan(finite: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.where(finite, value, jnp.nan)
