"""Packed weights in the form that the device reads fastest."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.format.layouts import with_layout
from jquant.format.semistructured import SparseAffineWeight
from jquant.format.weights import (
    AffineWeight,
    CodebookWeight,
    QuantizedLinear,
    canonical,
    dequantize,
    is_quantized,
    is_snapped,
    shape_of,
    with_rows,
)
from jquant.linear import hopper
from jquant.linear.choice import as_layer, running_dtype
from pallas_kernels.activation_quantize import slot_columns
from pallas_kernels.codebook_matmul import prepare_tables
from pallas_kernels.device import no_hopper, platform
from pallas_kernels.sparse_matmul import prepare_rows


def prepare(tree: Any) -> Any:
    """The same model with every packed weight in the form this device reads fastest; once, after loading.

    On a CPU the base goes into the "stream_t" layout; on a Hopper GPU, where a kernel takes the layer, into
    "fragments", with the entries of a residual as its kernel reads them; not if the model runs in float32, which no
    kernel does. Else a residual gets the row of each entry beside it. Weights are converted one at a time, so the
    extra memory is one weight's.
    """
    kernels = no_hopper() is None and jnp.dtype(running_dtype(tree)).itemsize == 2
    return jax.tree.map(
        lambda leaf: _prepared(leaf, kernels) if is_quantized(leaf) else leaf, tree, is_leaf=is_quantized
    )


def _prepared(w: Any, kernels: bool) -> Any:
    w = canonical(w)
    layer = as_layer(w)
    if kernels and hopper.no_fragments(layer) is None:
        layer = jax.block_until_ready(_for_hopper(layer))
    else:
        rest = None if layer.residual is None else with_rows(layer.residual)
        base = layer.weight
        if platform() == "cpu" and not isinstance(base, SparseAffineWeight):
            base = with_layout(base, "stream_t")
        layer = dataclasses.replace(layer, weight=base, residual=rest)
    return layer if isinstance(w, QuantizedLinear) else layer.weight


def _for_hopper(layer: QuantizedLinear) -> QuantizedLinear:
    base, act, kept, rest = layer.weight, layer.activation, layer.outliers, layer.residual
    sums = None
    if act is not None and not act.symmetric:  # offsets of activations meet the sums of the weight's rows
        sums = _row_sums(base)
    base = with_layout(base, "fragments")
    if isinstance(base, CodebookWeight):
        tables = prepare_tables(base.codebook, jnp.int8 if is_snapped(base) else jnp.bfloat16)
        base = dataclasses.replace(base, tables=tables)
    if sums is not None:
        base = dataclasses.replace(base, row_sums=sums)
    if kept is not None and act is not None:
        kept = dataclasses.replace(kept, slots=slot_columns(shape_of(layer)[1], kept.index))
    if rest is not None:
        entries = prepare_rows(*(np.asarray(a) for a in (rest.values, rest.columns, rest.row_pointer)))
        rest = dataclasses.replace(rest, by_row=entries)
    return dataclasses.replace(layer, weight=base, outliers=kept, residual=rest)


@jax.jit
def _row_sums(base: AffineWeight | CodebookWeight) -> jax.Array:
    return jnp.sum(dequantize(base), axis=1)
