"""One token that the matrix kernel quantizes or splits itself: its arithmetic on NumPy, and refusals.

The threads of a CTA run here at once, a register being an array of all of them, and each instruction is replaced by its
definition. What they leave in shared memory is then read as the tensor core does.
"""

import dataclasses
import itertools
import types
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import affine_matmul as affine
from pallas_kernels.activation_quantize import quantize
from pallas_kernels.affine_matmul import own_token
from pallas_kernels.affine_matmul.config import BEHIND_TOKEN, token_bytes
from pallas_kernels.codebook_matmul import choice as table_choice
from pallas_kernels.fragments import slot_order
from tests.pallas_kernels.test_token_pieces import _pieces

START = 2048  # the byte address of the codes in shared memory
BFLOAT16: Any = ml_dtypes.bfloat16


class Instructions:
    """What the instructions mean, on uint32 [threads] or float32 [threads]."""

    def __init__(self, x: np.ndarray, shared: np.ndarray) -> None:
        self.x, self.shared = x.reshape(-1).view(np.uint8), shared  # bytes

    def address_of_chunk(self, base: int, index: np.ndarray, size: int) -> np.ndarray:
        return base + index.astype(np.int64) * size

    def load_constants(self, address: np.ndarray, offset: int, index: np.ndarray, count: int | None) -> Any:
        inside = np.ones(index.size, bool) if count is None else index < count
        found = np.zeros((index.size, 8), np.uint32)
        for thread in np.flatnonzero(inside):
            place = int(address[thread]) + offset
            assert place % 32 == 0 and 0 <= place <= self.x.size - 32
            found[thread] = self.x[place : place + 32].view(np.uint32)
        return list(found.T)

    def store_shared(self, address: np.ndarray, offset: int, word: np.ndarray) -> None:
        self._store(address, offset, [word], np.ones(word.size, bool))

    def store_chunk(self, address: Any, offset: int, words: list[np.ndarray], index: np.ndarray, count: Any) -> None:
        words = [np.broadcast_to(word, index.shape) for word in words]
        self._store(address, offset, words, np.ones(index.size, bool) if count is None else index < count)

    def _store(self, address: np.ndarray, offset: int, words: list[np.ndarray], inside: np.ndarray) -> None:
        size = 4 * len(words)
        for thread in np.flatnonzero(inside):
            place = int(address[thread]) + offset
            assert place % size == 0 and START <= place <= self.shared.size - size
            self.shared[place : place + size] = np.array([word[thread] for word in words], np.uint32).view(np.uint8)

    def load_shared(self, base: int, offset: np.ndarray, count: int) -> list[np.ndarray]:
        place = int(base + np.unique(offset).item())
        assert place % (4 * count) == 0
        return list(self.shared[place : place + 4 * count].view(np.uint32))

    def fence_copies(self) -> None: ...

    def wait_for_threads(self, count: int) -> None: ...

    def tell_threads(self, threads: int) -> None: ...

    def and_(self, word: np.ndarray, mask: int) -> np.ndarray:
        return word & np.uint32(mask)

    def and_or(self, word: np.ndarray, mask: int, value: int) -> np.ndarray:
        return word & np.uint32(mask) | np.uint32(value)

    def merge(self, word: np.ndarray, mask: int, other: np.ndarray) -> np.ndarray:
        return word & np.uint32(mask) | other

    def xor(self, word: np.ndarray, value: int) -> np.ndarray:
        return word ^ np.uint32(value)

    def shift(self, word: np.ndarray, left: int) -> Any:
        return np.uint32(word) << np.uint32(left) if left >= 0 else np.uint32(word) >> np.uint32(-left)

    def larger_halves(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.maximum(a >> 16, b >> 16) << np.uint32(16) | np.maximum(a & 0xFFFF, b & 0xFFFF)

    def largest_of_warp(self, value: np.ndarray) -> np.ndarray:
        return np.repeat(value.reshape(-1, 32).max(axis=1), 32)

    def permute(self, a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
        pair = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        digits = [selector >> 4 * i & 7 for i in range(4)]
        parts = [(pair >> np.uint64(8 * digit) & np.uint64(255)) << np.uint64(8 * i) for i, digit in enumerate(digits)]
        return sum(parts[1:], parts[0]).astype(np.uint32)

    def where_below(self, value: Any, bound: int, below: Any, other: Any) -> np.ndarray:
        return np.where(value < np.uint32(bound), below, other).astype(np.uint32)

    def packed(self, operation: str, a: np.ndarray, b: np.ndarray, operand: str) -> np.ndarray:
        assert operation == "mul" and operand == "bf16"
        left, right = (
            np.ascontiguousarray(np.broadcast_to(v, a.shape)).view(BFLOAT16).astype(np.float32) for v in (a, b)
        )
        return (left * right).astype(BFLOAT16).view(np.uint32)

    def half_to_float(self, word: np.ndarray) -> np.ndarray:
        return np.asarray(word & 0xFFFF, np.uint16).view(np.float16).astype(np.float32)

    def float_constant(self, value: float) -> np.floating:
        return np.float32(value)

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + b

    def multiply(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a * b

    def multiply_add(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        # rounded once: the sum of an exact product and a term, where longdouble has 64 bits
        return (a.astype(np.longdouble) * b.astype(np.longdouble) + c).astype(np.float32)

    def divide(self, value: np.ndarray, divisor: float) -> np.ndarray:
        return value / np.float32(divisor)

    def reciprocal(self, value: np.ndarray) -> np.ndarray:
        return np.float32(1) / value

    def as_float(self, word: np.ndarray) -> np.ndarray:
        return np.asarray(word, np.uint32).view(np.float32)

    def as_word(self, value: np.ndarray) -> np.ndarray:
        return np.asarray(value, np.float32).view(np.uint32)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The function (problem, config, x) -> codes [chunks, rows, 16] and scales [8] that a CTA has in the end."""

    def run(problem: affine.Problem, config: affine.Config, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        def whole(value: Any) -> Any:
            return np.asarray(value).astype(np.uint32)

        arithmetic = types.SimpleNamespace(
            addi=lambda a, b: whole(a.astype(np.int64) + b),
            subi=lambda a, b: whole(a.astype(np.int64) - b),
            muli=lambda a, b: whole(a.astype(np.int64) * b),
            andi=lambda a, b: a & b,
            shrui=lambda a, b: a >> b,
            maxui=np.maximum,
        )
        shared = np.full(START + token_bytes(problem, config), 0xA5, np.uint8)
        monkeypatch.setattr(own_token, "ops", Instructions(x, shared))
        monkeypatch.setattr(own_token, "arith", arithmetic)
        monkeypatch.setattr(own_token, "constant", lambda value: np.array(value & 0xFFFFFFFF, np.uint32))
        thread = np.arange(config.warpgroups * 128, dtype=np.uint32)
        with np.errstate(all="ignore"):
            loaded = own_token.load_chunks(problem, config, np.int64(0), thread)
            own_token.quantize(problem, config, loaded, np.uint32(START), thread, False)
        codes = shared[START:-BEHIND_TOKEN].view(np.int8).reshape(-1, problem.pieces, 16)
        return codes, shared[-BEHIND_TOKEN + 64 :][:32].view(np.float32)

    return run


def tokens(dtype: str, columns: int) -> dict[str, np.ndarray]:
    """Tokens of all kinds, float32, as the type has them."""
    random = np.random.default_rng(columns)
    normal = random.normal(size=columns)
    small, large = (2e-39, 3e38) if dtype == "bfloat16" else (1e-6, 6.5e4)
    found = {
        "usual": normal,
        "with an outlier": np.where(np.arange(columns) == columns - 1, -1000.0, normal),
        "on the edges": np.where(np.arange(columns) == 5, 127.0, random.integers(-253, 254, columns) / 2),
        "of all sizes": normal * 2.0 ** random.integers(-30, 1, columns),
        "large": np.clip(normal, -1, 1) * large,
        "subnormal": normal * small,
        "small": normal * (1e-30 if dtype == "bfloat16" else 1e-4),
        "zero": np.zeros(columns),
    }
    return {name: x.astype(BFLOAT16 if dtype == "bfloat16" else np.float16)[None] for name, x in found.items()}


def own(columns: int, dtype: str, pieces: int = 1, bits: int = 8) -> affine.Problem:
    facts = dict(x_dtype="int8", scale_dtype="float32", pieces=pieces, token_dtype=dtype, token_bits=bits)
    return affine.Problem(1, 256, columns, 4, None, False, **facts)  # pyright: ignore[reportArgumentType]


CONFIGS = [affine.Config(8, 512, 2, 2), affine.Config(8, 256, 1, 2, splits=4), affine.Config(8, 128, 1)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("columns", "bits"), [(576, 8), (1040, 4), (8192, 8), (16, 3)])
def test_codes_are_those_of_the_quantizing_kernel(columns: int, bits: int, dtype: str, run: Any) -> None:
    for (name, x), config in itertools.product(tokens(dtype, columns).items(), CONFIGS):
        codes, scales = run(own(columns, dtype, bits=bits), config, x)
        wide, half = x.astype(np.float32), 2 ** (bits - 1)
        # the specification in NumPy, whose divisions are those of IEEE and which knows denormal numbers
        scale = np.abs(wide).max() / np.float32(half - 1)
        scale = np.float32(1) if scale == 0 else np.maximum(scale, np.finfo(np.float32).tiny)
        expected = np.clip(np.round(wide / scale), -half, half - 1).astype(np.int8)[0]
        flat = codes[:, 0].reshape(-1)
        order = np.asarray(slot_order(flat.size))
        np.testing.assert_array_equal(flat, np.pad(expected, (0, flat.size - columns))[order], err_msg=name)
        np.testing.assert_array_equal(scales, [scale, *[0] * 7], err_msg=name)
        if name in ("usual", "with an outlier", "zero"):
            there = quantize(jnp.asarray(x), bits=bits, symmetric=True)
            np.testing.assert_array_equal(there.scales[0, 0], scale)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("columns", [576, 4112])
def test_pieces_are_the_digits_of_the_token(columns: int, dtype: str, run: Any) -> None:
    for (name, x), config in itertools.product(tokens(dtype, columns).items(), CONFIGS):
        codes, scales = run(own(columns, dtype, 3), config, x)
        expected, powers = _pieces(x[0].astype(np.float32))
        flat = codes.transpose(1, 0, 2).reshape(3, -1)
        width = max(flat.shape[1], expected.shape[1])
        flat, expected = (np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in (flat, expected))
        np.testing.assert_array_equal(flat, expected, err_msg=name)
        np.testing.assert_array_equal(scales, [*powers, *[0] * 5], err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
def test_a_token_that_is_not_finite_has_no_scale(odd: float, pieces: int, dtype: str, run: Any) -> None:
    x = tokens(dtype, 1024)["usual"]
    x[0, 1023] = odd
    _, scales = run(own(1024, dtype, pieces), CONFIGS[0], x)
    assert np.all(np.isnan(scales[:pieces])) and not np.any(scales[pieces:])


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_tensor_core_finds_the_columns(pieces: int, run: Any) -> None:
    """A descriptor without swizzle: core matrices of 8 x 16 bytes, those of a step `pieces` rows apart."""
    problem, config = own(1024, "bfloat16", pieces), CONFIGS[0]
    codes, _ = run(problem, config, tokens("bfloat16", 1024)["usual"])
    memory = np.concatenate([codes.reshape(-1), np.full(BEHIND_TOKEN, 77, np.int8)])
    own_inputs, leading = config.block_k // config.k_warpgroups, 16 * pieces
    for stage, k_part, tile, step in itertools.product(range(2), range(2), range(own_inputs // 64), range(2)):
        first = stage * config.block_k + k_part * own_inputs + 64 * tile + 32 * step
        start = first * pieces
        for half, row in itertools.product(range(2), range(8)):
            place = start + half * leading + 16 * row
            line = memory[place : place + 16]
            assert line.size == 16  # nothing is read past the end
            if row < pieces:
                np.testing.assert_array_equal(line, codes[first // 16 + half, row])


def test_what_is_no_token_to_quantize_is_said() -> None:
    token = own(1024, "bfloat16")
    assert affine.supported(token) is None and table_choice.supported(token) is None
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tokens": 2}, "2 tokens; the kernel quantizes one"),
        ({"inputs": 200}, "K=200 is not a multiple of 16"),
        ({"inputs": 40960}, "K=40960 is not a multiple of 16 up to 32768"),
        ({"token_dtype": "float32"}, "a token to quantize is float32"),
        ({"token_bits": 9}, "9 bits; expected int8 of 2 to 8 bits"),
        ({"pieces": 2}, "2 rows of int8"),
        ({"kept_columns": 64}, "nothing kept"),
    ]
    for changes, reason in cases:
        for supported in (affine.supported, table_choice.supported):
            assert reason in (supported(dataclasses.replace(token, **changes)) or "")
    assert "block_m=16" in (affine.supported_config(token, affine.Config(16, 128, 1)) or "")
    large = dataclasses.replace(token, inputs=32768, pieces=3)
    assert "shared memory" in (affine.supported_config(large, affine.Config(8, 512, 4, stages=3)) or "")
    x = jnp.zeros((1, 64), jnp.bfloat16)
    arrays: dict[str, Any] = {"words": jnp.zeros((1, 1, 4, 128), jnp.uint32)}
    with pytest.raises(ValueError, match="give neither"):
        affine.affine_matmul(
            x, **arrays, scales=jnp.ones((1, 64)), bits=4, outputs=64, quantize=8, x_scales=jnp.ones(1)
        )
    with pytest.raises(ValueError, match="no affine kernel: 2 tokens"):
        affine.affine_matmul(
            jnp.zeros((2, 64), jnp.bfloat16), **arrays, scales=jnp.ones((1, 64)), bits=4, outputs=64, quantize=8
        )
