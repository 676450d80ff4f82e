"""Kept input columns as the threads of a warpgroup feed them to a tensor core: weights of 16 bits, not decoded.

    y^T [N, M] += W [N, k] x^T [k, M]       W the register operand of `wgmma` m64k16, as in `pallas_kernels.fragments`

W is padded with zeros to whole tiles of 64 x 64. Words are uint32 [ceil(N/64), ceil(k/64), 16, 128]; [i, c] holds the
tile of rows 64i.. and columns 64c.., whose 2048 words in a row are

    [4 steps s][128 threads][a0 a1 a2 a3]

so a thread reads the four registers of an instruction at once, without bank conflicts; the shape [16, 128] only serves
to copy them. Thread th of 128: warp w = th // 32, g = th % 32 // 4, t = th % 4; it owns rows r0 = 16w + g and
r1 = r0 + 8 of the tile, and a register holds two columns, the even one in its low half:

    a0 = (r0; 16s + 2t, +1)    a1 = (r1; 16s + 2t, +1)    a2 = (r0; 16s + 2t + 8, +9)    a3 = (r1; 16s + 2t + 8, +9)

`pallas_kernels.affine_matmul` and `pallas_kernels.codebook_matmul` add such a product to theirs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.fragments import THREADS, TILE

PLANES = 16  # rows of 128 words of a tile
DTYPES = ("bfloat16", "float16")

# A tile's weights [warp 4, half 2 (r0, r1), g 8, step 4, p 2 (+0, +8), t 4, e 2 (even, odd)]: row = 16w + 8h + g,
# column = 16s + 8p + 2t + e. In words: tile, step, w, g, t, then registers 2p + h of two halves e.
_SIZES = (4, 2, 8, 4, 2, 4, 2)
_AXES, _WORD_AXES = "iwhgcspte", "icswgtphe"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeptFragments:
    """Kept weights in the layout above: words uint32 [ceil(N/64), ceil(k/64), 16, 128] of pairs of `dtype`."""

    words: jax.Array
    dtype: str = dataclasses.field(metadata={"static": True})


def kept_shape(shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """The shape of the words of kept weights [N, k]."""
    return -(-shape[0] // TILE), -(-shape[1] // TILE), PLANES, THREADS


def prepare_kept(weight: jax.Array, dtype: Any) -> KeptFragments:
    """Kept weights [N, k] rounded to `dtype`, that of the activations, bfloat16 or float16. ValueError for another."""
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"kept columns cannot be multiplied in {name}; expected bfloat16 or float16")
    return KeptFragments(_pack(weight, name), name)


@functools.partial(jax.jit, static_argnames=("shape",))
def kept_weight(kept: KeptFragments, shape: tuple[int, int]) -> jax.Array:
    """The inverse of `prepare_kept`: weights [N, k] of `kept.dtype`, `shape` being (N, k)."""
    if kept.words.shape != kept_shape(shape):
        raise ValueError(
            f"words of shape {list(kept.words.shape)} do not hold {list(shape)} weights; expected "
            f"{list(kept_shape(shape))}"
        )
    blocks, tiles = kept.words.shape[:2]
    sizes = dict(zip(_AXES, (blocks, *_SIZES[:3], tiles, *_SIZES[3:]), strict=True))
    halves = jax.lax.bitcast_convert_type(kept.words, jnp.dtype(kept.dtype))
    ordered = halves.reshape([sizes[axis] for axis in _WORD_AXES])
    full = jnp.transpose(ordered, [_WORD_AXES.index(axis) for axis in _AXES])
    return full.reshape(blocks * TILE, tiles * TILE)[: shape[0], : shape[1]]


@functools.partial(jax.jit, static_argnames=("dtype",))
def _pack(weight: jax.Array, dtype: str) -> jax.Array:
    rows, columns = weight.shape
    shape = kept_shape((rows, columns))
    full = jnp.pad(weight.astype(dtype), [(0, -size % TILE) for size in weight.shape])
    split = full.reshape(shape[0], *_SIZES[:3], shape[1], *_SIZES[3:])
    ordered = jnp.transpose(split, [_AXES.index(axis) for axis in _WORD_AXES])
    return jax.lax.bitcast_convert_type(ordered, jnp.uint32).reshape(shape)
