"""Layers with affine grids: rounding, GPTQ and QUIK on the matrices that multiply one input, packed.

Rows are independent given the input's Hessian, so matrices with a common input are stacked into one problem and share
one factorization; the codes are those of each matrix alone. Groups along the output would cross the seams, so those
are done one by one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jquant.format.semistructured import pack_semistructured
from jquant.format.spec import QuantSpec
from jquant.format.weights import OutlierColumns, QuantizedLinear, affine_weight
from jquant.quantize.grid import choose_scale_dtype, half_if_it_fits, round_to_storage
from jquant.quantize.matrix.report import Layer, describe_layer
from jquant.quantize.passes import gptq, quik, rtn
from jquant.quantize.two_level import choose_two_level_dtype

DAMPING = 0.01

Matrices = Mapping[str, jax.Array]  # {path: W [N, K] float32}


def rounded_layers(
    kernels: Matrices, spec: QuantSpec, clip_search: bool = False, hessian: jax.Array | None = None
) -> dict[str, Layer]:
    """Round to nearest, each matrix by itself; a Hessian [K, K] only measures the error."""
    layers = {}
    for path, W in kernels.items():
        codes, grid = rtn.rtn(W, **_grid(spec), clip_search=clip_search, scale_dtype=_scale_dtype(W, spec))
        weight = affine_weight(codes, grid.scales, grid.zeros, spec.bits, spec.group_size, spec.group_axis)
        layers[path] = describe_layer(path, spec, "rtn", W, QuantizedLinear(weight), hessian=hessian)
    return layers


def gptq_layers(kernels: Matrices, spec: QuantSpec, hessian: jax.Array, clip_search: bool = False) -> dict[str, Layer]:
    """GPTQ with the Hessian [K, K] of the common input."""
    if spec.group_axis == "out" and len(kernels) > 1:
        alone = ({path: W} for path, W in kernels.items())
        return {path: layer for one in alone for path, layer in gptq_layers(one, spec, hessian, clip_search).items()}
    stacked = jnp.concatenate(list(kernels.values()))
    codes, grid, outcome = gptq.gptq_or_rtn(
        stacked,
        hessian,
        damping=DAMPING,
        clip_search=clip_search,
        scale_dtype=_scale_dtype(stacked, spec),
        **_grid(spec),
    )
    layers = {}
    for path, rows in _rows(kernels).items():
        # Scales along the output belong to one matrix only, which is then all there is.
        own = grid if spec.group_axis == "out" else jax.tree.map(lambda a, rows=rows: a[rows], grid)
        weight = affine_weight(codes[rows], own.scales, own.zeros, spec.bits, spec.group_size, spec.group_axis)
        layers[path] = describe_layer(
            path,
            spec,
            "rtn" if outcome.fallback else "gptq",
            kernels[path],
            QuantizedLinear(weight),
            hessian=hessian,
            damping=outcome.damping,
            notes=_notes(outcome),
        )
    return layers


def quik_layers(
    kernels: Matrices,
    spec: QuantSpec,
    hessian: jax.Array,
    amax: jax.Array,
    threshold: float = 0.0,
    act_order: bool = False,
) -> dict[str, Layer]:
    """QUIK with the Hessian [K, K] and the largest absolute values [K] of the common input.

    threshold: layers whose inputs stay below it keep no columns (the zero-outlier rule); their spec says so.
    act_order: columns by falling diag H instead of by rising range.
    """
    count = quik.outlier_count(amax, len(amax), spec.outliers, threshold=threshold)
    if count < spec.outliers:
        spec = dataclasses.replace(spec, outliers=count)
    index = quik.outlier_columns(amax, count)
    stacked = jnp.concatenate(list(kernels.values()))
    result, outcome = quik.quik_or_rtn(
        stacked,
        hessian,
        amax,
        spec.bits,
        index,
        damping=DAMPING,
        order="act_order" if act_order else "ascending",
        sparsity=(2, 4) if spec.semistructured else None,
    )
    dtype = half_if_it_fits(result.weight)
    layers = {}
    for path, rows in _rows(kernels).items():
        codes, scales = result.codes[rows], result.scales[rows]
        if spec.semistructured:
            assert result.mask is not None and result.order is not None
            weight = pack_semistructured(codes, result.mask[rows], scales, spec.bits, result.order)
        else:
            weight = affine_weight(codes, scales, None, spec.bits, None, "in")
        kept = None
        if count:
            kept = OutlierColumns(index, round_to_storage(result.weight[rows], dtype).astype(dtype))
        layers[path] = describe_layer(
            path,
            spec,
            "rtn" if outcome.fallback else "quik",
            kernels[path],
            QuantizedLinear(weight, outliers=kept),
            hessian=hessian,
            kept=count * len(codes),
            damping=outcome.damping,
            notes=_notes(outcome),
        )
    return layers


def _grid(spec: QuantSpec) -> dict[str, Any]:
    return {
        "bits": spec.bits,
        "group_size": spec.group_size,
        "symmetric": spec.symmetric,
        "group_axis": spec.group_axis,
        "two_level": spec.two_level,
    }


def _scale_dtype(W: jax.Array, spec: QuantSpec) -> Any:
    if spec.two_level:
        assert spec.group_size is not None
        return choose_two_level_dtype(W, spec.bits, spec.group_size)
    return choose_scale_dtype(W, spec.bits, spec.group_size, spec.symmetric, spec.group_axis)


def _rows(kernels: Matrices) -> dict[str, slice]:
    """Where each matrix lies in the stack."""
    rows, start = {}, 0
    for path, W in kernels.items():
        rows[path] = slice(start, start + W.shape[0])
        start += W.shape[0]
    return rows


def _notes(outcome: Any) -> tuple[str | None, ...]:
    """What a fallback or unseen inputs deserve to be said of."""
    fallback = f"rounded to nearest: {outcome.fallback}" if outcome.fallback else None
    return fallback, f"{outcome.dead_columns} inputs were never seen" if outcome.dead_columns else None
