"""One program a few tokens: read once into registers, reduce, divide, write; the Triton backend of Pallas.

A program holds [block_m, slots rounded up to a power of two], and a thread reads the columns whose codes it writes, so
that no code moves between threads. x comes in one of two ways:

    words             x of 2 bytes, K a multiple of 16, nothing kept: x as int32 [M, K/2] of column pairs, codes as
                      int32 [M, P/4]. In a block of 16 columns, word t of the codes is made of words t and t + 4 of x:

                          bytes  0: column 2t    1: column 2t + 8    2: column 2t + 1    3: column 2t + 9

                      A thread of 16 entries or more holds whole blocks, read and written 16 bytes at a time.
    column by column  the others: a gather in slot order, which Mosaic GPU has none of. A load for every column, where
                      words take one for 8, keeps the load unit busier than the memory.

Ranges are reduced over integers that are ordered as the floats are: they tell which token is not finite, too.

The quotient x / s must be rounded as IEEE says, or a code on the edge would differ from the specification. A full
division costs some ten instructions; with the correctly rounded reciprocal y of s, q = x y and one correction
q + (x - q s) y give the same number (Markstein) as long as nothing leaves the exponents, for which a power of two sees.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.activation_quantize.xla import (
    MODES,
    SMALLEST_SCALE,
    TINY,
    Mode,
    Quantized,
    num_slots,
    slot_places,
)
from pallas_kernels.token_in_registers import assembly, rounded_even

LARGEST_K = 32768
_WORDS = 4  # of the codes of a block of 16 columns
_INFINITY = 0x7F800000
_MAGIC = 12582912.0  # 1.5 * 2**23: v + _MAGIC holds the integer nearest to v in its low bits
_PACK = """{
    .reg .b32 low, high;
    prmt.b32 low, $1, $2, 0x0040;
    prmt.b32 high, $3, $4, 0x0040;
    prmt.b32 $0, low, high, 0x5410;
}"""
_DIVIDE = """{
    .reg .f32 x, q, r;
    mul.rn.f32 x, $1, $4;
    mul.rn.f32 q, x, $3;
    fma.rn.f32 r, q, $2, x;
    fma.rn.f32 $0, r, $3, q;
}"""


@dataclasses.dataclass(frozen=True)
class Config:
    """block_m tokens a program of num_warps warps, both powers of two."""

    block_m: int
    num_warps: int


def default_config(tokens: int, columns: int) -> Config:
    """A whole token a program, or several narrow ones; 8 entries a thread for few tokens, for many 32 or, of a long
    token, more: programs of 8 warps hide each other's loads, those of 32 leave no room for another."""
    width = pl.next_power_of_2(columns)
    block_m = max(min(4096 // width, pl.next_power_of_2(tokens)), 1)
    each, most = (8, 32) if tokens <= 128 else (32, 8)
    return Config(block_m, max(min(block_m * width // (32 * each), most), 1))


def supported(tokens: int, columns: int, kept: int, dtype: jax.typing.DTypeLike, bits: int) -> str | None:
    """None if the kernel takes x [tokens, columns], else the reason why not."""
    if jnp.dtype(dtype).name not in ("bfloat16", "float16", "float32"):
        return f"activations are {jnp.dtype(dtype).name}, not bfloat16, float16 or float32"
    if not 2 <= bits <= 8:
        return f"activations of {bits} bits have no int8 codes"
    if columns > LARGEST_K:
        return f"K={columns} exceeds {LARGEST_K}, a token in registers"
    if columns <= kept:
        return f"all {columns} columns are kept"
    if tokens == 0 or tokens * (columns + 64) >= 2**31:
        return f"{tokens} tokens of {columns} inputs are none, or more than 32-bit addresses reach"
    return None


def quantize_rows(
    x: jax.Array,
    columns: jax.Array | None = None,
    index: jax.Array | None = None,
    *,
    bits: int,
    symmetric: bool,
    mode: Mode = "kernel",
    config: Config | None = None,
    interpret: bool = False,
) -> Quantized:
    """`xla.quantize` on a GPU, bit for bit. ValueError with the reason where `supported` has one."""
    tokens, width = x.shape
    kept = 0 if index is None else index.shape[0]
    if (reason := supported(tokens, width, kept, x.dtype, bits)) is not None:
        raise ValueError(f"the quantizing kernel cannot serve this: {reason}")
    if mode not in MODES:
        raise ValueError(f"activation mode is {mode!r}; expected one of {MODES}")
    if (columns is None) != (index is None):
        raise ValueError("kept columns need both `index` and `slot_columns(K, index)`; one of them is None")
    slots = num_slots(width, kept)
    if columns is not None and columns.shape != (slots,):
        raise ValueError(f"columns has shape {columns.shape}; expected {(slots,)}, see slot_columns")
    config = default_config(tokens, slots) if config is None else config
    body = functools.partial(_kernel, config.block_m, bits, symmetric, mode, kept, x.dtype, interpret)
    column = jax.ShapeDtypeStruct((tokens,), jnp.float32)
    in_words = kept == 0 and x.dtype.itemsize == 2 and width % (4 * _WORDS) == 0
    codes = ((tokens, slots // 4), jnp.int32) if in_words else ((tokens, slots), jnp.int8)
    outputs = [jax.ShapeDtypeStruct(*codes), column]
    outputs += [] if symmetric else [column]
    outputs += [jax.ShapeDtypeStruct((tokens, kept), x.dtype)] if kept else []
    codes, scales, *rest = pl.pallas_call(
        body,
        out_shape=outputs,
        grid=(pl.cdiv(tokens, config.block_m),),
        compiler_params=pltriton.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name="quantize_rows",
    )(*([x, columns, index] if kept else [_column_pairs(x) if in_words else x]))
    if in_words:  # the same bytes under another name, no copy
        codes = jax.lax.bitcast_convert_type(codes, jnp.int8).reshape(tokens, slots)
    offsets = None if symmetric else rest[0][:, None]
    split = None if index is None else rest[-1] if kept else x[:, :0]
    return Quantized(codes, scales[:, None], offsets, split)


def _column_pairs(x):
    """x [M, K] of 2 bytes -> int32 [M, K/2], the even column low; the same bytes under another name, no copy."""
    return jax.lax.bitcast_convert_type(x.reshape(x.shape[0], -1, 2), jnp.int32)


def _kernel(block_m, bits, symmetric, mode, kept, dtype, interpret, x_ref, *refs):
    columns_ref, index_ref, *outputs = refs if kept else (None, None, *refs)
    codes_ref, scales_ref, *rest = outputs
    tokens, count = codes_ref.shape
    rows = pl.program_id(0) * block_m + jnp.arange(block_m, dtype=jnp.int32)
    inside = rows < tokens
    # the last program may reach beyond the tokens: it reads the last of them again and writes nothing there
    source = jnp.minimum(rows, tokens - 1)
    unit = jnp.arange(pl.next_power_of_2(count), dtype=jnp.int32)  # a slot or a word of four
    if codes_ref.dtype == jnp.int32:
        parts, real = _load_words(x_ref, source, unit, dtype)
    else:
        parts, real = _load_columns(x_ref, columns_ref, source, unit, count, kept)

    finite, codes, scales, offsets = _quantize(parts, bits, symmetric, mode, interpret)
    codes = jnp.where(real[None] & finite[:, None], _pack(codes, interpret), 0).astype(codes_ref.dtype)
    pltriton.store(codes_ref.at[_cells(rows, unit)], codes, mask=inside[:, None] & (unit < count)[None])
    pltriton.store(scales_ref.at[rows], jnp.where(finite, scales, jnp.nan), mask=inside)
    if offsets is not None:
        pltriton.store(rest[0].at[rows], jnp.where(finite, offsets, jnp.nan), mask=inside)
    if index_ref is not None:
        entry = jnp.arange(pl.next_power_of_2(kept), dtype=jnp.int32)
        column = pltriton.load(index_ref.at[jnp.minimum(entry, kept - 1)])
        values = pltriton.load(x_ref.at[_cells(source, column)])
        pltriton.store(rest[-1].at[_cells(rows, entry)], values, mask=inside[:, None] & (entry < kept)[None])


def _load_words(x_ref, source, word, dtype):
    """The columns of every byte of these words of the codes, four float32 [R, C], and which words are not padding [C].

    As in `_load_columns`, padding reads columns that are there anyway: then it needs no care in the ranges.
    """
    # with a quotient and a remainder, not with masks, Triton sees runs of four
    words = jnp.full_like(word, _WORDS)
    block, place = jax.lax.div(word, words), jax.lax.rem(word, words)
    real = block < x_ref.shape[1] // (2 * _WORDS)
    pair = 2 * _WORDS * jnp.where(real, block, 0) + place
    near, far = (pltriton.load(x_ref.at[_cells(source, pair + more)]) for more in (0, _WORDS))
    return [_upper_half(pairs, dtype) for pairs in (near << 16, far << 16, near, far)], real


def _load_columns(x_ref, columns_ref, source, slot, slots, kept):
    """The columns of these slots, one float32 [R, C], and which slots are not padding [C]."""
    place = slot_places(slot)
    real = place < x_ref.shape[1] - kept
    rows, column = _cells(source, jnp.where(real, place, 0))
    if columns_ref is not None:
        # beyond the slots the first ones again, in whole runs; for every row, so that no number moves between threads
        slot = jnp.where(slot < slots, slot, jax.lax.rem(slot, jnp.full_like(slot, 16)))
        column = pltriton.load(columns_ref.at[_cells(source, slot)[1]])
    return [pltriton.load(x_ref.at[rows, column]).astype(jnp.float32)], real


def _cells(rows, columns):
    """The indices of all columns of all rows."""
    shape = rows.shape + columns.shape
    return jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None], shape)


def _upper_half(words, dtype):
    """The number of type `dtype` in the upper half of every word, as float32."""
    if dtype == jnp.bfloat16:
        return _float(words & -(1 << 16))
    halves = jax.lax.shift_right_logical(words, jnp.full_like(words, 16)).astype(jnp.int16)
    return jax.lax.bitcast_convert_type(halves, dtype).astype(jnp.float32)


def _pack(codes, interpret):
    """The lowest bytes of four arrays as the bytes of words, the first one low; of one array, all of it."""
    if len(codes) == 1:
        return codes[0]
    if interpret:
        a, b, c, d = (code & 0xFF for code in codes)
        return a | b << 8 | c << 16 | d << 24
    return assembly(_PACK, *codes)


def _quantize(parts, bits, symmetric, mode, interpret):
    """The parts of R tokens, float32 [R, C] each -> (finite [R], codes, scales [R], offsets [R] or None).

    Codes are int32 [R, C] for every part, of which the lowest byte counts. Where a token is not finite nothing counts.
    """
    half, steps = 2 ** (bits - 1), 2**bits - 1
    if symmetric:
        largest = _reduced(jnp.maximum, jnp.max, [_bits(x) & 0x7FFFFFFF for x in parts])
        finite = largest < _INFINITY
        largest = _float(jnp.where(finite, largest, 0))
        scales = _positive(_over(largest, _where(finite, half - 1.0), interpret))
        return finite, [_integers(q) for q in _quotients(parts, scales, interpret)], scales, None
    keys = [_ordered(_bits(x)) for x in parts]
    low, high = _reduced(jnp.minimum, jnp.min, keys), _reduced(jnp.maximum, jnp.max, keys)
    finite = (low > _ordered_constant(0xFF800000)) & (high < _INFINITY)
    low, high = _float(_ordered(jnp.where(finite, low, 0))), _float(_ordered(jnp.where(finite, high, 0)))
    if mode == "simulation":
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    divisor = _where(finite, float(steps))
    whole = high - low
    scales = jnp.where(
        (_bits(whole) & 0x7FFFFFFF) < _INFINITY,
        _over(whole, divisor, interpret),
        _over(high, divisor, interpret) - _over(low, divisor, interpret),
    )
    if mode == "kernel":
        scales = jnp.maximum(scales, SMALLEST_SCALE)
        # of a range beyond float32 the difference may be infinite: the largest code
        quotients = _quotients([x - low[:, None] for x in parts], scales, interpret)
        codes = [jnp.minimum(q, float(steps)) for q in quotients]
        offsets = low + half * scales
    else:
        scales = _positive(scales)
        zeros = jnp.clip(rounded_even(_over(-low, scales, interpret), interpret), 0.0, float(steps))
        quotients = _quotients(parts, scales, interpret)
        codes = [jnp.clip(rounded_even(q, interpret) + zeros[:, None], 0.0, float(steps)) for q in quotients]
        offsets = scales * (half - zeros)
    return finite, [_integers(code, -half) for code in codes], scales, offsets


def _reduced(both, along, parts):
    """[R] of parts [R, C], by a function of two arrays and the same along an axis."""
    return along(functools.reduce(both, parts), axis=1)


def _bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(x):
    return jax.lax.bitcast_convert_type(x, jnp.float32)


def _ordered(bits):
    """Integers ordered as the floats of these bits, and back: the same operation undoes itself."""
    return bits ^ (jax.lax.shift_right_arithmetic(bits, jnp.full_like(bits, 31)) & 0x7FFFFFFF)


def _ordered_constant(bits: int) -> int:
    return (bits ^ 0x7FFFFFFF) - 2**32


def _where(finite, value: float):
    # not a constant: interpreted on a CPU, XLA would multiply with its rounded reciprocal
    return jnp.where(finite, jnp.full(finite.shape, value, jnp.float32), 1.0)


def _positive(scales):
    return jnp.where(scales == 0, 1.0, jnp.maximum(scales, TINY))


def _integers(x, more=0):
    """float32 within 2**21 of zero -> the nearest int32 plus `more`, an even number, in the low bits; one addition."""
    return _bits(x + (_MAGIC + more))


def _over(x, y, interpret):
    """x / y correctly rounded; a plain division would be compiled to an approximation."""
    return x / y if interpret else assembly("div.rn.f32 $0, $1, $2;", x, y)


def _quotients(parts, scales, interpret):
    """x [R, C] / scales [R] for every part x, correctly rounded wherever the result is a code."""
    if interpret:
        # spread first: XLA turns a division by one number a row into a product with its rounded reciprocal
        return [x / jax.lax.optimization_barrier(jnp.broadcast_to(scales[:, None], x.shape)) for x in parts]
    power = jnp.where(scales < 2.0**-60, 2.0**64, jnp.where(scales > 2.0**60, 2.0**-64, 1.0)).astype(jnp.float32)
    scales = scales * power
    factors = -scales, assembly("rcp.rn.f32 $0, $1;", scales), power
    return [assembly(_DIVIDE, x, *(jnp.broadcast_to(row[:, None], x.shape) for row in factors)) for x in parts]
