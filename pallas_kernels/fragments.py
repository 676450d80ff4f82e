"""The layout "fragments": packed codes in the order in which the threads of a warpgroup feed them to a tensor core.

The kernels compute y^T [N, M] = W [N, K] x^T [K, M] with W as the register operand of `wgmma`, decoded in registers
from words that every thread reads for itself: one wide shared-memory load without bank conflicts, no exchange.

W is padded with code 0 to whole tiles of 64 x 64. Words are uint32 [ceil(N/64), ceil(K/64), bits, 128]; [i, c] holds
the tile of rows 64i.. and columns 64c.., 128 * bits words in a row, whose shape [bits, 128] only serves to copy it.

Thread th of 128: warp w = th // 32, g = th % 32 // 4, t = th % 4. It owns rows r0 = 16w + g and r1 = r0 + 8 of the
tile, and in step s = 0..3, columns 16s.., the four columns 16s + {2t, 2t+1, 2t+8, 2t+9} of both rows: the registers
of `wgmma` m64k16 are a0 = (r0; 2t, 2t+1), a1 = (r1; 2t, 2t+1), a2 = (r0; 2t+8, 2t+9), a3 = (r1; 2t+8, 2t+9).
These 32 codes are four words n0..n3 of eight nibbles, in one of two orders:

  order "pairs" (a grid a group): word n_s is step s
    nibble      7        6        5        4        3        2        1        0
    code     r1,2t+9  r0,2t+9  r1,2t+1  r0,2t+1  r1,2t+8  r0,2t+8  r1,2t    r0,2t
    so register a_i of the step is (n_s >> 4i) & 0x000f000f, two codes as two halves

  order "rows" (a table a row): word n_{2u} is row r0, n_{2u+1} is row r1 of steps 2u and 2u+1
    nibble      7        6        5        4        3        2        1        0
    column    2t+9     2t+1     2t+8     2t       2t+9     2t+1     2t+8     2t      (see SLOT below for the order)
    step      2u+1     2u+1     2u+1     2u+1     2u       2u       2u       2u
    so a half word is the selector of four codes of one row

In both, a step lists columns {2t, 2t+8, 2t+1, 2t+9} in this sequence. An 8-bit operand takes four codes a register
in the sequence in which they come, so 8-bit activations lie permuted inside each block of 16 columns: slot 4t + j
holds column SLOT[j] of {2t, 2t+8, 2t+1, 2t+9} (`slot_order`). The four registers of m64k32 then are
a0 = (r0; step 2u), a1 = (r1; step 2u), a2 = (r0; step 2u+1), a3 = (r1; step 2u+1).

How the words of a tile lie in its 128 * bits words:

  4 bits   [128 threads][n0 n1 n2 n3]
  3 bits   "pairs": [128][P0 P1], then [128][Q]
           P0 = n0 & 3 | (n1 & 3) << 2, P1 the same of n2 and n3, nibble by nibble; nibble j of Q holds bit 2 of
           nibble j of n0, n1, n2, n3 in bits 0, 1, 2, 3
           "rows": [128][W0 W1], then [128][W2]
           Wj = nj | (bit 2 - j of n3) << 3, nibble by nibble
  2 bits   [128][P0 P1]
  8 bits   [2 fragments u][128][a0 a1 a2 a3], the registers of m64k32, a byte a code (one order)

Codes are stored as they are, 0 .. 2**bits - 1. Two's complement would save nothing: the XOR that it takes off 8-bit
operands fits into the three-input logic instruction that isolates the nibbles anyway.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.packing import pack_codes, unpack_codes

Order = Literal["pairs", "rows"]
BITS = (2, 3, 4, 8)
TILE = 64  # rows and columns of a tile
THREADS = 128
_ROWS_AT_ONCE = 1024  # bounds the temporaries

# A tile's codes [warp 4, half 2 (r0, r1), g 8, u 2, v 2, p 2 (+0, +8), t 4, e 2 (even, odd)]: row = 16w + 8h + g,
# column = 32u + 16v + 8p + 2t + e. The letters below say in which order the axes are packed, nibble order last.
_AXES = "whguvpte"
_WORD_AXES = {"pairs": "wgtuveph", "rows": "wgtuhvep", "bytes": "uwgtvhep"}


def fragments_shape(shape: tuple[int, int], bits: int) -> tuple[int, int, int, int]:
    """The shape of the words of a matrix [N, K]."""
    return -(-shape[0] // TILE), -(-shape[1] // TILE), bits, THREADS


@functools.partial(jax.jit, static_argnames=("bits", "order"))
def pack_fragments(codes: jax.Array, bits: int, order: Order) -> jax.Array:
    """Packs codes [N, K] in [0, 2**bits) into words uint32 [ceil(N/64), ceil(K/64), bits, 128]."""
    _check(bits, order)
    blocks = _row_blocks(codes.astype(jnp.uint8))
    return jax.lax.map(functools.partial(_pack_block, bits=bits, order=order), blocks, batch_size=_batch())


@functools.partial(jax.jit, static_argnames=("bits", "order", "shape"))
def unpack_fragments(words: jax.Array, bits: int, order: Order, shape: tuple[int, int]) -> jax.Array:
    """The inverse of `pack_fragments`: uint8 codes [N, K], `shape` being (N, K)."""
    _check(bits, order, words, shape)
    unpack = functools.partial(_unpack_block, bits=bits, order=order)
    codes = jax.lax.map(unpack, words, batch_size=_batch())
    return codes.reshape(-1, codes.shape[-1])[: shape[0], : shape[1]]


@functools.partial(jax.jit, static_argnames=("bits", "order", "columns"))
def fragments_from_stream(stream: jax.Array, bits: int, order: Order, columns: int) -> jax.Array:
    """Words in this layout from stream words [N, ceil(K * bits / 32)] of `columns` = K codes a row.

    The codes themselves exist only for some rows at a time.
    """
    _check(bits, order)

    def pack(rows: jax.Array) -> jax.Array:
        codes = unpack_codes(rows, bits, columns)
        return _pack_block(jnp.pad(codes, [(0, 0), (0, -columns % TILE)]), bits, order)

    rows = jnp.pad(stream, [(0, -stream.shape[0] % TILE), (0, 0)])
    return jax.lax.map(pack, rows.reshape(-1, TILE, rows.shape[1]), batch_size=_batch())


@functools.partial(jax.jit, static_argnames=("bits", "order", "shape"))
def stream_from_fragments(words: jax.Array, bits: int, order: Order, shape: tuple[int, int]) -> jax.Array:
    """The inverse of `fragments_from_stream`: stream words [N, ceil(K * bits / 32)]."""
    _check(bits, order, words, shape)

    def unpack(block: jax.Array) -> jax.Array:
        return pack_codes(_unpack_block(block, bits, order)[:, : shape[1]], bits)

    stream = jax.lax.map(unpack, words, batch_size=_batch())
    return stream.reshape(-1, stream.shape[-1])[: shape[0]]


def slot_order(columns: int) -> jax.Array:
    """The column that each slot of 8-bit activations holds: int32 [columns], columns a multiple of 16.

    x_slots = x[:, slot_order(K)]; in every block of 16, slots 4t..4t+3 hold columns 2t, 2t+8, 2t+1, 2t+9.
    """
    if columns % 16:
        raise ValueError(f"{columns} columns cannot be put in slots; expected a multiple of 16, pad x with zeros")
    slot = jnp.arange(columns, dtype=jnp.int32)
    # slot = 16 * block + 4t + 2e + p holds column 16 * block + 8p + 2t + e
    t, e, p = (slot >> 2) & 3, (slot >> 1) & 1, slot & 1
    return (slot & ~15) + 8 * p + 2 * t + e


def _batch() -> int:
    return _ROWS_AT_ONCE // TILE


def _row_blocks(codes: jax.Array) -> jax.Array:
    """Codes [N, K] padded and cut into [ceil(N/64), 64, 64 * ceil(K/64)]."""
    codes = jnp.pad(codes, [(0, -size % TILE) for size in codes.shape])
    return codes.reshape(-1, TILE, codes.shape[1])


def _axes(bits: int, order: Order) -> str:
    return _WORD_AXES["bytes" if bits == 8 else order]


def _pack_block(codes: jax.Array, bits: int, order: Order) -> jax.Array:
    """Words [K/64, bits, 128] of the tiles of 64 rows [64, K]."""
    tiles = codes.reshape(4, 2, 8, -1, 2, 2, 2, 4, 2)
    axes = _axes(bits, order)
    places = ["whg.uvpte".index(letter) for letter in "." + axes]
    ordered = jnp.transpose(tiles, places)
    if bits == 8:
        bytes_ = ordered.reshape(tiles.shape[3], 8 * THREADS, 4)
        return _join(bytes_, 8).reshape(-1, bits, THREADS)
    nibbles = _join(ordered.reshape(tiles.shape[3], THREADS, 4, 8), 4)  # n0..n3 of every thread
    if bits == 4:
        return nibbles.reshape(-1, bits, THREADS)
    if bits == 3 and order == "rows":
        fourth = nibbles[..., 3:] >> jnp.array([2, 1, 0], jnp.uint32)
        whole = nibbles[..., :3] | ((fourth & jnp.uint32(0x11111111)) << jnp.uint32(3))
        planes = [whole[..., :2].reshape(-1, 2 * THREADS), whole[..., 2]]
        return jnp.concatenate(planes, axis=1).reshape(-1, bits, THREADS)
    low = nibbles & jnp.uint32(0x33333333)
    planes = [(low[..., 0::2] | (low[..., 1::2] << jnp.uint32(2))).reshape(-1, 2 * THREADS)]
    if bits == 3:
        high = (nibbles >> jnp.uint32(2)) & jnp.uint32(0x11111111)
        shifted = high << jnp.arange(4, dtype=jnp.uint32)
        planes.append(shifted[..., 0] | shifted[..., 1] | shifted[..., 2] | shifted[..., 3])
    return jnp.concatenate(planes, axis=1).reshape(-1, bits, THREADS)


def _unpack_block(words: jax.Array, bits: int, order: Order) -> jax.Array:
    """Codes [64, K] from the words [K/64, bits, 128] of 64 rows."""
    tiles = words.shape[0]
    flat = words.reshape(tiles, -1)
    if bits == 8:
        codes = _split(flat, 8)
    elif bits == 4:
        codes = _split(flat, 4)
    elif bits == 3 and order == "rows":
        whole = jnp.concatenate([flat[:, : 2 * THREADS].reshape(tiles, THREADS, 2), flat[:, 2 * THREADS :, None]], 2)
        bit = (whole >> jnp.uint32(3)) & jnp.uint32(0x11111111)
        fourth = (bit[..., :1] << jnp.uint32(2)) | (bit[..., 1:2] << jnp.uint32(1)) | bit[..., 2:]
        codes = _split(jnp.concatenate([whole & jnp.uint32(0x77777777), fourth], axis=2), 4)
    else:
        planes = flat[:, : 2 * THREADS].reshape(tiles, THREADS, 2, 1)
        nibbles = (planes >> jnp.array([0, 2], jnp.uint32)) & jnp.uint32(0x33333333)
        nibbles = nibbles.reshape(tiles, THREADS, 4)
        if bits == 3:
            high = (flat[:, 2 * THREADS :, None] >> jnp.arange(4, dtype=jnp.uint32)) & jnp.uint32(0x11111111)
            nibbles = nibbles | (high << jnp.uint32(2))
        codes = _split(nibbles, 4)
    axes = _axes(bits, order)
    sizes = {"w": 4, "h": 2, "g": 8, "u": 2, "v": 2, "p": 2, "t": 4, "e": 2}
    ordered = codes.reshape(tiles, *(sizes[letter] for letter in axes))
    places = [("." + axes).index(letter) for letter in "whg.uvpte"]
    return jnp.transpose(ordered, places).reshape(TILE, -1)


def _join(codes: jax.Array, width: int) -> jax.Array:
    """Codes [..., 32 / width] as one uint32, the first lowest."""
    word = jnp.zeros(codes.shape[:-1], jnp.uint32)
    for j in range(32 // width):
        word = word | (codes[..., j].astype(jnp.uint32) << jnp.uint32(width * j))
    return word


def _split(words: jax.Array, width: int) -> jax.Array:
    shifts = jnp.arange(32 // width, dtype=jnp.uint32) * jnp.uint32(width)
    return ((words[..., None] >> shifts) & jnp.uint32(2**width - 1)).astype(jnp.uint8)


def _check(bits: int, order: str, words: jax.Array | None = None, shape: tuple[int, int] | None = None) -> None:
    if bits not in BITS:
        raise ValueError(f"there are no fragments of {bits} bits; expected one of {', '.join(map(str, BITS))}")
    if order not in ("pairs", "rows"):
        raise ValueError(f"order {order!r} is unknown; expected 'pairs' or 'rows'")
    if words is not None and shape is not None and words.shape != fragments_shape(shape, bits):
        raise ValueError(
            f"words of shape {list(words.shape)} do not hold {list(shape)} codes of {bits} bits; "
            f"expected {list(fragments_shape(shape, bits))}"
        )
