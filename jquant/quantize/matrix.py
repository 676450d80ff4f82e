"""One matrix: W [N, K], a statistic and a spec in; a packed weight and a report out.

    method       statistic            grid        what is minimised
    rtn          none                 affine      each weight's own rounding error
    gptq         Hessian [K, K]       affine      trace((W - Q) H (W - Q)^T)
    squeezellm   Fisher [N, K]        codebook    sum f (w - q)^2 outside the entries kept exactly

The passes work on plain arrays; packing happens here and nowhere else.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.format.spec import QuantSpec
from jquant.format.weights import (
    QuantizedLinear,
    affine_weight,
    bits_per_weight,
    codebook_weight,
    dequantize,
    size_bytes,
    sparse_residual,
)
from jquant.quantize.grid import choose_scale_dtype, storage_dtype
from jquant.quantize.passes import gptq, rtn, squeezellm

METHODS = ("rtn", "gptq", "squeezellm")
STATISTIC = {"rtn": None, "gptq": "hessian", "squeezellm": "fisher"}
SENSITIVE_PERCENT = 0.05  # of all entries, kept for their Fisher value; the rest of `sparse` are outliers
DAMPING = 0.01


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What happened to one layer. Errors are relative: |W - Q|^2 / |W|^2, plain and in the method's own measure."""

    path: str
    spec: str
    method: str
    bits_per_weight: float
    size_bytes: int
    weight_error: float
    objective_error: float
    kept: int = 0
    damping: float | None = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_spec(spec: QuantSpec, method: str) -> None:
    """ValueError for a combination that makes no sense, saying what the method takes."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    if method == "squeezellm" and spec.grid != "codebook":
        raise ValueError(f"method squeezellm fits codebooks; spec {spec} has none: write w{spec.bits}-codebook")
    if method != "squeezellm" and spec.grid == "codebook":
        raise ValueError(f"method {method} rounds to affine grids; spec {spec} asks for a codebook: use squeezellm")
    if method != "squeezellm" and spec.sparse:
        raise ValueError(f"method {method} keeps no sparse entries; leave out +s{spec.sparse:g}% or use squeezellm")
    if spec.outliers:
        raise ValueError(f"method {method} keeps no outlier columns; leave out +o{spec.outliers}")


def default_method(spec: QuantSpec, statistic: str | None) -> str:
    """The method that a spec and the statistic at hand ask for."""
    if spec.grid == "codebook":
        return "squeezellm"
    return "gptq" if statistic == "hessian" else "rtn"


def quantize_array(
    kernel: jax.Array | np.ndarray,
    spec: QuantSpec | str,
    hessian: jax.Array | None = None,
    fisher: jax.Array | None = None,
    *,
    outlier_range: float | None = None,
    path: str = "weight",
) -> tuple[QuantizedLinear, LayerReport]:
    """Quantizes one matrix W [N, K], out features first, for use with `jquant.linear`.

    hessian [K, K] = mean of x x^T over inputs x makes it GPTQ; a codebook spec makes it SqueezeLLM, weighted by
    fisher [N, K] if given; otherwise it rounds to nearest. outlier_range is SqueezeLLM's multiplier of the
    interquartile range; None finds the one that meets `spec.sparse` on this matrix alone.
    Raises ValueError for shapes that disagree or values that are not finite.
    """
    spec = QuantSpec.parse(spec) if isinstance(spec, str) else spec
    method = default_method(spec, None if hessian is None else "hessian")
    check_spec(spec, method)
    W = jnp.asarray(kernel).astype(jnp.float32)
    if W.ndim != 2 or not W.size:
        raise ValueError(f"{path} has shape {W.shape}; expected a matrix [out features, in features]")
    if not bool(jnp.all(jnp.isfinite(W))):
        raise ValueError(f"{path} has values that are not finite; nothing sensible can be stored for them")
    if method == "squeezellm":
        return _squeezellm(W, jnp.ones_like(W) if fisher is None else fisher, spec, outlier_range, path)
    statistic = None if hessian is None else jnp.asarray(hessian)
    if statistic is not None and statistic.shape != (W.shape[1], W.shape[1]):
        raise ValueError(
            f"{path} has {W.shape[1]} inputs; expected a square Hessian of that size, got {statistic.shape}"
        )
    return _affine(W, statistic, spec, path)


def quantize_siblings(
    kernels: dict[str, jax.Array], spec: QuantSpec, hessian: jax.Array
) -> dict[str, tuple[QuantizedLinear, LayerReport]]:
    """GPTQ of layers that multiply one and the same input: {path: W [N_i, K]} with their common Hessian.

    Rows are independent given H, so the matrices are stacked into one problem and share one factorization; the codes
    are those of each matrix alone. Groups along the output would cross the seams, so those are done one by one.
    """
    if spec.group_axis == "out" or len(kernels) == 1:
        return {path: _affine(W.astype(jnp.float32), hessian, spec, path) for path, W in kernels.items()}
    stacked = jnp.concatenate([W.astype(jnp.float32) for W in kernels.values()])
    codes, grid, outcome = _gptq(stacked, hessian, spec)
    result, start = {}, 0
    for path, W in kernels.items():
        rows = slice(start, start + W.shape[0])
        start = rows.stop
        zeros = None if grid.zeros is None else grid.zeros[rows]
        weight = affine_weight(codes[rows], grid.scales[rows], zeros, spec.bits, spec.group_size, spec.group_axis)
        result[path] = _finish(W.astype(jnp.float32), QuantizedLinear(weight), spec, path, hessian, outcome)
    return result


def _affine(W: jax.Array, hessian: jax.Array | None, spec: QuantSpec, path: str) -> tuple[QuantizedLinear, LayerReport]:
    if hessian is None:
        dtype = choose_scale_dtype(W, spec.bits, spec.group_size, spec.symmetric, spec.group_axis)
        codes, grid = rtn.rtn(W, spec.bits, spec.group_size, spec.symmetric, spec.group_axis, scale_dtype=dtype)
        outcome = None
    else:
        codes, grid, outcome = _gptq(W, hessian, spec)
    weight = affine_weight(codes, grid.scales, grid.zeros, spec.bits, spec.group_size, spec.group_axis)
    return _finish(W, QuantizedLinear(weight), spec, path, hessian, outcome)


def _gptq(W: jax.Array, hessian: jax.Array, spec: QuantSpec) -> Any:
    return gptq.gptq_or_rtn(
        W,
        hessian,
        spec.bits,
        damping=DAMPING,
        group_size=spec.group_size,
        symmetric=spec.symmetric,
        group_axis=spec.group_axis,
        scale_dtype=choose_scale_dtype(W, spec.bits, spec.group_size, spec.symmetric, spec.group_axis),
    )


def _finish(
    W: jax.Array,
    quantized: QuantizedLinear,
    spec: QuantSpec,
    path: str,
    hessian: jax.Array | None,
    outcome: gptq.GPTQReport | None,
) -> tuple[QuantizedLinear, LayerReport]:
    plain, objective = _errors(W, quantized, hessian)
    note = None
    if outcome is not None:
        notes = [f"rounded to nearest: {outcome.fallback}"] if outcome.fallback else []
        if outcome.dead_columns:
            notes.append(f"{outcome.dead_columns} inputs were never seen")
        note = "; ".join(notes) or None
    report = LayerReport(
        path=path,
        spec=str(spec),
        method="rtn" if outcome is None or outcome.fallback else "gptq",
        bits_per_weight=bits_per_weight(quantized),
        size_bytes=size_bytes(quantized),
        weight_error=float(plain),
        objective_error=float(objective),
        damping=None if outcome is None else outcome.damping,
        note=note,
    )
    return quantized, report


@jax.jit
def _errors(W: jax.Array, quantized: QuantizedLinear, hessian: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    def ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
        return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.0), 0.0)

    E = W - dequantize(quantized)
    plain = ratio(jnp.sum(E * E), jnp.sum(W * W))
    if hessian is None:
        return plain, plain
    H = jnp.where(jnp.isfinite(hessian), hessian, 0.0)

    def energy(A: jax.Array) -> jax.Array:
        return jnp.sum(jnp.matmul(A, H, precision="highest") * A)

    return plain, ratio(energy(E), energy(W))


def _squeezellm(
    W: jax.Array, fisher: jax.Array, spec: QuantSpec, outlier_range: float | None, path: str
) -> tuple[QuantizedLinear, LayerReport]:
    fisher = jnp.asarray(fisher).astype(jnp.float32)
    if fisher.shape != W.shape:
        raise ValueError(f"{path} is {W.shape}; expected a Fisher of that shape, got {fisher.shape}")
    sensitive, outliers = sparse_shares(spec)
    if outlier_range is None:
        outlier_range = squeezellm.outlier_range([W], outliers)
    parts = squeezellm.split(W, fisher, sensitive, jnp.float32(outlier_range)) if spec.sparse else None
    mask = jnp.zeros(W.shape, bool) if parts is None else parts.mask
    table_dtype = _codebook_dtype(W)
    codebook, codes = squeezellm.fit(W, fisher, spec.bits, mask, codebook_dtype=table_dtype)
    residual = None
    if spec.sparse:
        residual = sparse_residual(mask, squeezellm.residual_values(W, codebook, codes, mask))
    quantized = QuantizedLinear(codebook_weight(codes, codebook, spec.bits), residual=residual)
    outcome = squeezellm.report(W, fisher, codebook, codes, mask)
    report = LayerReport(
        path=path,
        spec=str(spec),
        method="squeezellm",
        bits_per_weight=bits_per_weight(quantized),
        size_bytes=size_bytes(quantized),
        weight_error=outcome.relative_error,
        objective_error=outcome.weighted_error,
        kept=outcome.kept,
        note=outcome.reason,
    )
    return quantized, report


def sparse_shares(spec: QuantSpec) -> tuple[float, float]:
    """The shares (0..1) of all entries kept for their Fisher value and for their magnitude; they add to `sparse`."""
    sensitive = min(SENSITIVE_PERCENT, spec.sparse)
    return sensitive / 100, (spec.sparse - sensitive) / 100


def _codebook_dtype(W: jax.Array) -> Any:
    """float16 unless the matrix's range leaves its normal range. Entries near 0 may be subnormal: their absolute
    error, 3e-8, is nothing beside the spacing of a table whose largest entry is normal by a factor of 64."""
    largest = float(jnp.max(jnp.abs(W)))
    if largest == 0 or (
        storage_dtype(np.float32(largest)) == np.float16 and largest > 64 * 6.1e-5 and math.isfinite(largest)
    ):
        return jnp.float16
    return jnp.float32
