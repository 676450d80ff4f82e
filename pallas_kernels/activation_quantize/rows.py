"""One program a few tokens: read once into registers, reduce, divide, write; the Triton backend of Pallas.

Reading in slot order is a gather, which Mosaic GPU has none of. A program holds [block_m, columns rounded up to a power
of two]; every column is read straight into the slot that it is written from, so no code moves between threads but
to be stored 16 bytes wide. Ranges are reduced over integers that are ordered as the floats are: they tell which token
is not finite, too.

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

LARGEST_K = 32768
_INFINITY = 0x7F800000
_MAGIC = 12582912.0  # 1.5 * 2**23: v + _MAGIC holds the integer nearest to v in its low bits
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
    """A whole token a program, or several narrow ones; 8 entries a thread for few tokens, 32 for many."""
    width = pl.next_power_of_2(columns)
    block_m = max(min(4096 // width, pl.next_power_of_2(tokens)), 1)
    each = 8 if tokens <= 512 else 32
    return Config(block_m, max(min(block_m * width // (32 * each), 32), 1))


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
    body = functools.partial(_kernel, config.block_m, bits, symmetric, mode, kept, interpret)
    column = jax.ShapeDtypeStruct((tokens,), jnp.float32)
    outputs = [jax.ShapeDtypeStruct((tokens, slots), jnp.int8), column]
    outputs += [] if symmetric else [column]
    outputs += [jax.ShapeDtypeStruct((tokens, kept), x.dtype)] if kept else []
    codes, scales, *rest = pl.pallas_call(
        body,
        out_shape=outputs,
        grid=(pl.cdiv(tokens, config.block_m),),
        compiler_params=pltriton.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name="quantize_rows",
    )(*([x, columns, index] if kept else [x]))
    offsets = None if symmetric else rest[0][:, None]
    split = None if index is None else rest[-1] if kept else x[:, :0]
    return Quantized(codes, scales[:, None], offsets, split)


def _kernel(block_m, bits, symmetric, mode, kept, interpret, x_ref, *refs):
    columns_ref, index_ref, *outputs = refs if kept else (None, None, *refs)
    codes_ref, scales_ref, *rest = outputs
    (tokens, width), slots = x_ref.shape, codes_ref.shape[1]
    rows = pl.program_id(0) * block_m + jnp.arange(block_m, dtype=jnp.int32)
    inside = rows < tokens
    # the last program may reach beyond the tokens: it reads the last of them again and writes nothing there
    source = jnp.minimum(rows, tokens - 1)[:, None]

    slot = jnp.arange(pl.next_power_of_2(slots), dtype=jnp.int32)
    place = slot_places(slot)
    real = place < width - kept
    # padding reads a column that is there anyway: then it needs no care in the ranges
    if columns_ref is None:
        column = jnp.where(real, place, 0)
    else:
        column = pltriton.load(columns_ref.at[jnp.minimum(slot, slots - 1)])
    shape = (block_m, slot.shape[0])
    x = pltriton.load(x_ref.at[jnp.broadcast_to(source, shape), jnp.broadcast_to(column[None], shape)])
    x = x.astype(jnp.float32)

    codes, scales, offsets = _quantize(x, bits, symmetric, mode, interpret)
    codes = jnp.where(real[None], codes, 0).astype(jnp.int8)
    here = jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(slot[None], shape)
    pltriton.store(codes_ref.at[here], codes, mask=inside[:, None] & (slot < slots)[None])
    pltriton.store(scales_ref.at[rows], scales, mask=inside)
    if offsets is not None:
        pltriton.store(rest[0].at[rows], offsets, mask=inside)
    if index_ref is not None:
        entry = jnp.arange(pl.next_power_of_2(kept), dtype=jnp.int32)
        column = pltriton.load(index_ref.at[jnp.minimum(entry, kept - 1)])
        shape = (block_m, entry.shape[0])
        values = pltriton.load(x_ref.at[jnp.broadcast_to(source, shape), jnp.broadcast_to(column[None], shape)])
        here = jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(entry[None], shape)
        pltriton.store(rest[-1].at[here], values, mask=inside[:, None] & (entry < kept)[None])


def _quantize(x, bits, symmetric, mode, interpret):
    """x float32 [R, C] -> (codes int32 [R, C], scales [R], offsets [R] or None)."""
    half, steps = 2 ** (bits - 1), 2**bits - 1
    if symmetric:
        largest = jnp.max(_bits(x) & 0x7FFFFFFF, axis=1)
        finite = largest < _INFINITY
        largest = _float(jnp.where(finite, largest, 0))
        scales = _positive(_over(largest, _where(finite, half - 1.0), interpret))
        codes = _integers(_quotient(x, scales, interpret)) & 0xFF
        offsets = None
    else:
        key = _ordered(_bits(x))
        low, high = jnp.min(key, axis=1), jnp.max(key, axis=1)
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
            codes = jnp.minimum(_quotient(x - low[:, None], scales, interpret), float(steps))
            offsets = low + half * scales
        else:
            scales = _positive(scales)
            zeros = jnp.clip(_round(_over(-low, scales, interpret), interpret), 0.0, float(steps))
            codes = _round(_quotient(x, scales, interpret), interpret) + zeros[:, None]
            codes = jnp.clip(codes, 0.0, float(steps))
            offsets = scales * (half - zeros)
        codes = _integers(codes) - half
        offsets = jnp.where(finite, offsets, jnp.nan)
    return jnp.where(finite[:, None], codes, 0), jnp.where(finite, scales, jnp.nan), offsets


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


def _integers(whole):
    """float32 within 2**22 of zero -> the nearest int32 plus a multiple of 256, by one addition."""
    return _bits(whole + _MAGIC)


def _round(x, interpret):
    return jnp.round(x) if interpret else _asm("cvt.rni.f32.f32 $0, $1;", x)


def _over(x, y, interpret):
    """x / y correctly rounded; a plain division would be compiled to an approximation."""
    return x / y if interpret else _asm("div.rn.f32 $0, $1, $2;", x, y)


def _quotient(x, scales, interpret):
    """x [R, C] / scales [R], correctly rounded wherever the result is a code."""
    if interpret:
        # spread first: XLA turns a division by one number a row into a product with its rounded reciprocal
        return x / jax.lax.optimization_barrier(jnp.broadcast_to(scales[:, None], x.shape))
    power = jnp.where(scales < 2.0**-60, 2.0**64, jnp.where(scales > 2.0**60, 2.0**-64, 1.0)).astype(jnp.float32)
    scales = scales * power
    inverse = _asm("rcp.rn.f32 $0, $1;", scales)
    return _asm(_DIVIDE, x, *(jnp.broadcast_to(row[:, None], x.shape) for row in (-scales, inverse, power)))


def _asm(code: str, *args: jax.Array) -> jax.Array:
    (value,) = pltriton.elementwise_inline_asm(
        code,
        args=args,
        constraints="=f" + ",f" * len(args),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
    )
    return value
