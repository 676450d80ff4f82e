"""2:4 weights: of every four consecutive inputs two are zero and not stored.

    W[n, order[p]] = scales[n, p // group_size] * (code[n, p] - 2**(bits - 1))    for the two survivors p of their four
    W[n, order[p]] = 0                                                            otherwise

Which inputs make a group of four is decided by the pass that prunes: QUIK (arXiv 2310.09259) prunes in the order in
which it visits the columns, so a pattern would be lost in the original order. Columns are therefore kept in a stored
order; `order` [K] names the column of W at each position p, and everything else here is indexed by position.

Layout "stream", the only one, with fours j = p // 4:

    codes    uint32 [N, ceil(K/2 * bits / 32)]   the two survivors of each four, lower position first, as the bit
                                                 stream of `pallas_kernels.packing`
    pattern  uint32 [N, ceil(K/4 * 4 / 32)]      per four one nibble `i0 | i1 << 2` with i0 < i1 the survivors'
                                                 positions p % 4: the metadata of NVIDIA's sparse matrix units; a
                                                 stream of 4-bit codes
    scales   [N, ceil(K / group_size)]           groups of consecutive positions, a multiple of four

    pattern nibble     bits 0 1   bits 2 3        0, 1 -> 0100    0, 2 -> 1000    0, 3 -> 1100
                       i0         i1              1, 2 -> 1001    1, 3 -> 1101    2, 3 -> 1110

A 4-bit weight costs 2 bits of codes and 1 bit of pattern. The grid is symmetric: its zero is a level, so a pruned
weight needs no code.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.packing import num_words, pack_codes, unpack_codes

FOUR, SURVIVORS = 4, 2
PATTERN_BITS = 4
LARGEST_UINT16_ORDER = 65536


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "pattern", "scales", "order"],
    meta_fields=["bits", "group_size", "shape", "layout"],
)
@dataclasses.dataclass(frozen=True)
class SparseAffineWeight:
    """Symmetric codes of the two survivors of every four inputs, in a stored column order; see the module's text.

    order: the column of W at each position, a permutation of 0 .. K - 1; uint16 where K <= 65536, else int32.
    Fields marked § are static.
    """

    codes: jax.Array
    pattern: jax.Array
    scales: jax.Array
    order: jax.Array
    bits: int  # §
    group_size: int  # § positions a group, a multiple of 4, or K
    shape: tuple[int, int]  # § (N, K)
    layout: str = "stream"  # §


def pack_semistructured(
    codes: jax.Array,
    mask: jax.Array,
    scales: jax.Array,
    bits: int,
    order: jax.Array,
    group_size: int | None = None,
) -> SparseAffineWeight:
    """Packs codes [N, K] (in [0, 2**bits)) whose survivors mask [N, K] marks, both in the columns of W.

    scales [N, ceil(K / group_size)] belong to positions, like group_size (None: whole rows). order [K] is the column
    at each position. Not for use under jit: the values are checked. ValueError if K is no multiple of four, if order
    is no permutation, or if some four of positions has not exactly two survivors.
    """
    rows, columns = codes.shape
    size = columns if group_size is None else group_size
    _check_sizes("the weight", (rows, columns), bits, size)
    if mask.shape != codes.shape:
        raise ValueError(f"mask {mask.shape} must have the shape of codes {codes.shape}")
    groups = -(-columns // size)
    if scales.shape != (rows, groups):
        raise ValueError(f"scales {scales.shape} must be [N, K / group_size] = {(rows, groups)}")
    place = np.asarray(order)
    if not np.array_equal(np.sort(place), np.arange(columns)):
        raise ValueError(f"order {place.shape} must be a permutation of the {columns} columns")
    stored = jnp.asarray(place, jnp.uint16 if columns <= LARGEST_UINT16_ORDER else jnp.int32)
    packed, pattern, survivors = _pack(codes, mask, stored, bits)
    if not bool(jnp.all(survivors == SURVIVORS)):
        raise ValueError(
            f"groups of {FOUR} positions have {int(jnp.min(survivors))} to {int(jnp.max(survivors))} survivors; "
            f"expected {SURVIVORS} in each: pass the order in which the pattern was chosen"
        )
    return SparseAffineWeight(packed, pattern, scales, stored, bits, size, (rows, columns))


def unpack_semistructured(weight: SparseAffineWeight) -> tuple[jax.Array, jax.Array]:
    """(codes uint8 [N, K], mask bool [N, K]) in the columns of W; a pruned weight has the code of zero."""
    values, first, second = _survivors(weight)
    zero = jnp.uint8(2 ** (weight.bits - 1))
    codes = _spread(values, first, second, zero)
    mask = _spread(jnp.ones_like(values, dtype=bool), first, second, False)
    back = _positions(weight)
    return codes[:, back], mask[:, back]


def dequantize_semistructured(weight: SparseAffineWeight) -> jax.Array:
    """The dense float32 [N, K] matrix in the columns of W: the specification of the type."""
    values, first, second = _survivors(weight)
    half = jnp.float32(2 ** (weight.bits - 1))
    steps = _spread(values.astype(jnp.float32) - half, first, second, 0.0)
    scales = jnp.repeat(weight.scales.astype(jnp.float32), weight.group_size, axis=1)[:, : weight.shape[1]]
    return (scales * steps)[:, _positions(weight)]


def validate_semistructured(weight: SparseAffineWeight, path: str) -> None:
    """Checks every array's shape and type against the static fields; ValueError names the field and the path."""
    rows, columns = weight.shape
    _check_sizes(path, weight.shape, weight.bits, weight.group_size)
    if weight.layout != "stream":
        raise ValueError(f"{path}: layout is {weight.layout!r}; a checkpoint holds 'stream' only")
    floats = ("float32", "float16", "bfloat16")
    for name, shape, dtypes in (
        ("codes", (rows, num_words(columns // FOUR * SURVIVORS, weight.bits)), ("uint32",)),
        ("pattern", (rows, num_words(columns // FOUR, PATTERN_BITS)), ("uint32",)),
        ("scales", (rows, -(-columns // weight.group_size)), floats),
        ("order", (columns,), ("uint16" if columns <= LARGEST_UINT16_ORDER else "int32",)),
    ):
        array = getattr(weight, name)
        if tuple(array.shape) != shape:
            raise ValueError(f"{path}: {name} has shape {tuple(array.shape)}; expected {shape}")
        if str(array.dtype) not in dtypes:
            raise ValueError(f"{path}: {name} is {array.dtype}; expected {' or '.join(dtypes)}")


def _check_sizes(what: str, shape: tuple[int, int], bits: int, group_size: int) -> None:
    columns = shape[1]
    if not 2 <= bits <= 8:
        raise ValueError(f"{what}: bits is {bits}; expected 2 to 8")
    if not columns:
        raise ValueError(f"{what} has no columns left for 2:4; keep fewer of them as outliers")
    if columns % FOUR:
        raise ValueError(
            f"{what} has {columns} columns, which 2:4 cannot divide into fours; keep {columns % FOUR} more of them as "
            f"outliers, or leave this layer dense"
        )
    if group_size < 1 or (group_size % FOUR and group_size < columns):
        raise ValueError(f"{what}: group_size is {group_size}; expected a multiple of {FOUR}, or whole rows")


def _patterns() -> tuple[int, ...]:
    """The nibble of each of the 16 masks of four (bit i: position i survives); 0 where not two survive."""
    table = [0] * 2**FOUR
    for second in range(FOUR):
        for first in range(second):
            table[1 << first | 1 << second] = first | second << 2
    return tuple(table)


@partial(jax.jit, static_argnames=("bits",))
def _pack(codes: jax.Array, mask: jax.Array, order: jax.Array, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(codes, pattern, survivors of each four [N, K / 4])."""
    rows, columns = codes.shape
    order = order.astype(jnp.int32)
    fours = codes.astype(jnp.uint8)[:, order].reshape(rows, columns // FOUR, FOUR)
    marks = mask.astype(jnp.uint8)[:, order].reshape(fours.shape)
    # The mask of a four as a number, so that one small table gives its nibble.
    which = jnp.sum(marks << jnp.arange(FOUR, dtype=jnp.uint8), axis=-1, dtype=jnp.int32)
    pattern = jnp.asarray(_patterns(), jnp.uint8)[which]
    pair = jnp.stack([pattern & jnp.uint8(3), pattern >> jnp.uint8(2)], axis=-1)
    values = jnp.take_along_axis(fours, pair.astype(jnp.int32), axis=-1)
    survivors = jnp.sum(marks, axis=-1, dtype=jnp.uint8)
    return pack_codes(values.reshape(rows, -1), bits), pack_codes(pattern, PATTERN_BITS), survivors


def _survivors(weight: SparseAffineWeight) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(codes uint8 [N, K/4, 2], and the places of the two in their four, uint8 [N, K/4] each)."""
    rows, columns = weight.shape
    values = unpack_codes(weight.codes, weight.bits, columns // FOUR * SURVIVORS)
    pattern = unpack_codes(weight.pattern, PATTERN_BITS, columns // FOUR)
    return values.reshape(rows, -1, SURVIVORS), pattern & jnp.uint8(3), pattern >> jnp.uint8(2)


def _spread(values: jax.Array, first: jax.Array, second: jax.Array, empty: jax.Array | float | bool) -> jax.Array:
    """[N, K] by position: values [N, K/4, 2] at their places, `empty` at the others."""
    fill = jnp.asarray(empty, values.dtype)
    at = [jnp.where(first == i, values[..., 0], jnp.where(second == i, values[..., 1], fill)) for i in range(FOUR)]
    return jnp.stack(at, axis=-1).reshape(values.shape[0], -1)


def _positions(weight: SparseAffineWeight) -> jax.Array:
    """The position of each column of W, int32 [K]: the inverse of `order`."""
    return jnp.argsort(weight.order.astype(jnp.int32)).astype(jnp.int32)
