"""The layout "fragments": exact inverses on odd shapes, and every bit where the drawing says it is."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fragments import (
    BITS,
    Order,
    fragments_from_stream,
    fragments_shape,
    pack_fragments,
    slot_order,
    stream_from_fragments,
    unpack_fragments,
)
from pallas_kernels.packing import pack_codes

ORDERS = get_args(Order)
COLUMNS = (0, 8, 1, 9)  # and 2t: the sequence inside a step


def _codes(bits: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(bits).integers(0, 2**bits, shape, dtype=np.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("order", ORDERS)
def test_packing_is_exactly_undone(bits: int, order: Order) -> None:
    for shape in [(64, 64), (65, 1), (1, 130), (1100, 70)]:
        codes = jnp.asarray(_codes(bits, *shape))
        words = pack_fragments(codes, bits, order)
        assert words.dtype == jnp.uint32 and words.shape == fragments_shape(shape, bits)
        np.testing.assert_array_equal(unpack_fragments(words, bits, order, shape), codes)
        stream = pack_codes(codes, bits)
        np.testing.assert_array_equal(fragments_from_stream(stream, bits, order, shape[1]), words)
        np.testing.assert_array_equal(stream_from_fragments(words, bits, order, shape), stream)


def _nibbles(tile: np.ndarray, order: str, thread: int) -> list[int]:
    """Words n0..n3 of one thread of a tile [64, 64], by the drawing of the module."""
    warp, lane = divmod(thread, 32)
    g, t = divmod(lane, 4)
    rows = 16 * warp + g, 16 * warp + g + 8
    words = []
    for s in range(4):
        if order == "pairs":
            code = [tile[rows[h], 16 * s + 2 * t + d] for d in COLUMNS for h in (0, 1)]
            # (r0,2t) (r1,2t) (r0,2t+8) (r1,2t+8) (r0,2t+1) (r1,2t+1) (r0,2t+9) (r1,2t+9)
        else:
            u, h = divmod(s, 2)
            code = [tile[rows[h], 16 * (2 * u + v) + 2 * t + d] for v in (0, 1) for d in COLUMNS]
        words.append(sum(int(c) << (4 * j) for j, c in enumerate(code)))
    return words


def _tile_words(tile: np.ndarray, bits: int, order: str) -> list[int]:
    """The 128 * bits words of a tile, one thread after the other."""
    wide: list[int] = []
    narrow: list[int] = []
    if bits == 8:
        for u in (0, 1):
            for thread in range(128):
                warp, lane = divmod(thread, 32)
                g, t = divmod(lane, 4)
                for v in (0, 1):
                    for row in (16 * warp + g, 16 * warp + g + 8):
                        code = [tile[row, 32 * u + 16 * v + 2 * t + d] for d in COLUMNS]
                        wide.append(sum(int(c) << (8 * j) for j, c in enumerate(code)))
        return wide
    for thread in range(128):
        n = _nibbles(tile, order, thread)
        if bits == 4:
            wide += n
            continue
        if bits == 3 and order == "rows":
            whole = [n[j] | (n[3] >> (2 - j) & 0x11111111) << 3 for j in range(3)]
            wide += whole[:2]
            narrow.append(whole[2])
            continue
        low = [word & 0x33333333 for word in n]
        wide += [low[0] | low[1] << 2, low[2] | low[3] << 2]
        if bits == 3:
            narrow.append(sum((word >> 2 & 0x11111111) << j for j, word in enumerate(n)))
    return wide + narrow


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_code_lies_where_its_thread_expects_it(bits: int, order: Order) -> None:
    codes = _codes(bits, 70, 100)
    full = np.pad(codes, [(0, 58), (0, 28)])
    words = np.asarray(pack_fragments(jnp.asarray(codes), bits, order))
    for i in range(2):
        for c in range(2):
            tile = full[64 * i : 64 * i + 64, 64 * c : 64 * c + 64]
            assert words[i, c].reshape(-1).tolist() == _tile_words(tile, bits, order)


def test_narrow_planes_give_the_nibbles_back() -> None:
    tile = _codes(3, 64, 64)
    words = [int(w) for w in np.asarray(pack_fragments(jnp.asarray(tile), 3, "pairs")).reshape(-1)]
    for thread in (0, 37, 127):
        planes, q = words[2 * thread : 2 * thread + 2], words[256 + thread]
        for j, expected in enumerate(_nibbles(tile, "pairs", thread)):
            low = (planes[j // 2] >> 2 * (j % 2)) & 0x33333333
            assert low | ((q << 2 >> j) & 0x44444444) == expected


def test_slots_follow_the_bytes_of_the_operand() -> None:
    """Byte j of register a0 (a2) of thread t must meet slot 4t + j of the first (second) block of 16."""
    columns = np.broadcast_to(np.arange(64, dtype=np.uint8), (64, 64))
    words = np.asarray(pack_fragments(jnp.asarray(columns), 8, "pairs")).reshape(2, 128, 4)
    slots = slot_order(64)
    for u in (0, 1):
        for thread in range(4):
            for register in range(4):
                block = 32 * u + 16 * (register // 2)
                expected = slots[block + 4 * thread : block + 4 * thread + 4]
                got = [int(words[u, thread, register]) >> 8 * j & 255 for j in range(4)]
                assert got == expected.tolist()
    assert sorted(slots.tolist()) == list(range(64)) and slots[:8].tolist() == [0, 8, 1, 9, 2, 10, 3, 11]
    with pytest.raises(ValueError, match="multiple of 16"):
        slot_order(20)


def test_packing_goes_by_parts_of_the_rows() -> None:
    """No temporary of four bytes a code: the largest matrices leave no room for it."""
    codes = jax.ShapeDtypeStruct((4096, 512), jnp.uint8)
    memory = jax.jit(pack_fragments, static_argnums=(1, 2)).lower(codes, 4, "pairs").compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes <= 2 * codes.size


def test_bad_arguments_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="expected one of 2, 3, 4, 8"):
        pack_fragments(jnp.zeros((4, 4), jnp.uint8), 5, "pairs")
    with pytest.raises(ValueError, match="expected 'pairs' or 'rows'"):
        pack_fragments(jnp.zeros((4, 4), jnp.uint8), 4, "columns")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"expected \[1, 1, 4, 128\]"):
        unpack_fragments(jnp.zeros((1, 1, 3, 128), jnp.uint32), 4, "pairs", (4, 4))
