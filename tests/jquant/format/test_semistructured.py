"""2:4 weights: the equation entry by entry, NVIDIA's nibbles, the round trip, the size, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.format.semistructured import (
    SparseAffineWeight,
    dequantize_semistructured,
    pack_semistructured,
    unpack_semistructured,
    validate_semistructured,
)
from pallas_kernels.packing import unpack_codes

ROWS, COLUMNS = 5, 36  # no multiple of a word or of a period of the stream


def _problem(bits: int, group_size: int | None = None) -> tuple[np.ndarray, ...]:
    """Codes, mask (two of four in a random order), scales and that order."""
    rng = np.random.default_rng(bits)
    order = rng.permutation(COLUMNS).astype(np.int32)
    mask = np.zeros((ROWS, COLUMNS), bool)
    for n in range(ROWS):
        for four in order.reshape(-1, 4):
            mask[n, rng.choice(four, 2, replace=False)] = True
    codes = rng.integers(0, 2**bits, (ROWS, COLUMNS), dtype=np.int32)
    groups = 1 if group_size is None else -(-COLUMNS // group_size)
    return codes, mask, rng.normal(size=(ROWS, groups)).astype(np.float16), order


def _pack(bits: int, group_size: int | None = None) -> SparseAffineWeight:
    codes, mask, scales, order = map(jnp.asarray, _problem(bits, group_size))
    return pack_semistructured(codes, mask, scales, bits, order, group_size)


@pytest.mark.parametrize(("bits", "group_size"), [(2, None), (4, 8), (8, None)])
def test_weight_means_its_equation_and_unpacks_to_what_was_packed(bits: int, group_size: int | None) -> None:
    codes, mask, scales, order = _problem(bits, group_size)
    weight = _pack(bits, group_size)
    dense = np.zeros((ROWS, COLUMNS))
    for n in range(ROWS):
        for p, k in enumerate(order):
            if mask[n, k]:
                dense[n, k] = float(scales[n, p // (group_size or COLUMNS)]) * float(codes[n, k] - 2 ** (bits - 1))
    validate_semistructured(weight, "w")
    # one float32 product of numbers that float32 holds exactly
    np.testing.assert_allclose(dequantize_semistructured(weight), dense, rtol=1e-7)
    back, survivors = jax.jit(unpack_semistructured)(weight)
    np.testing.assert_array_equal(survivors, mask)
    np.testing.assert_array_equal(back, np.where(mask, codes, 2 ** (bits - 1)))
    again = pack_semistructured(back, survivors, weight.scales, bits, weight.order, group_size)
    for one, other in zip(jax.tree.leaves(weight), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_pattern_is_the_metadata_of_nvidia() -> None:
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    mask = np.zeros((1, 24), bool)
    for j, pair in enumerate(pairs):
        mask[0, [4 * j + i for i in pair]] = True
    codes = jnp.arange(24, dtype=jnp.int32)[None] % 16
    weight = pack_semistructured(codes, jnp.asarray(mask), jnp.ones((1, 1)), 4, jnp.arange(24))
    # two indices of two bits, the lower one in the low bits: the six values that a sparse mma instruction allows
    assert unpack_codes(weight.pattern, 4, 6).tolist() == [[0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110]]
    assert unpack_codes(weight.codes, 4, 12).tolist() == [
        np.flatnonzero(mask[0]).astype(int).tolist()[:8] + [k % 16 for k in np.flatnonzero(mask[0])[8:]]
    ]


def test_size_is_half_the_codes_and_a_bit_of_pattern() -> None:
    rows, columns = 64, 256
    order = jnp.arange(columns)
    mask = jnp.broadcast_to(order % 4 < 2, (rows, columns))
    codes = jnp.zeros((rows, columns), jnp.int32)
    weight = pack_semistructured(codes, mask, jnp.ones((rows, 1), jnp.float16), 4, order)
    stored = 8 * sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(weight))
    assert stored / (rows * columns) == 2 + 1 + 16 / columns + 16 / rows
    wide = 65540
    mask = jnp.broadcast_to(jnp.arange(wide) % 4 < 2, (1, wide))
    weight = pack_semistructured(mask.astype(jnp.int32), mask, jnp.ones((1, 1)), 2, jnp.arange(wide)[::-1])
    assert weight.order.dtype == jnp.int32 and _pack(4).order.dtype == jnp.uint16
    validate_semistructured(weight, "w")
    np.testing.assert_array_equal(dequantize_semistructured(weight), np.where(mask, -1.0, 0.0))


def test_packing_refuses_what_would_be_lost() -> None:
    codes, mask, scales, order = map(jnp.asarray, _problem(4))
    with pytest.raises(ValueError, match="the order in which the pattern was chosen"):
        pack_semistructured(codes, mask, scales, 4, jnp.arange(COLUMNS))
    with pytest.raises(ValueError, match="permutation"):
        pack_semistructured(codes, mask, scales, 4, order.at[0].set(order[1]))
    with pytest.raises(ValueError, match="keep 2 more of them as outliers"):
        pack_semistructured(codes[:, :34], mask[:, :34], scales, 4, order[:34])
    with pytest.raises(ValueError, match="multiple of 4"):
        pack_semistructured(codes, mask, scales, 4, order, 6)
    with pytest.raises(ValueError, match="scales"):
        pack_semistructured(codes, mask, scales, 4, order, 8)
    with pytest.raises(ValueError, match="shape of codes"):
        pack_semistructured(codes, mask[:, :4], scales, 4, order)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"codes": jnp.zeros((ROWS, 2), jnp.uint32)}, r"codes has shape \(5, 2\); expected \(5, 3\)"),
        ({"pattern": jnp.zeros((ROWS, 2), jnp.int32)}, "pattern is int32; expected uint32"),
        ({"scales": jnp.zeros((ROWS, 2))}, "scales has shape"),
        ({"order": jnp.zeros((COLUMNS,), jnp.int32)}, "order is int32; expected uint16"),
        ({"bits": 9}, "bits is 9"),
        ({"layout": "stream_t"}, "layout"),
        ({"shape": (ROWS, 38)}, "38 columns"),
        ({"group_size": 0}, "group_size is 0"),
    ],
)
def test_validation_names_what_is_off(change: dict, word: str) -> None:
    with pytest.raises(ValueError, match=f"layer.*{word}"):
        validate_semistructured(dataclasses.replace(_pack(4), **change), "layer")
