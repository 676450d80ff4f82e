"""The only token, quantized or split where it is multiplied: its int8 codes lie in shared memory.

    codes[k] = round(x[k] / s),  s = max |x| / (2**(bits - 1) - 1)      `activation_quantize.quantize_rows`, symmetric
    x[k] ~ s (2**16 p[0, k] + 2**8 p[1, k] + p[2, k])                   `codebook_matmul.split_row`

bit for bit, but for codes of a token that is not finite, whose scale is NaN. A launch of its own for so little costs
1.4 to 1.8 us of the 31 to 56 that the product takes. Here all computing warpgroups of a CTA do it, every CTA for
itself, while the first weights are on their way, and the stages need no room for inputs.

In a queue behind the weights that fill all stages the token takes 2 or 3 us to arrive. Where weights are decoded as
fast as they come, that is hidden behind them, and copying starts at once. Beside tables, whose look-ups take longer
than the copies, only the first stage is copied until a token in pieces has arrived.

A thread has whole chunks of 16 inputs: number thread, thread + threads, .. It loads them all before it looks at one,
and keeps them from the first pass, for the largest magnitude, to the second, which makes the codes. In slot order word
t of a chunk is made of words t and t + 4 of x, as in `activation_quantize.rows`.

Shared memory, int8 [chunks of all stages, pieces, 16] and BEHIND_TOKEN bytes; pieces: 3, or 1. For the tensor core
these are core matrices of eight rows of 16 bytes, K-major without swizzle, which overlap: that of chunk c begins at
row 0 of it, and its rows from the pieces on are those of the following chunks. Their columns of the product are finite,
and nothing reads them, or they have the scale 0. So a token takes as many bytes as it has codes. Inputs past the end
have the code 0. Behind the last chunk, where columns of that kind are read, too:

    uint32 [16] the largest magnitude of every warp; float32 [8] the scales of the eight columns of the product
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.affine_matmul import instructions as ops
from pallas_kernels.affine_matmul.config import BEHIND_TOKEN, Config, Problem, token_bytes
from pallas_kernels.compat import Value, arith, constant

STAGES_BEFORE_TOKEN = 1  # copied before it has arrived, where others wait
_CHUNK = 16  # inputs
_SCALES = 64  # bytes behind the codes
_MAGIC = 12582912.0  # 1.5 * 2**23: v + _MAGIC holds the integer nearest to v in its low bits
_ONE, _TINY = 0x3F800000, 0x00800000  # float32: 1, and the least normal number
_SMALL, _LARGE = (127 - 60) << 23, ((127 + 60) << 23) + 1  # below 2**-60, above 2**60
_NAN = 0x7FFFFFFF
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00}
# of a token in pieces, see `pallas_kernels.codebook_matmul.token_pieces`
_CARRY, _PEAK = 0x010101, 22
_ROUND = (0x8080 - 0x101 * 0x4B400000) % 2**32  # 128 + 2**15, less the bits of _MAGIC, once more shifted by a byte

Pack = Callable[[list[Value]], list[Value]]


def token_scratch(problem: Problem, config: Config) -> dict[str, Any]:
    """The shared memory of the codes; none if x comes as it is multiplied."""
    if not problem.token_dtype:
        return {}
    return {"token": plgpu.SMEM((token_bytes(problem, config),), jnp.int8)}


def token_scales(token: Any) -> Any:
    """The float32 [8] of the columns' scales, as bytes."""
    return token.at[token.shape[0] - BEHIND_TOKEN + _SCALES :]


def goes_first(problem: Problem, beside_tables: bool) -> bool:
    """Whether all but the first weights wait until the token has arrived."""
    return bool(problem.token_dtype) and problem.pieces > 1 and beside_tables


def wait_for_token(config: Config, now: Any) -> None:
    """What the copying warpgroup does once, where a token goes first: before a copy, or behind the last one if there
    are few."""

    @plgpu.inline_mgpu(arg_types=())
    def wait(_: Any) -> None:
        ops.wait_for_told((config.warpgroups + 1) * compat.THREADS)

    pl.when(now)(lambda: wait())  # pyright: ignore[reportCallIssue]


def ask_for_token(problem: Problem, config: Config) -> Callable[[Any, Any], jax.Array]:
    """The function (x in global memory, warpgroup) -> chunks that every computing warpgroup calls first: what
    `make_token` takes, in `compat.registers_layout`."""
    count = 8 * len(_firsts(problem, config))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), compat.SCALAR), return_type=compat.registers_type(count, jnp.int32))
    def ask(_: Any, x: Value, warpgroup: Any) -> Any:
        loaded = load_chunks(problem, config, compat.address(x), _thread(warpgroup))
        return compat.array_of([word for chunk in loaded for word in chunk])

    return ask  # pyright: ignore[reportReturnType]


def make_token(problem: Problem, config: Config, weights_wait: bool) -> Callable[[jax.Array, Any, Any], None]:
    """The function (chunks, token in shared memory, warpgroup) that every computing warpgroup calls once, before its
    first product. weights_wait: for the token, all but the first of them."""
    count = 8 * len(_firsts(problem, config))

    @plgpu.inline_mgpu(arg_types=(compat.registers_layout(count), plgpu.RefType(), compat.SCALAR))
    def make(_: Any, chunks: Any, token: Value, warpgroup: Any) -> None:
        words = compat.registers_of(chunks)
        loaded = [words[i : i + 8] for i in range(0, count, 8)]
        quantize(problem, config, loaded, compat.address(token), _thread(warpgroup), weights_wait)

    return make  # pyright: ignore[reportReturnType]


def _thread(warpgroup: Any) -> Value:
    """The number of a computing thread through all warpgroups."""
    before = arith.muli(compat.scalar_of(warpgroup), constant(compat.THREADS))
    return arith.addi(before, compat.thread_in_warpgroup())


def _firsts(problem: Problem, config: Config) -> range:
    """The chunks of thread 0."""
    return range(0, problem.inputs // _CHUNK, config.warpgroups * compat.THREADS)


def load_chunks(problem: Problem, config: Config, x: Value, thread: Value) -> list[list[Value]]:
    """Asks for the chunks of a thread, eight words each, zeros past the last one; x is an address."""
    threads, real = config.warpgroups * compat.THREADS, problem.inputs // _CHUNK
    own = ops.address_of_chunk(x, thread, 2 * _CHUNK)
    return [
        ops.load_constants(own, 2 * _CHUNK * first, thread, None if first + threads <= real else real - first)
        for first in _firsts(problem, config)
    ]


def quantize(
    problem: Problem, config: Config, loaded: list[list[Value]], token: Value, thread: Value, weights_wait: bool
) -> None:
    """What one of the computing threads does with its chunks; token is an address."""
    threads, pieces = config.warpgroups * compat.THREADS, problem.pieces
    size = token_bytes(problem, config) - BEHIND_TOKEN
    chunks = size // (_CHUNK * pieces)
    largest = _largest(loaded, token, size, threads, thread)
    if weights_wait:
        ops.tell_threads(threads + compat.THREADS)
    infinity = _INFINITY[problem.token_dtype]
    finite = ops.where_below(largest, infinity, largest, constant(0))
    peak = ops.as_word(_low(finite, problem.token_dtype))
    column = arith.andi(thread, constant(7))
    if pieces == 1:
        pack, scale = _codes(problem, peak)
    else:
        pack, scale = _pieces(problem, peak, column)
    scale = ops.where_below(column, pieces, ops.where_below(largest, infinity, scale, constant(_NAN)), constant(0))
    # all that share a column write the same
    ops.store_shared(arith.addi(token, arith.muli(column, constant(4))), size + _SCALES, scale)
    place = arith.addi(token, arith.muli(thread, constant(_CHUNK * pieces)))
    for index, first in enumerate(range(0, chunks, threads)):
        words = pack(loaded[index]) if index < len(loaded) else [constant(0)] * 4 * pieces
        inside = None if first + threads <= chunks else chunks - first
        for row in range(pieces):
            offset = _CHUNK * (first * pieces + row)
            ops.store_chunk(place, offset, words[4 * row : 4 * row + 4], thread, inside)
    ops.fence_copies()
    ops.wait_for_threads(threads)


def _largest(loaded: list[list[Value]], token: Value, size: int, threads: int, thread: Value) -> Value:
    """The bits, 16 of them, of the largest magnitude of all threads: ordered as the numbers, not finite ones above."""
    words = [ops.and_(word, 0x7FFF7FFF) for chunk in loaded for word in chunk]
    pair = _tree(ops.larger_halves, words)
    own = ops.largest_of_warp(arith.maxui(ops.and_(pair, 0xFFFF), ops.shift(pair, -16)))
    warp = arith.shrui(thread, constant(5))
    ops.store_shared(arith.addi(token, arith.muli(warp, constant(4))), size, own)
    ops.wait_for_threads(threads)
    groups = [ops.load_shared(token, constant(size + 16 * group), 4) for group in range(threads // compat.THREADS)]
    return _tree(arith.maxui, [word for group in groups for word in group])


def _tree(larger: Callable[[Value, Value], Value], values: list[Value]) -> Value:
    """The largest of these, in few steps that wait for each other."""
    while len(values) > 1:
        pairs = [larger(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[2 * len(pairs) :]
    return values[0]


def _low(word: Value, dtype: str) -> Value:
    """The lower half of a word, as float32."""
    return ops.as_float(ops.shift(word, 16)) if dtype == "bfloat16" else ops.half_to_float(word)


def _high(word: Value, dtype: str) -> Value:
    """The upper half of a word, as float32."""
    if dtype == "bfloat16":
        return ops.as_float(ops.and_(word, 0xFFFF0000))
    return ops.half_to_float(ops.shift(word, -16))


def _fours(words: list[Value], dtype: str) -> list[list[Value]]:
    """The inputs of every word of the codes of a chunk: columns 2t, 2t + 8, 2t + 1, 2t + 9."""
    pairs = list(zip(words[:4], words[4:], strict=True))
    return [[_low(a, dtype), _low(b, dtype), _high(a, dtype), _high(b, dtype)] for a, b in pairs]


def _codes(problem: Problem, peak: Value) -> tuple[Pack, Value]:
    """What makes codes of a chunk, and the scale; peak: the largest magnitude, or 0 if that is not finite.

    The quotient is corrected as in `activation_quantize.rows`. A scale that would take the remainder out of the
    exponents has a power of two, and then the inputs have it: of float16 there is none.
    """
    dtype = problem.token_dtype
    scale = ops.as_word(ops.divide(ops.as_float(peak), float(2 ** (problem.token_bits - 1) - 1)))
    scale = ops.where_below(scale, 1, constant(_ONE), arith.maxui(scale, constant(_TINY)))
    divisor, power = ops.as_float(scale), None
    if dtype == "bfloat16":
        rest = ops.where_below(scale, _LARGE, constant(_ONE), constant((127 - 64) << 23))
        factor = ops.where_below(scale, _SMALL, constant((127 + 64) << 23), rest)
        divisor = ops.multiply(divisor, ops.as_float(factor))
        power = ops.merge(factor, 0xFFFF0000, ops.shift(factor, -16))
    inverse, negative = ops.reciprocal(divisor), ops.as_float(ops.xor(ops.as_word(divisor), 1 << 31))

    def code(x: Value) -> Value:
        quotient = ops.multiply(x, inverse)
        quotient = ops.multiply_add(ops.multiply_add(quotient, negative, x), inverse, quotient)
        return ops.as_word(ops.add(quotient, ops.float_constant(_MAGIC)))

    def pack(words: list[Value]) -> list[Value]:
        if power is not None:
            words = [ops.packed("mul", word, power, "bf16") for word in words]
        return [_bytes([code(x) for x in four], 0) for four in _fours(words, dtype)]

    return pack, scale


def _pieces(problem: Problem, peak: Value, column: Value) -> tuple[Pack, Value]:
    """What makes the three rows of digits of a chunk, the first one first, and the scale of that number `column`."""
    exponent = ops.shift(arith.addi(peak, constant(_CARRY)), -23)
    exponent = arith.maxui(exponent, constant(_PEAK + 1))
    power = ops.as_float(ops.shift(arith.subi(constant(2 * 127 + _PEAK), exponent), 23))
    steps = arith.subi(constant(8 * (problem.pieces - 1) - _PEAK), arith.muli(column, constant(8)))
    scale = ops.shift(arith.addi(exponent, steps), 23)

    eighth = ops.multiply(power, ops.float_constant(2.0**-8))
    magic = ops.float_constant(_MAGIC)

    def rounded(x: Value) -> Value:
        """X + 128 + 2**15: the first digit is byte 2, and the others, each with 128 added, are bytes 1 and 0."""
        # Sums with _MAGIC round to integers of 22 bits, so the first leaves a multiple of 256.
        high = ops.multiply_add(x, eighth, magic)
        rest = ops.multiply(ops.add(high, ops.float_constant(-_MAGIC)), ops.float_constant(-256.0))
        low = ops.add(ops.multiply_add(x, power, rest), magic)
        both = arith.addi(ops.shift(ops.as_word(high), 8), ops.as_word(low))
        return arith.addi(both, constant(_ROUND))

    def pack(words: list[Value]) -> list[Value]:
        fours = [[rounded(x) for x in four] for four in _fours(words, problem.token_dtype)]
        first = [_bytes(four, 2) for four in fours]
        rest = [ops.xor(_bytes(four, byte), 0x80808080) for byte in (1, 0) for four in fours]
        return first + rest

    return pack, scale


def _bytes(values: list[Value], byte: int) -> Value:
    """A byte of each of four registers as one register, the first one low."""
    pair = functools.partial(ops.permute, selector=0x40 + 0x11 * byte)
    return ops.permute(pair(values[0], values[1]), pair(values[2], values[3]), 0x5410)
