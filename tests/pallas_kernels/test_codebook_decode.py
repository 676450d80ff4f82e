"""Decoding by look-ups in registers, its instructions carried out by NumPy for all threads of a warpgroup at once."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.codebook_matmul.decode import (
    INTEGER_OPERATIONS,
    biased_table,
    decode_tile,
    table_planes,
    table_words,
    words_per_thread,
)
from pallas_kernels.codebook_matmul.fixed_point import fixed_point_tables
from pallas_kernels.fragments import pack_fragments

ROWS_OF = np.array([16 * (th // 32) + th % 32 // 4 for th in range(128)])
T = np.arange(128) % 4


@dataclasses.dataclass
class Emulated:
    """The instructions on uint32 arrays, as PTX defines them, counted by the pipe that executes them."""

    integer: int = 0
    multiplier: int = 0
    floats: int = 0

    def _word(self, value: Any) -> np.ndarray:
        return np.asarray(value, np.uint32)

    def logic(self, a: Any, b: Any, c: Any, table: int) -> np.ndarray:
        self.integer += 1
        a, b, c = (self._word(x) for x in (a, b, c))
        result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
        for bit in range(8):  # bit = the inputs a, b, c as a binary number
            if table >> bit & 1:
                x, y, z = (word if bit >> i & 1 else ~word for i, word in ((2, a), (1, b), (0, c)))
                result |= x & y & z
        return result

    def mask(self, a: Any, mask: int) -> np.ndarray:
        self.integer += 1
        return self._word(a) & self._word(mask)

    def permute(self, a: Any, b: Any, selector: Any) -> np.ndarray:
        self.integer += 1
        a, b, selector = np.broadcast_arrays(self._word(a), self._word(b), self._word(selector))
        result = np.zeros(a.shape, np.uint32)
        for i in range(4):
            nibble = selector >> 4 * i & 15
            source = np.where(nibble & 4, b, a)
            byte = source >> (8 * (nibble & 3)) & 255
            byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
            result |= byte.astype(np.uint32) << np.uint32(8 * i)
        return result

    def shift_right(self, a: Any, count: int) -> np.ndarray:
        self.integer += 1
        return self._word(a) >> np.uint32(count)

    def shift_add(self, a: Any, count: int, addend: Any) -> np.ndarray:
        self.integer += 1
        return (self._word(a) >> np.uint32(count)) + self._word(addend)

    def multiply_add(self, a: Any, factor: int, addend: int) -> np.ndarray:
        self.multiplier += 1
        return (self._word(a).astype(np.uint64) * factor + addend).astype(np.uint32)

    def subtract_halves(self, a: Any, b: int) -> np.ndarray:
        self.floats += 1
        difference = np.ascontiguousarray(self._word(a)).view(np.float16) - np.array([b], np.uint32).view(np.float16)[0]
        return difference.astype(np.float16).view(np.uint32)


def _decode(codes: np.ndarray, codebook: Any, bits: int, operand: Any) -> tuple[np.ndarray, Emulated]:
    """The tile [64, 64] as the tensor core would see it; int8 in the order of the slots' columns. Of 16-bit entries for
    int8 operands there are two, [2, 64, 64]: their low bytes and their high ones."""
    size, operand = codebook.dtype.itemsize, np.dtype(operand)
    planes = np.asarray(table_planes(jnp.asarray(codebook)))
    assert planes.shape == (table_words(bits, size), 64)
    words = np.asarray(pack_fragments(jnp.asarray(codes), bits, "rows")).reshape(-1)
    mine, place = [], 0
    for count in words_per_thread(bits):
        plane = words[place : place + 128 * count].reshape(128, count)
        mine += [plane[:, i] for i in range(count)]
        place += 128 * count
    machine = Emulated()
    tables = [list(planes[:, ROWS_OF]), list(planes[:, ROWS_OF + 8])]
    if size < operand.itemsize:
        tables = [biased_table(table, lambda word, mask: word ^ np.uint32(mask)) for table in tables]
    steps = decode_tile(machine, mine, tables, bits, size, operand.itemsize)
    tiles = max(1, size // operand.itemsize)
    dense = np.zeros((tiles, 64, 64), operand)
    for step, registers in enumerate(steps):
        plane, s = divmod(step, len(steps) // tiles)
        for i, register in enumerate(registers):
            rows = ROWS_OF + 8 * (i % 2)
            values = np.ascontiguousarray(register).view(operand).reshape(128, -1)
            if operand.itemsize == 2:
                columns = [16 * s + 8 * (i // 2) + 2 * T, 16 * s + 8 * (i // 2) + 2 * T + 1]
            else:
                columns = [32 * s + 16 * (i // 2) + 2 * T + d for d in (0, 8, 1, 9)]
            for j, column in enumerate(columns):
                dense[plane, rows, column] = values[:, j]
    return dense if tiles > 1 else dense[0], machine


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.int8])
def test_every_thread_gets_its_operand(bits: int, dtype: Any) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (64, 64), dtype=np.uint8)
    # all signs and bytes, so that a nibble with its top bit set, which replicates a sign, would show
    codebook = rng.integers(-128, 128, (64, 2**bits)).astype(dtype) * np.asarray(1, dtype)
    if dtype != np.int8:
        codebook = (rng.normal(size=(64, 2**bits)) * 10.0 ** rng.integers(-4, 4, (64, 2**bits))).astype(dtype)
    dense, machine = _decode(codes, codebook, bits, dtype)
    expected = np.take_along_axis(codebook, codes.astype(np.int64), axis=1)
    np.testing.assert_array_equal(dense.view(np.uint8), expected.view(np.uint8))
    # a thread decodes 32 weights a tile; the module's table says the same
    count = {(2, 2): 38, (3, 2): 45, (4, 2): 84, (2, 1): 18, (3, 1): 21, (4, 1): 44}
    size = np.dtype(dtype).itemsize
    assert machine.integer == count[bits, size] and machine.floats == 0
    assert abs(machine.integer / 32 - INTEGER_OPERATIONS[bits, size, size]) <= 0.005


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_int8_entries_become_float16_operands_exactly(bits: int) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (64, 64), dtype=np.uint8)
    codebook = rng.integers(-128, 128, (64, 2**bits)).astype(np.int8)
    codebook[:2, :4] = [[-128, 127, -1, 0], [-127, 126, 1, 64]]
    dense, machine = _decode(codes, codebook, bits, np.float16)
    expected = np.take_along_axis(codebook, codes.astype(np.int64), axis=1)
    np.testing.assert_array_equal(dense, expected)
    assert not np.signbit(dense[expected == 0]).any()
    # two permutes and two subtractions for four weights more than 8-bit operands take
    assert machine.integer == {2: 34, 3: 37, 4: 60}[bits] and machine.floats == 16
    assert abs(machine.integer / 32 - INTEGER_OPERATIONS[bits, 1, 2]) <= 0.005


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fixed_point_entries_become_two_operands_of_bytes(bits: int) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (64, 64), dtype=np.uint8)
    table = (rng.normal(size=(64, 2**bits)) * 10.0 ** rng.integers(-30, 30, (64, 1))).astype(np.float32)
    table[0] = 0
    words, scales = (np.asarray(a) for a in fixed_point_tables(jnp.asarray(table)))
    dense, machine = _decode(codes, words, bits, np.int8)
    low, high = dense.astype(np.float64)
    assert np.abs(high).max() <= 127
    weight = (256 * high + low) * scales[:, None].astype(np.float64)
    expected = np.take_along_axis(table, codes.astype(np.int64), axis=1)
    # half a step; the float32 scale is rounded, too
    error = np.abs(weight - expected) / np.abs(table).max(axis=1, keepdims=True).clip(1e-37)
    assert error.max() <= 0.501 / 32639 and not error[0].any()
    # two permutes for four weights fewer than what a 16-bit operand takes, and for two bits no multiplications
    assert machine.integer == {2: 26, 3: 29, 4: 68}[bits] and machine.multiplier == 0
    assert abs(machine.integer / 32 - INTEGER_OPERATIONS[bits, 2, 1]) <= 0.005


def test_a_fixed_point_table_that_is_not_finite_says_so() -> None:
    words, scales = fixed_point_tables(jnp.asarray([[1.0, jnp.inf, 0, 0], [jnp.nan, 1, 2, 3], [1, 2, 3, 4.0]]))
    assert np.isnan(scales[:2]).all() and scales[2] == np.float32(4) / 32639 and not words[:2].any()


def test_planes_hold_the_bytes_of_the_entries() -> None:
    codebook = jnp.asarray([[0x1122, 0x3344, 0x5566, 0x7788]], jnp.uint16).view(jnp.float16)
    assert [hex(word) for word in np.asarray(table_planes(codebook))[:, 0]] == ["0x88664422", "0x77553311"]
    with pytest.raises(ValueError, match="expected 4, 8 or 16 entries a row of 8 or 16 bits"):
        table_planes(jnp.zeros((1, 8), jnp.float32))
