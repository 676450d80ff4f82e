"""Bit layouts of packed codes, pack and unpack side by side.

**stream** is the canonical order, the only one checkpoints hold. The codes of one row are a little-endian bit stream,
least significant bit first, in uint32 words: code i of b bits occupies bits [i*b, i*b + b), straddling two words
where it must. It equals the `pack-quantized` stream of compressed-tensors (0.18 and later). For b = 3:

    word 0                                                      word 1
    bit 0..2  3..5  6..8  ...  27..29  30 31 | 0     1..3   4..6  ...
    code 0    1     2     ...  9       10 (its low 2 bits, then its high bit in word 1)  11 ...

32 codes always fill exactly b words, so every width is handled with a period of 32 codes.

Shapes: codes [..., K] (uint8, or int32 where arithmetic follows), words uint32 [..., ceil(K * bits / 32)].

**stream_t** is the same words transposed to [ceil(K * bits / 32), N]: consecutive rows of the matrix lie in
consecutive lanes, which is what a CPU (or any machine with wide lanes) wants for a matrix-vector product.
"""

import jax
import jax.numpy as jnp

WORD_BITS = 32
_PERIOD = 32  # codes after which the stream is word-aligned again, whatever the width


def num_words(count: int, bits: int) -> int:
    """Words that hold `count` codes of `bits` bits."""
    return -(-count * bits // WORD_BITS)


def pack_codes(codes: jax.Array, bits: int) -> jax.Array:
    """Packs integer codes [..., K] in [0, 2**bits) into stream words uint32 [..., ceil(K * bits / 32)]."""
    _check_bits(bits)
    count = codes.shape[-1]
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -count % _PERIOD)]
    blocks = jnp.pad(codes.astype(jnp.uint32), padding).reshape(*codes.shape[:-1], -1, _PERIOD)
    words = [jnp.zeros(blocks.shape[:-1], jnp.uint32)] * bits
    for i in range(_PERIOD):
        word, offset = divmod(i * bits, WORD_BITS)
        words[word] = words[word] | (blocks[..., i] << jnp.uint32(offset))
        if offset + bits > WORD_BITS:
            words[word + 1] = words[word + 1] | (blocks[..., i] >> jnp.uint32(WORD_BITS - offset))
    stream = jnp.stack(words, axis=-1).reshape(*codes.shape[:-1], -1)
    return stream[..., : num_words(count, bits)]


def unpack_codes(words: jax.Array, bits: int, count: int) -> jax.Array:
    """The inverse of `pack_codes`: uint8 codes [..., count] from stream words."""
    _check_bits(bits)
    if words.shape[-1] != num_words(count, bits):
        raise ValueError(
            f"{words.shape[-1]} words do not hold {count} codes of {bits} bits; expected {num_words(count, bits)} words"
        )
    mask = jnp.uint32(2**bits - 1)
    if WORD_BITS % bits == 0:  # no code straddles: one broadcast shift
        shifts = jnp.arange(WORD_BITS // bits, dtype=jnp.uint32) * jnp.uint32(bits)
        codes = (words[..., None] >> shifts) & mask
    else:
        padding = [(0, 0)] * (words.ndim - 1) + [(0, -words.shape[-1] % bits)]
        blocks = jnp.pad(words, padding).reshape(*words.shape[:-1], -1, bits)
        columns = []
        for i in range(_PERIOD):
            word, offset = divmod(i * bits, WORD_BITS)
            code = blocks[..., word] >> jnp.uint32(offset)
            if offset + bits > WORD_BITS:
                code = code | (blocks[..., word + 1] << jnp.uint32(WORD_BITS - offset))
            columns.append(code & mask)
        codes = jnp.stack(columns, axis=-1)
    return codes.astype(jnp.uint8).reshape(*words.shape[:-1], -1)[..., :count]


def stream_window(words: jax.Array, index: jax.Array, bits: int, count: int) -> jax.Array:
    """Codes [index * count, index * count + count) of transposed words [..., W, N], as one uint32 [..., N].

    Code i of them lies in bits [i * bits, (i + 1) * bits). `index` may be traced; `count * bits` must not exceed 32.
    Codes past the end of the stream are arbitrary: a window may straddle two words, and where the second lies past the
    end the last word is read in its place.
    """

    def row(place: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(words, place, axis=-2, keepdims=False)

    start = index * (count * bits)
    word = jax.lax.div(start, jnp.int32(WORD_BITS))
    offset = jax.lax.rem(start, jnp.int32(WORD_BITS)).astype(jnp.uint32)
    if WORD_BITS % (count * bits) == 0:
        return row(word) >> offset
    # two shifts, because shifting 32 bits by 32 is undefined
    return (row(word) >> offset) | ((row(word + 1) << jnp.uint32(1)) << (jnp.uint32(WORD_BITS - 1) - offset))


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits cannot be packed; expected 1 to 8 bits")
