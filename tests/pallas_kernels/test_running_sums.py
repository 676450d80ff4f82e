"""Running sums of 8-bit operands: their bounds, and the arithmetic of the kernel's own code on NumPy arrays.

A register is an array [OUTPUTS] here, one entry for each of as many independent threads; `running_sums` runs as it is,
loops included, with each instruction replaced by its definition. The tensor core is an exact integer sum.
"""

import functools
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pallas_kernels import affine_matmul as affine
from pallas_kernels.affine_matmul import running_sums
from pallas_kernels.affine_matmul.config import SEGMENT
from pallas_kernels.affine_matmul.register_decode import byte_factor

OUTPUTS = 48
REGISTERS = 4  # of a product of eight tokens: rows r0, r0, r1, r1


def as_float(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.int32).view(np.float32)


class Instructions:
    """What the instructions of the module mean; a product is a sum of `products`, int64 [REGISTERS, tiles, OUTPUTS]."""

    def __init__(self, products: np.ndarray) -> None:
        self.products = products
        self.seen = [2**24, 0]  # smallest and largest sum

    def multiply_tile(self, sums: Any, tile: int) -> list[np.ndarray]:
        result = [old + self.products[i, tile] for i, old in enumerate(sums)]
        self.seen = [min(self.seen[0], np.min(result)), max(self.seen[1], np.max(result))]
        return result

    def wait_for_products(
        self, sums: list[np.ndarray], in_flight: int, operands: Sequence[int] = ()
    ) -> list[np.ndarray]:
        return sums

    def replaced(self, register: np.ndarray, value: float) -> np.ndarray:
        assert np.all(np.isfinite(register))
        return np.full_like(register, value)

    def wait_for_earlier(self, in_flight: int) -> None:
        pass

    def multiply_add(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        assert all(v.dtype == np.float32 for v in (a, b, c))
        # a product of two float32 is exact in float64
        return (a.astype(np.float64) * b.astype(np.float64) + c).astype(np.float32)

    def multiply(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a * b

    def float_constant(self, value: float) -> np.ndarray:
        return np.full(OUTPUTS, value, np.float32)


class Stage:
    """A stage of one warpgroup: the tiles from `first`; scales float32 [2, groups, OUTPUTS], zero past the end."""

    def __init__(
        self,
        instructions: Instructions,
        problem: affine.Problem,
        config: affine.Config,
        first: int,
        scales: np.ndarray,
    ) -> None:
        self.instructions, self.first, self.scales, self.size = instructions, first, scales, problem.group_size or 0
        self.run_inputs = min(self.size, config.block_k)
        self.factor = np.float32(running_sums.scale_factor(problem.bits, problem.has_zeros))
        self.read_tiles: set[int] = set()

    def read(self, tile: int) -> None:
        self.read_tiles.add(tile)

    def grid(self, run: int) -> Any:
        group = (self.first * 64 + run * self.run_inputs) // self.size
        found = self.scales[:, group] if group < self.scales.shape[1] else np.zeros((2, OUTPUTS), np.float32)
        return types.SimpleNamespace(scales=list(found * self.factor))

    def fragments(self, tile: int, grid: Any) -> list[list[int]]:
        assert tile in self.read_tiles
        return [[self.first + tile]]

    def multiply(self, sums: Any, fragments: list[list[int]], tile: int) -> list[np.ndarray]:
        assert fragments == [[self.first + tile]]
        return self.instructions.multiply_tile(sums, self.first + tile)


def fori_loop(first: int, last: Any, body: Any, carry: Any) -> Any:
    for index in range(first, int(last)):
        carry = body(index, carry)
    return carry


def product(
    monkeypatch: pytest.MonkeyPatch,
    problem: affine.Problem,
    config: affine.Config,
    tiles: np.ndarray,
    scales: np.ndarray,
) -> tuple[np.ndarray, list[int]]:
    """What the kernel computes [REGISTERS, OUTPUTS], and the smallest and largest of its running sums."""
    steps = -(-problem.inputs // config.block_k)
    padding = steps * config.block_k // 64 - tiles.shape[1]
    instructions = Instructions(np.pad(tiles, ((0, 0), (0, padding), (0, 0))))
    registers = types.SimpleNamespace(
        THREADS=OUTPUTS,
        registers_of=list,
        array_of=list,
        registers_layout=lambda count: None,
        registers_type=lambda count, dtype: None,
        f32=lambda: np.float32,
        i32=lambda: np.int32,
    )
    empty = types.SimpleNamespace(
        int32=np.int32,
        float32=np.float32,
        minimum=min,
        zeros=lambda shape, kind: np.zeros((shape[0] // OUTPUTS, OUTPUTS), kind),
    )
    arithmetic = types.SimpleNamespace(
        subf=lambda a, b: np.subtract(a, b, dtype=np.float32),
        bitcast=lambda kind, bits: as_float(bits) if kind is np.float32 else bits.view(np.int32).astype(np.int64),
    )
    inline = types.SimpleNamespace(inline_mgpu=lambda **_: lambda body: functools.partial(body, None))
    for name, value in {
        "ops": instructions,
        "compat": registers,
        "jnp": empty,
        "arith": arithmetic,
        "plgpu": inline,
        "lax": types.SimpleNamespace(fori_loop=fori_loop),
    }.items():
        monkeypatch.setattr(running_sums, name, value)

    def step(number: int, carry: Any) -> Any:
        done, state = carry
        assert number == done
        stage = Stage(instructions, problem, config, done * config.block_k // 64, scales)
        pending = running_sums.begin_stage(problem, config, stage, *state)  # pyright: ignore[reportArgumentType]
        return done + 1, running_sums.finish_stage(*pending)

    turns = running_sums.segments(config, steps)
    done, sums = running_sums.sum_stages(problem, config, turns, steps, step, 0)
    assert done == steps
    return np.stack(sums), instructions.seen


def check(
    monkeypatch: pytest.MonkeyPatch,
    operands: np.ndarray,
    tokens: np.ndarray,
    scales: np.ndarray,
    bits: int,
    group_size: int,
    block_k: int,
    has_zeros: bool = False,
) -> float:
    """The relative error (Frobenius) against float64. operands [2, K, OUTPUTS], tokens [2, K, OUTPUTS], scales [2, G,
    OUTPUTS]; the row and token of register i are i // 2 and i % 2."""
    inputs = operands.shape[1]
    problem = affine.Problem(8, 64, inputs, bits, group_size, has_zeros, "int8", "float32")
    config = affine.Config(8, block_k, 1 + has_zeros)  # zero points come in whole copies
    assert affine.supported_config(problem, config) is None
    factor = byte_factor(bits, has_zeros)
    each = np.stack([operands[i // 2].astype(np.int64) * tokens[i % 2] for i in range(REGISTERS)])
    padded = np.pad(each, ((0, 0), (0, -inputs % 64), (0, 0)))
    tiles = padded.reshape(REGISTERS, -1, 64, OUTPUTS).sum(axis=2)
    got, (least, most) = product(monkeypatch, problem, config, tiles, scales)
    start = running_sums.first_sum(bits, has_zeros)
    assert 0 <= least and most <= 2 * start <= 2**24
    group = np.arange(inputs) // group_size
    exact = np.stack([(each[i] * (scales[i // 2][group].astype(np.float64) / factor)).sum(0) for i in range(REGISTERS)])
    assert got.dtype == np.float32 and np.all(np.isfinite(got))
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def random_case(
    seed: int, inputs: int, bits: int, group_size: int, has_zeros: bool, spread: float, deviation: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """operands, tokens (integers of a normal distribution, clipped), and float16 scales over 2**spread."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 2**bits, (2, inputs, OUTPUTS))
    groups = -(-inputs // group_size)
    zeros = np.full((2, groups, OUTPUTS), 2 ** (bits - 1))
    if has_zeros:
        zeros = random.integers(0, 2**bits, (2, groups, OUTPUTS))
    operands = (codes - zeros[:, np.arange(inputs) // group_size]) * byte_factor(bits, has_zeros)
    tokens = np.clip(np.round(random.normal(0, deviation, (2, inputs, OUTPUTS))), -128, 127).astype(np.int64)
    scales = 0.01 * 2.0 ** random.uniform(0, spread, (2, groups, OUTPUTS))
    return operands, tokens, scales.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize(
    ("bits", "has_zeros"), [(2, False), (2, True), (3, False), (3, True), (4, False), (4, True), (8, False)]
)
def test_sums_stay_where_their_bits_are_a_float(bits: int, has_zeros: bool) -> None:
    start = running_sums.first_sum(bits, has_zeros)
    assert 0 < 2 * start <= 2**24
    largest = running_sums.largest_operand(bits, has_zeros)
    assert start >= SEGMENT * largest * 128
    # codes less a zero point up to 2**bits, else codes less half their range, shifted up
    assert largest >= (2**bits if has_zeros else 2 ** (bits - 1) * byte_factor(bits, False))


def test_bits_of_an_integer_up_to_two_to_the_24_are_that_number_of_smallest_floats() -> None:
    near = [np.arange(64), 2**22 + np.arange(64), 2**23 - 32 + np.arange(64), 2**24 - np.arange(64)]
    for numbers in near:
        np.testing.assert_array_equal(as_float(numbers).astype(np.float64), numbers * 2.0**-149)


@pytest.mark.parametrize("block_k", [128, 256, 512])
@pytest.mark.parametrize(
    ("inputs", "bits", "group_size", "has_zeros"),
    [
        (28672, 4, 128, False),
        (28672, 4, 128, True),
        (8192, 4, 64, False),
        (8192, 3, 256, True),
        (8192, 2, 512, False),
        (8192, 8, 128, False),
        (8192, 4, 2048, True),
        (128, 4, 128, False),
        (1216, 4, 128, False),  # the last group and the last segment are short
        (832, 3, 256, True),
    ],
)
def test_error_is_that_of_float32_sums(
    inputs: int, bits: int, group_size: int, has_zeros: bool, block_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spread in (0.0, 5.0):
        arrays = random_case(inputs + block_k, inputs, bits, group_size, has_zeros, spread, 40.0)
        assert check(monkeypatch, *arrays, bits, group_size, block_k, has_zeros) < 3e-5


def test_tokens_with_outliers_and_small_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens whose largest value leaves the others a few steps, and scales that float16 has few bits for."""
    operands, tokens, scales = random_case(1, 28672, 4, 128, False, 5.0, 2.0)
    assert check(monkeypatch, operands, tokens, scales, 4, 128, 256) < 3e-4
    operands, tokens, _ = random_case(2, 8192, 4, 128, False, 0.0, 40.0)
    for power in (-75, -24, 0, 26):
        scales = np.random.default_rng(3).integers(1, 4, (2, 64, OUTPUTS)) * np.float32(2.0**power) / np.float32(2)
        assert check(monkeypatch, operands, tokens, scales.astype(np.float32), 4, 128, 256) < 3e-5


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("turn", [64, 128, 512, 28672])
def test_largest_operands_and_tokens_of_either_sign(sign: int, turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of one sign for `turn` inputs, then of the other: sums go from one end of their range to the other."""
    signs = np.where(np.arange(28672) // turn % 2 == 0, sign, -sign)
    operands = np.full((2, 28672, OUTPUTS), -128)
    tokens = np.broadcast_to(np.where(signs > 0, -128, 127)[None, :, None], operands.shape)
    scales = random_case(4, 28672, 4, 128, False, 5.0, 1.0)[2]
    assert check(monkeypatch, operands, tokens, scales, 4, 128, 256) < 3e-6


def test_signs_of_scales_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    operands, tokens, scales = random_case(5, 8192, 4, 128, False, 3.0, 40.0)
    signs = np.random.default_rng(6).choice([-1, 1], scales.shape).astype(np.float32)
    assert check(monkeypatch, operands, tokens, scales * signs, 4, 128, 128) < 5e-5
