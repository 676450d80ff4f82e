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
    SparseResidual,
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
from pallas_kernels.affine_matmul import entries_fit_half, fits_half, split_scales
from pallas_kernels.codebook_matmul import fixed_point_tables, prepare_tables, rounded_tables
from pallas_kernels.device import no_hopper, platform
from pallas_kernels.kept_columns import prepare_kept
from pallas_kernels.sparse_matmul import EntryTiles, prepare_rows, prepare_tiles

# A single token is split for tables in fixed point by a kernel of its own. With 2**24 weights in 3 bits that makes 8.4
# microseconds of 7.5, with 25 millions it is even, from 50 millions on it is faster.
SMALL = 2**24


def prepare(tree: Any) -> Any:
    """The same model with every packed weight in the form this device reads fastest; once, after loading.

    On a CPU the base goes into the "stream_t" layout; on a Hopper GPU, where a kernel takes the layer, into
    "fragments", with kept columns, the entries of a residual and scales in two levels as the kernels read them; not if
    the model runs in float32, which no kernel does. Else a residual gets the row of each entry beside it. Weights are
    converted one at a time, so the extra memory is one weight's.
    """
    dtype = jnp.dtype(running_dtype(tree))
    return jax.tree.map(lambda leaf: _prepared(leaf, dtype) if is_quantized(leaf) else leaf, tree, is_leaf=is_quantized)


def _prepared(w: Any, dtype: Any) -> Any:
    w = canonical(w)
    layer = as_layer(w)
    if no_hopper() is None and dtype.itemsize == 2 and hopper.no_fragments(layer) is None:
        layer = jax.block_until_ready(_for_hopper(layer, dtype))
    else:
        rest = None if layer.residual is None else with_rows(layer.residual)
        base = layer.weight
        if platform() == "cpu" and not isinstance(base, SparseAffineWeight):
            base = with_layout(base, "stream_t")
        layer = dataclasses.replace(layer, weight=base, residual=rest)
    return layer if isinstance(w, QuantizedLinear) else layer.weight


def _for_hopper(layer: QuantizedLinear, dtype: Any) -> QuantizedLinear:
    base, act, kept, rest = layer.weight, layer.activation, layer.outliers, layer.residual
    assert not isinstance(base, SparseAffineWeight)
    if isinstance(base, CodebookWeight):  # first: entries are in the units of the tables
        base = _with_tables(base)
    if isinstance(base, AffineWeight) and act is None:
        base = dataclasses.replace(base, fits_half=fits_half(base.scales.T, base.bits))
    if rest is not None:
        tiles = None
        if hopper.no_tiles(layer) is None:
            beside = _beside(base, rest)
            tiles = _entry_tiles(beside, rest, dtype)
            base = base if tiles is None else beside
        rows = None
        if tiles is None or hopper.ROWS_TOKENS > 0:
            rows = prepare_rows(*(np.asarray(a) for a in (rest.values, rest.columns, rest.row_pointer)))
        rest = dataclasses.replace(rest, by_row=rows, by_tile=tiles)
    sums = None
    if act is not None and not act.symmetric:  # offsets of activations meet the sums of the weight's rows
        sums = _row_sums(base)
    if isinstance(base, AffineWeight) and rest is None:
        base = _in_two_levels(base)
    base = with_layout(base, "fragments")
    if sums is not None:
        base = dataclasses.replace(base, row_sums=sums)
    if kept is not None and act is not None:
        kept = dataclasses.replace(kept, slots=slot_columns(shape_of(layer)[1], kept.index))
    if kept is not None and kept.index.size:
        kept = dataclasses.replace(kept, fragments=prepare_kept(kept.weight, dtype))
    return dataclasses.replace(layer, weight=base, outliers=kept, residual=rest)


def _with_tables(base: CodebookWeight) -> CodebookWeight:
    """The tables of int8 entries as they are; those of floats in bfloat16, with the factors that make little of it, and
    in fixed point for a single token, unless the weight is small."""
    if is_snapped(base):
        return dataclasses.replace(base, tables=prepare_tables(base.codebook, jnp.int8))

    def times_scales(factors: jax.Array) -> jax.Array:
        scales = jnp.broadcast_to(factors, base.shape[:1])
        return scales if base.scales is None else scales * base.scales.astype(jnp.float32)

    rounded, factors = rounded_tables(base.codebook)
    base = dataclasses.replace(base, tables=prepare_tables(rounded, jnp.bfloat16), table_scales=times_scales(factors))
    if base.shape[0] * base.shape[1] <= SMALL:
        return base
    fixed, units = fixed_point_tables(base.codebook)
    return dataclasses.replace(base, byte_tables=prepare_tables(fixed, jnp.uint16), byte_scales=times_scales(units))


def _in_two_levels(base: AffineWeight) -> AffineWeight:
    """The base with multiples and steps beside its scales, if these are such and the kernel takes them."""
    if not hopper.takes_multiples(base) or (split := split_scales(np.asarray(base.scales))) is None:
        return base
    multiples, steps = split
    return dataclasses.replace(base, multiples=jnp.asarray(multiples), steps=jnp.asarray(steps))


def _beside(base: AffineWeight | CodebookWeight, rest: SparseResidual) -> AffineWeight | CodebookWeight:
    """The base, whose weights do not fit float16 if the entries that are added to them do not."""
    if not isinstance(base, AffineWeight) or not base.fits_half:
        return base
    row = _rows(base, rest)
    group = np.asarray(rest.columns) // base.group_size
    return dataclasses.replace(base, fits_half=entries_fit_half(rest.values, row, group, base.scales.T, base.bits))


def _rows(base: AffineWeight | CodebookWeight, rest: SparseResidual) -> np.ndarray:
    return np.repeat(np.arange(base.shape[0]), np.diff(np.asarray(rest.row_pointer)))


def _entry_tiles(base: AffineWeight | CodebookWeight, rest: SparseResidual, dtype: Any) -> EntryTiles | None:
    """The entries in the units of the kernel's decoder, whose scale multiplies after they are added; None where that
    cannot be: an entry beside a scale of zero, or one that is too large in such units."""
    values, columns, pointer = (np.asarray(array) for array in (rest.values, rest.columns, rest.row_pointer))
    values = values.astype(np.float32)
    name = jnp.dtype(dtype).name
    scales = base.scales if isinstance(base, AffineWeight) else hopper.table_scales(base, name)
    if scales is not None:
        scales = np.asarray(scales.astype(jnp.float32)).reshape(base.shape[0], -1)
        row = _rows(base, rest)
        group = columns // base.group_size if isinstance(base, AffineWeight) else 0
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            values = values / scales[row, group]
    kind = jnp.dtype(hopper.entry_type(base, name))
    if not np.all(np.abs(values) <= float(jnp.finfo(kind).max)):
        return None
    return prepare_tiles(values, columns, pointer, base.shape[1], kind)


@jax.jit
def _row_sums(base: AffineWeight | CodebookWeight) -> jax.Array:
    return jnp.sum(dequantize(base), axis=1)
