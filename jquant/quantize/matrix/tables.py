"""Layers with codebooks: SqueezeLLM, KLLM and LNQ on one matrix, packed; and the tables of quantized activations."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jquant.format.activations import ActivationQuant
from jquant.format.spec import ActivationSpec, QuantSpec
from jquant.format.weights import (
    CodebookWeight,
    QuantizedLinear,
    codebook_weight,
    entries,
    padded,
    sparse_residual,
    unpack,
)
from jquant.quantize.calibrate.histogram import HistogramStats, activation_codebook, unusable_histogram
from jquant.quantize.grid import half_if_it_fits, storage_dtype
from jquant.quantize.matrix.report import Layer, describe_layer
from jquant.quantize.passes import int8_tables, kllm, lnq, nested, squeezellm

SENSITIVE_PERCENT = 0.05  # of all entries, kept for their Fisher value; the rest of `sparse` are outliers


def squeezellm_layer(
    path: str,
    W: jax.Array,
    fisher: jax.Array | None,
    spec: QuantSpec,
    outlier_range: float | None,
    exact: bool = False,
) -> Layer:
    """A table a row weighted by the Fisher [N, K] (None: unweighted), and the sparse part that the spec asks for.

    Tables of floats, whatever the spec says of int8: `snapped_layer` is what follows.
    outlier_range: R of the whole model; None is that of this matrix. exact: tables by dynamic programming over every
    entry.
    """
    weights = jnp.ones_like(W) if fisher is None else fisher.astype(jnp.float32)
    if weights.shape != W.shape:
        raise ValueError(f"{path} is {W.shape}; expected a Fisher of that shape, got {weights.shape}")
    sensitive, outliers = sparse_shares(spec)
    if outlier_range is None:
        outlier_range = squeezellm.outlier_range([W], outliers)
    parts = squeezellm.split(W, weights, sensitive, jnp.float32(outlier_range)) if spec.sparse else None
    mask = None if parts is None else parts.mask
    dtype = half_if_it_fits(W)
    seed_bits = spec.nested_from or spec.bits
    codebook, codes = squeezellm.fit(W, weights, seed_bits, mask, codebook_dtype=dtype, exact=exact)
    unusable = None if fisher is None else squeezellm.unusable_fisher(weights)
    if spec.nested_from is None:
        quantized = _packed(W, codebook, codes, mask, spec)
    else:
        nest = nested.nest(W, jnp.ones_like(W) if unusable else weights, codebook, codes, spec.bits, dtype)
        narrower = jnp.concatenate([nest.codebooks[b] for b in range(seed_bits, spec.bits)], axis=1)
        base = codebook_weight(nest.codes, nest.codebooks[spec.bits].astype(dtype), spec.bits)
        quantized = QuantizedLinear(dataclasses.replace(base, nested=narrower.astype(dtype)))
    kept = 0 if quantized.residual is None else int(quantized.residual.values.size)
    measure = None if unusable else weights
    return describe_layer(
        path, spec, "squeezellm", W, quantized, fisher=measure, exact=mask, kept=kept, notes=(unusable,)
    )


def refine_table(start: Layer, W: jax.Array, spec: QuantSpec, hessian: jax.Array) -> Layer:
    """LNQ from a layer of `squeezellm_layer`, for the Hessian [K, K]; entries kept sparse stay as they are."""
    packed, report = start
    base = packed.weight
    assert isinstance(base, CodebookWeight)
    codes = unpack(base)
    mask = None if packed.residual is None else entries(padded(packed.residual))
    dtype = base.codebook.dtype
    result = lnq.lnq(W, hessian, base.codebook.astype(jnp.float32), codes, mask=mask, codebook_dtype=dtype)
    notes = (report.note, None if bool(result.ok) else "not refined: the Hessian is zero or not finite")
    quantized = _packed(W, result.codebook.astype(dtype), result.codes, mask, spec)
    method = "lnq" if bool(result.ok) else report.method
    layer = describe_layer(
        report.path, spec, method, W, quantized, hessian=hessian, exact=mask, kept=report.kept, notes=notes
    )
    return snapped_layer(layer, W, spec, hessian=hessian) if spec.int8_table else layer


def snapped_layer(
    layer: Layer, W: jax.Array, spec: QuantSpec, fisher: jax.Array | None = None, hessian: jax.Array | None = None
) -> Layer:
    """The layer with its table, or tables, snapped to int8; the report keeps the error from before.

    Codes are chosen anew: the nearest with a Fisher [N, K] or nothing, those of LNQ's codes step with a Hessian [K, K],
    which can gain more than snapping costs, since LNQ ends with a step of its tables.
    Entries kept sparse stay exact: the residual is that of the new base.
    """
    packed, report = layer
    base = packed.weight
    assert isinstance(base, CodebookWeight)
    if fisher is not None and squeezellm.unusable_fisher(fisher):
        fisher = None
    codes, mask = unpack(base), None if packed.residual is None else entries(padded(packed.residual))
    weights = jnp.ones_like(W) if fisher is None else fisher.astype(jnp.float32)
    if hessian is not None:
        weights = jnp.broadcast_to(jnp.diagonal(hessian)[None], W.shape)
    if base.scales is not None:
        table, scales, codes = int8_tables.snap_matrix(W, weights, base.codebook, codes, base.scales)
    else:
        dtype = int8_tables.scale_dtype(base.codebook)
        table, scales, nearest = int8_tables.snap_rows(W, weights, base.codebook, codes, mask, dtype)
        held = None
        if hessian is not None:
            held = lnq.choose_codes(W, hessian, int8_tables.dense_tables(table, scales), codes, mask=mask)
        codes = held.codes if held is not None and bool(held.ok) else nearest
    quantized = _packed(W, table, codes, mask, spec, scales)
    return describe_layer(
        report.path,
        spec,
        report.method,
        W,
        quantized,
        hessian=hessian,
        fisher=fisher,
        exact=mask,
        kept=report.kept,
        notes=(report.note,),
        float_table_error=report.objective_error,
    )


def _packed(
    W: jax.Array,
    codebook: jax.Array,
    codes: jax.Array,
    mask: jax.Array | None,
    spec: QuantSpec,
    scales: jax.Array | None = None,
) -> QuantizedLinear:
    residual = None
    if mask is not None:
        dense = codebook if scales is None else int8_tables.dense_tables(codebook, scales)
        values = squeezellm.residual_values(W, dense, codes, mask)
        residual = sparse_residual(mask, values, half_if_it_fits(values))
    return QuantizedLinear(codebook_weight(codes, codebook, spec.bits, scales), residual=residual)


def kllm_layer(path: str, W: jax.Array, fisher: jax.Array | None, spec: QuantSpec, row_scale: kllm.RowScale) -> Layer:
    """One table for the matrix and a scale a row; of floats, as in `squeezellm_layer`."""
    rms = jnp.sqrt(jnp.mean(jnp.square(W), axis=1))
    codebook, codes, scales = kllm.kllm(
        W,
        spec.bits,
        fisher,
        table="matrix",
        row_scale=row_scale,
        codebook_dtype=jnp.float16,  # in units of the rows' scales
        scale_dtype=storage_dtype(rms),
    )
    unusable = kllm.unusable_fisher(fisher)
    quantized = QuantizedLinear(codebook_weight(codes, codebook, spec.bits, scales))
    measure = None if unusable else fisher
    return describe_layer(path, spec, "kllm", W, quantized, fisher=measure, notes=(unusable,))


class InputQuantizer(NamedTuple):
    """How a layer's inputs are quantized, if at all, and what went wrong in finding out."""

    activation: ActivationQuant | None
    note: str | None = None


def activation_of(spec: ActivationSpec | None, stats: HistogramStats | None, path: str) -> InputQuantizer:
    """The quantizer of a layer's inputs; a table needs their histogram."""
    if spec is None:
        return InputQuantizer(None)
    codebook = thresholds = note = None
    if spec.grid == "codebook":
        if stats is None:
            raise ValueError(f"{path}: activations by a table need calibration; give text, or integer activations")
        codebook, note = activation_codebook(stats, spec.bits), unusable_histogram(stats)
        if spec.static:
            thresholds = stats.thresholds(spec.exact)
    act = ActivationQuant(codebook, thresholds, spec.bits, spec.symmetric, spec.mode, float(spec.exact))
    return InputQuantizer(act, note)


def sparse_shares(spec: QuantSpec) -> tuple[float, float]:
    """The shares (0..1) of all entries kept for their Fisher value and for their magnitude; they add to `sparse`."""
    sensitive = min(SENSITIVE_PERCENT, spec.sparse)
    return sensitive / 100, (spec.sparse - sensitive) / 100
