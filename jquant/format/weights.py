"""The packed pytrees: what a quantized weight is.

W is [N, K], N out features, K in features. `dequantize` is the specification of every type and the oracle of every
kernel; nothing densifies unless it is called by name.

    AffineWeight     W[n, k] = scales[g] * (code[n, k] - zero[g])         g = the group of (n, k)
    CodebookWeight   W[n, k] = codebook[n, code[n, k]] (* scales[n])
    SparseAffineWeight  two of every four inputs, see `jquant.format.semistructured`
    QuantizedLinear  W       = scatter(weight, outliers) + residual          y = W q(transform(x)) + bias

`activation` and `transform` say what happens to x before the product; `dequantize` is about W alone. Outlier columns
and residual multiply the transformed x as it is, never the quantized one.

Fields marked § are static: they are part of the tree's structure, hence of the jit key.

Shapes below are those of the "stream" layout, the only one in a checkpoint; `jquant.format.layouts` has the others.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jquant.format.activations import ActivationQuant
from jquant.format.layouts import affine_zeros, grid_scales, with_layout, words
from jquant.format.rotation import Rotation
from jquant.format.semistructured import SparseAffineWeight, dequantize_semistructured
from jquant.format.spec import GroupAxis
from pallas_kernels.kept_columns import KeptFragments
from pallas_kernels.packing import pack_codes, unpack_codes
from pallas_kernels.sparse_matmul import EntryTiles, SparseRows

T = TypeVar("T")


def _pytree(*static: str) -> Callable[[type[T]], type[T]]:
    """Registers a frozen dataclass as a pytree whose `static` fields are structure."""

    def register(cls: type[T]) -> type[T]:
        names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
        return jax.tree_util.register_dataclass(cls, [n for n in names if n not in static], list(static))

    return register


@_pytree("bits", "group_size", "group_axis", "shape", "layout", "fits_half")
@dataclasses.dataclass(frozen=True)
class AffineWeight:
    """Integer codes with a scale, and perhaps a zero point, a group.

    group_axis "in": group g of row n is inputs [g*group_size, (g+1)*group_size); scales [N, G], G = ceil(K/group_size).
    group_axis "out": group g of column k is outputs [g*group_size, ...); scales [G, K], G = ceil(N/group_size).
    The last group may be shorter. zeros are integers in [0, 2**bits), packed as a stream along the axis that is not
    grouped: uint32 [G, ceil(N*bits/32)] ("in") or [G, ceil(K*bits/32)] ("out"); None is symmetric, zero 2**(bits-1).
    row_sums float32 [N] = sum_k W[n, k] goes with inputs that have offsets; fits_half says whether the weights can be
    float16 without harm, with the sparse entries that are added to them; multiples uint8 and steps [N], a pair, are
    scales that are whole multiples of a step a row, multiples laid out like scales. `jquant.prepare` adds these four, a
    checkpoint has none.
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    bits: int  # §
    group_size: int  # § entries a group, the whole axis included
    group_axis: GroupAxis  # §
    shape: tuple[int, int]  # § (N, K)
    layout: str = "stream"  # §
    row_sums: jax.Array | None = None
    fits_half: bool | None = None  # §
    multiples: jax.Array | None = None
    steps: jax.Array | None = None


@_pytree("bits", "shape", "layout")
@dataclasses.dataclass(frozen=True)
class CodebookWeight:
    """Codes into a table a row, [N, 2**bits], or one table for the matrix, [1, 2**bits], times a scale a row.

    Entries are floats, or snapped to int8 (`is_snapped`): then there always are scales, and integer activations are
    multiplied by the entries in int32. nested holds narrower tables side by side, narrowest first, see
    `jquant.format.nested`. tables uint32 is the codebook as a kernel reads it, entries of 8 bits if they are int8, else
    bfloat16: those are divided by a factor a row, and table_scales float32 [N], the factors times `scales`, go with
    them instead of `scales`; byte_tables and byte_scales are the same in fixed point, for one token. row_sums float32
    [N] = sum_k W[n, k] goes with inputs that have offsets. `jquant.prepare` adds these five.
    """

    codes: jax.Array
    codebook: jax.Array
    scales: jax.Array | None  # [N]
    bits: int  # §
    shape: tuple[int, int]  # §
    layout: str = "stream"  # §
    nested: jax.Array | None = None  # [N, 2**bits - 2**narrowest]
    tables: jax.Array | None = None
    table_scales: jax.Array | None = None
    byte_tables: jax.Array | None = None
    byte_scales: jax.Array | None = None
    row_sums: jax.Array | None = None


@_pytree()
@dataclasses.dataclass(frozen=True)
class OutlierColumns:
    """Input columns kept as they are. Exclusive: the base weight has no code for them, its width is K - k.

    index int32 [k], ascending; weight [N, k]. slots int32 says which column each slot of quantized inputs holds
    (`pallas_kernels.activation_quantize`); fragments is `weight`, rounded to the type of 16-bit activations, as the
    kernels of the base read it. `jquant.prepare` adds both.
    """

    index: jax.Array
    weight: jax.Array
    slots: jax.Array | None = None
    fragments: KeptFragments | None = None


@_pytree("shape")
@dataclasses.dataclass(frozen=True)
class SparseResidual:
    """Entries kept exactly, as a compressed-row matrix of W - dequantize(base) at their places.

    values [nnz], columns [nnz] (uint16 where K <= 65536, else int32), row_pointer int32 [N + 1].
    rows int32 [nnz] repeats what row_pointer says, a row an entry; by_row and by_tile are the entries as GPU kernels
    read them, in a product of their own or inside that of the base. `jquant.prepare` adds what the device needs, a
    checkpoint never has any.
    """

    values: jax.Array
    columns: jax.Array
    row_pointer: jax.Array
    shape: tuple[int, int]  # § (N, K)
    rows: jax.Array | None = None
    by_row: SparseRows | None = None
    by_tile: EntryTiles | None = None


@_pytree()
@dataclasses.dataclass(frozen=True)
class QuantizedLinear:
    """One linear layer's weight: a base and what was kept beside it. Absent parts are None and cost nothing."""

    weight: AffineWeight | CodebookWeight | SparseAffineWeight
    outliers: OutlierColumns | None = None
    residual: SparseResidual | None = None
    bias: jax.Array | None = None  # [N]
    activation: ActivationQuant | None = None
    transform: Rotation | None = None


Base = AffineWeight | CodebookWeight | SparseAffineWeight
Weight = Base | QuantizedLinear
WEIGHT_TYPES = (AffineWeight, CodebookWeight, SparseAffineWeight, QuantizedLinear)


def is_quantized(leaf: Any) -> bool:
    """Whether a node of a tree is a packed weight."""
    return isinstance(leaf, WEIGHT_TYPES)


def is_snapped(weight: Base) -> bool:
    """Whether a weight is a codebook of int8 entries."""
    return isinstance(weight, CodebookWeight) and weight.codebook.dtype == jnp.int8


# --- building ---------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("bits", "group_size", "group_axis"))
def affine_weight(
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    bits: int,
    group_size: int | None,
    group_axis: GroupAxis,
) -> AffineWeight:
    """Packs codes [N, K], scales and integer zeros (both [N, G] for "in", [G, K] for "out")."""
    rows, columns = codes.shape
    if zeros is not None:
        zeros = pack_codes(zeros.T if group_axis == "in" else zeros, bits)
    size = group_size or (columns if group_axis == "in" else rows)
    return AffineWeight(pack_codes(codes, bits), scales, zeros, bits, size, group_axis, (rows, columns))


@functools.partial(jax.jit, static_argnames=("bits",))
def codebook_weight(
    codes: jax.Array, codebook: jax.Array, bits: int, scales: jax.Array | None = None
) -> CodebookWeight:
    """Packs codes [N, K] beside their table [N or 1, 2**bits] and the scales [N] that an int8 table needs."""
    rows, columns = codes.shape
    if codebook.dtype == jnp.int8 and scales is None:
        raise ValueError("the codebook is int8 and has no scales; give scales [N], or a codebook of floats")
    return CodebookWeight(pack_codes(codes, bits), codebook, scales, bits, (rows, columns))


def sparse_residual(mask: jax.Array, values: jax.Array, dtype: Any = jnp.float32) -> SparseResidual:
    """The entries of values [N, K] where mask [N, K] is set. Not for use under jit: their number sets the shape."""
    rows, columns = mask.shape
    per_row = np.asarray(_count_rows(mask))
    pointer = np.concatenate([[0], np.cumsum(per_row)]).astype(np.int32)
    count = int(pointer[-1])
    place, kept = _collect(mask, values.astype(dtype), _bucket(count))
    column = (np.asarray(place)[:count] % columns).astype(np.uint16 if columns <= 65536 else np.int32)
    return SparseResidual(
        jnp.asarray(np.asarray(kept)[:count]), jnp.asarray(column), jnp.asarray(pointer), (rows, columns)
    )


@jax.jit
def _count_rows(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, axis=1, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames=("size",))
def _collect(mask: jax.Array, values: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    (place,) = jnp.nonzero(mask.reshape(-1), size=size)
    return place, values.reshape(-1)[place]


def _bucket(count: int) -> int:
    """The least of a few sizes that holds `count`: programs are compiled for sizes, and layers differ in counts."""
    return 1 << max(count - 1, 0).bit_length()


def padded(residual: SparseResidual) -> SparseResidual:
    """The same entries in arrays of one of a few sizes, with `rows`: what is added has row N, which scatters drop."""
    full = with_rows(residual)
    assert full.rows is not None
    extra = _bucket(full.values.shape[0]) - full.values.shape[0]
    values, columns, rows = (np.asarray(array) for array in (full.values, full.columns, full.rows))
    return dataclasses.replace(
        full,
        values=jnp.asarray(np.pad(values, (0, extra))),
        columns=jnp.asarray(np.pad(columns, (0, extra))),
        rows=jnp.asarray(np.pad(rows, (0, extra), constant_values=residual.shape[0])),
    )


# --- meaning ----------------------------------------------------------------------------------------------------


def shape_of(weight: Weight) -> tuple[int, int]:
    """(N, K) of the matrix that a packed weight stands for."""
    if not isinstance(weight, QuantizedLinear):
        return weight.shape
    rows, columns = weight.weight.shape
    return rows, columns + (0 if weight.outliers is None else weight.outliers.index.shape[0])


def dequantize(weight: Weight) -> jax.Array:
    """The dense float32 [N, K] matrix: the specification of every packed type."""
    if isinstance(weight, AffineWeight):
        codes, scales = unpack_codes(words(weight), weight.bits, weight.shape[1]), grid_scales(weight)
        zeros = affine_zeros(weight)
        spread = spread_groups(weight.group_size, weight.group_axis, weight.shape)
        offset = jnp.float32(2 ** (weight.bits - 1)) if zeros is None else spread(zeros.astype(jnp.float32))
        return spread(scales.astype(jnp.float32)) * (codes.astype(jnp.float32) - offset)
    if isinstance(weight, CodebookWeight):
        dense = table_entries(weight).astype(jnp.float32)
        return dense if weight.scales is None else dense * weight.scales.astype(jnp.float32)[:, None]
    if isinstance(weight, SparseAffineWeight):
        return dequantize_semistructured(weight)
    dense = dequantize(weight.weight)
    if weight.outliers is not None:
        kept = weight.outliers
        full = jnp.zeros(shape_of(weight), jnp.float32)
        full = full.at[:, base_columns(kept.index, dense.shape[1])].set(dense)
        dense = full.at[:, kept.index].set(kept.weight.astype(jnp.float32))
    if weight.residual is not None:
        rest = weight.residual
        dense = dense.at[residual_rows(rest), rest.columns.astype(jnp.int32)].add(rest.values.astype(jnp.float32))
    return dense


def table_entries(weight: CodebookWeight) -> jax.Array:
    """The entry of every code, [N, K] in the codebook's type: the weight without its scales."""
    table = weight.codebook.T if weight.layout == "stream_t" else weight.codebook
    table = jnp.broadcast_to(table, (weight.shape[0], 2**weight.bits))
    return jnp.take_along_axis(table, unpack(weight), axis=1)


def unpack(weight: AffineWeight | CodebookWeight) -> jax.Array:
    """The codes as int32 [N, K]."""
    return unpack_codes(words(weight), weight.bits, weight.shape[1]).astype(jnp.int32)


def entries(residual: SparseResidual) -> jax.Array:
    """Where the residual has an entry: bool [N, K]."""
    place = (residual_rows(residual), residual.columns.astype(jnp.int32))
    return jnp.zeros(residual.shape, bool).at[place].set(True)


_PREPARED_TABLES = ("tables", "table_scales", "byte_tables", "byte_scales")


def canonical(weight: Weight) -> Weight:
    """The same weight as a checkpoint holds it: in the "stream" layout, without what `jquant.prepare` adds."""
    if isinstance(weight, QuantizedLinear):
        rest = weight.residual
        if rest is not None:
            rest = dataclasses.replace(rest, rows=None, by_row=None, by_tile=None)
        kept = weight.outliers
        if kept is not None:
            kept = dataclasses.replace(kept, slots=None, fragments=None)
        return dataclasses.replace(weight, weight=canonical(weight.weight), outliers=kept, residual=rest)
    if isinstance(weight, SparseAffineWeight):
        return weight
    more = ("fits_half", "multiples", "steps") if isinstance(weight, AffineWeight) else _PREPARED_TABLES
    return with_layout(dataclasses.replace(weight, **dict.fromkeys(("row_sums", *more))), "stream")


def with_rows(residual: SparseResidual) -> SparseResidual:
    """The same entries with `rows` filled in. Not for use under jit."""
    # By NumPy: the count differs from layer to layer, and JAX would compile this for each.
    counts = np.diff(np.asarray(residual.row_pointer))
    return dataclasses.replace(residual, rows=jnp.asarray(np.repeat(np.arange(counts.size, dtype=np.int32), counts)))


def spread_groups(group_size: int, group_axis: GroupAxis, shape: tuple[int, int]):
    """A function that repeats one value a group over the entries of a [N, K] matrix."""
    axis = 1 if group_axis == "in" else 0
    return lambda values: jax.lax.slice_in_dim(jnp.repeat(values, group_size, axis=axis), 0, shape[axis], axis=axis)


def base_columns(index: jax.Array, count: int) -> jax.Array:
    """The `count` input columns that are not in the ascending `index`, ascending, int32 [count].

    Base column j lies after every outlier i with index[i] - i <= j.
    """
    place = jnp.arange(count, dtype=jnp.int32)
    before = index.astype(jnp.int32) - jnp.arange(index.shape[0], dtype=jnp.int32)
    return place + jnp.sum(before[None, :] <= place[:, None], axis=1, dtype=jnp.int32)


def residual_rows(residual: SparseResidual) -> jax.Array:
    """The row of every stored entry, int32 [nnz]."""
    if residual.rows is not None:
        return residual.rows
    counts = residual.row_pointer[1:] - residual.row_pointer[:-1]
    rows = jnp.arange(residual.shape[0], dtype=jnp.int32)
    return jnp.repeat(rows, counts, total_repeat_length=residual.values.shape[0])


# --- size -------------------------------------------------------------------------------------------------------


def size_bytes(leaf: Any) -> int:
    """Bytes of a leaf as stored: codes, scales, zeros, tables, indices, kept parts; or of a dense array.

    What `jquant.prepare` adds for speed is not stored and not counted.
    """
    if is_quantized(leaf):
        leaf = jax.eval_shape(canonical, leaf)
    return sum(int(array.size) * array.dtype.itemsize for array in jax.tree.leaves(leaf))


def bits_per_weight(weight: Weight) -> float:
    """Bits stored for each entry of W, everything counted but the bias."""
    rows, columns = shape_of(weight)
    bias = 0 if not isinstance(weight, QuantizedLinear) or weight.bias is None else size_bytes(weight.bias)
    return 8 * (size_bytes(weight) - bias) / (rows * columns)
