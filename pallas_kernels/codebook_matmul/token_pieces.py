"""One 16-bit token as three rows of int8, for tables of int8 entries; the Triton backend of Pallas.

    x[k] ~ s * X[k],    X[k] = 2**16 p[0, k] + 2**8 p[1, k] + p[2, k],    p int8,    s a power of two

so that the 8-bit tensor core computes it, each row of p as a token of its own, and the sums are added with the scales
(2**16, 2**8, 1) * s (`Problem.pieces`). A look-up for an 8-bit operand takes fewer instructions than one for a 16-bit
operand, and a product of one token uses one of the tensor core's eight columns in any case.

X is x / s rounded to the nearest, of two the even one, and s the smallest power of two with
|X| <= 127 * (2**16 + 2**8 + 1) = 8355711: all three digits are balanced, and 2**23 would make the first one 128. So
s / 2 < 1.2e-7 max |x|, which is what a residual can be: a bfloat16 value down to 2**-14 of the token's largest is
exact. s is a normal number, 2**-126 at least, so values of tokens below 2**-104 are rounded to multiples of it. A token
that is not finite gets zeros and the scale NaN. A row of p has sums as any 8-bit token, in int32 for K up to
`int_matmul.LONGEST_SUM`; rows meet as float32.

Rows are in `slot_order`, filled up with zeros to whole 128 columns, as the matrix kernel reads them. Every program
reads the whole token for its largest value, and writes `_SLOTS` slots of the three rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.activation_quantize.xla import slot_places
from pallas_kernels.half_tokens.xla import magnitudes, power
from pallas_kernels.token_in_registers import load_token, rounded_even, warps_of

PIECES = 3
LARGEST_K = 32768
_SLOTS = 1024  # of a program
_ALIGNMENT = 128  # columns of x that the matrix kernel copies at a time
_INFINITY = 0x7F800000
_CARRY = 0x010101  # reaches the exponent of a float32 just above 8355711 * 2**n
_PEAK = 22  # exponent of the largest X


def supported_pieces(tokens: int, columns: int, dtype: jax.typing.DTypeLike) -> str | None:
    """None if the kernel takes x [tokens, columns], else the reason why not."""
    if jnp.dtype(dtype).name not in ("bfloat16", "float16"):
        return f"activations are {jnp.dtype(dtype).name}, not bfloat16 or float16"
    if tokens != 1:
        return f"{tokens} tokens; pieces are made of one"
    if not 1 <= columns <= LARGEST_K:
        return f"K={columns} is not in 1..{LARGEST_K}, a token in registers"
    return None


def split_row(x: jax.Array, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """(int8 [3, K rounded up to 128] in slots, scales float32 [3]) of x [1, K], bit for bit those of `split_token`.

    ValueError with the reason where `supported_pieces` has one.
    """
    tokens, width = x.shape
    if (reason := supported_pieces(tokens, width, x.dtype)) is not None:
        raise ValueError(f"the kernel that splits a token cannot serve this: {reason}")
    slots = _slots(width)
    pieces, scales = pl.pallas_call(
        functools.partial(_kernel, interpret),
        out_shape=[jax.ShapeDtypeStruct((PIECES, slots), jnp.int8), jax.ShapeDtypeStruct((PIECES,), jnp.float32)],
        grid=(1, pl.cdiv(slots, _SLOTS)),
        compiler_params=pltriton.CompilerParams(num_warps=warps_of(width), num_stages=1),
        interpret=interpret,
        name="split_row",
    )(x)
    return pieces, scales


def split_token(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `split_row` computes, in jax.numpy; for K of any length."""
    place = slot_places(jnp.arange(_slots(x.shape[1]), dtype=jnp.int32))
    wide = jnp.pad(x[0].astype(jnp.float32), (0, place.shape[0] - x.shape[1]))
    finite, exponent = _range(jnp.max(magnitudes(wide)))
    digits = _digits(wide[place], finite, exponent, True)
    return jnp.stack(digits), jnp.where(finite, _scales(exponent, jnp.arange(PIECES, dtype=jnp.int32)), jnp.nan)


def _kernel(interpret, x_ref, pieces_ref, scales_ref):
    width, slots = x_ref.shape[1], pieces_ref.shape[1]
    slot = pl.program_id(1) * _SLOTS + jnp.arange(_SLOTS, dtype=jnp.int32)
    place = slot_places(slot)
    # not from the token in registers, where it would have to travel between threads
    own = pltriton.load(x_ref.at[jnp.zeros_like(place), place], mask=place < width, other=0.0)
    finite, exponent = _range(jnp.max(magnitudes(load_token(x_ref)[0])))
    for piece, digit in enumerate(_digits(own.astype(jnp.float32), finite, exponent, interpret)):
        pltriton.store(pieces_ref.at[jnp.full_like(slot, piece), slot], digit, mask=slot < slots)
    piece = jnp.arange(pl.next_power_of_2(PIECES), dtype=jnp.int32)
    scales = jnp.where(finite, _scales(exponent, piece), jnp.nan)
    pltriton.store(scales_ref.at[piece], scales, mask=(piece < PIECES) & (pl.program_id(1) == 0))


def _slots(columns: int) -> int:
    return -(-columns // _ALIGNMENT) * _ALIGNMENT


def _range(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(whether all is finite, the biased exponent of 2**22 s) from the largest of the token's `magnitudes`."""
    finite = largest < _INFINITY
    exponent = (jnp.where(finite, largest, 0) + _CARRY) >> 23
    return finite, jnp.maximum(exponent, _PEAK + 1)


def _digits(x: jax.Array, finite: jax.Array, exponent: jax.Array, interpret: bool) -> list[jax.Array]:
    """p of float32 x, int8 arrays like it."""
    whole = rounded_even(x * power(2 * 127 + _PEAK - exponent), interpret)
    rest = jnp.where(finite, whole, 0.0).astype(jnp.int32)
    digits = []
    for _ in range(PIECES):
        digits.append(rest.astype(jnp.int8))  # the low byte, from -128 to 127
        rest = (rest + 128) >> 8
    return digits[::-1]


def _scales(exponent: jax.Array, piece: jax.Array) -> jax.Array:
    """s * 2**(8 * (2 - piece)), float32."""
    return power(exponent - _PEAK + 8 * (PIECES - 1 - piece))
