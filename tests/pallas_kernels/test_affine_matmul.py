"""The affine kernel: its register arithmetic against NumPy, its lowering for CUDA, its numbers where there is a GPU.

No interpreter runs a tensor-core product with a register operand. So the functions that turn packed words into
registers are run here on NumPy arrays of 128 threads, with each instruction replaced by its definition, and the result
is compared with the fragment tables of the PTX manual.
"""

import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import affine_matmul as affine
from pallas_kernels.affine_matmul import choice, register_decode
from pallas_kernels.fragments import fragments_shape, pack_fragments, slot_order
from tests.pallas_kernels.affine import arguments

THREAD = np.arange(128, dtype=np.uint32)
FLOATS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


class Instructions:
    """What the instructions mean, on uint32 [128]: a register of every thread."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory  # uint32 words of shared memory

    def load_shared(self, base: Any, offset: np.ndarray, count: int) -> list[np.ndarray]:
        address = base + offset
        assert not np.any(address % (4 * count))  # a wide load must be aligned
        return [self.memory[address // 4 + i] for i in range(count)]

    def shift(self, word: np.ndarray, left: int) -> np.ndarray:
        return word << np.uint32(left) if left >= 0 else word >> np.uint32(-left)

    def and_(self, word: np.ndarray, mask: int) -> np.ndarray:
        return word & np.uint32(mask)

    def and_or(self, word: np.ndarray, mask: int, value: int) -> np.ndarray:
        return word & np.uint32(mask) | np.uint32(value)

    def and_xor(self, word: np.ndarray, mask: int, value: int) -> np.ndarray:
        return (word & np.uint32(mask)) ^ np.uint32(value)

    def merge(self, word: np.ndarray, mask: int, other: np.ndarray) -> np.ndarray:
        return word & np.uint32(mask) | other

    def xor(self, word: np.ndarray, value: int) -> np.ndarray:
        return word ^ np.uint32(value)

    def subtract_words(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a - b

    def packed(self, operation: str, a: np.ndarray, b: np.ndarray, operand: str) -> np.ndarray:
        kind = FLOATS[operand]
        left, right = (np.broadcast_to(v, THREAD.shape).copy().view(kind).astype(np.float32) for v in (a, b))
        result = left - right if operation == "sub" else left * right
        return result.astype(kind).view(np.uint32)

    def packed_multiply_add(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, operand: str) -> np.ndarray:
        kind = FLOATS[operand]
        a, b, c = (np.broadcast_to(v, THREAD.shape).copy().view(kind).astype(np.float64) for v in (a, b, c))
        return (a * b + c).astype(kind).view(np.uint32)

    def multiply(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a * b

    def float_constant(self, value: float) -> np.ndarray:
        return np.float32(value) + np.zeros(THREAD.shape, np.float32)

    def to_float(self, word: np.ndarray) -> np.ndarray:
        return word.astype(np.int32).astype(np.float32)

    def pack_twice(self, value: np.ndarray, operand: str) -> np.ndarray:
        return np.repeat(np.broadcast_to(value, THREAD.shape).astype(FLOATS[operand]), 2).view(np.uint32)


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(words: jax.Array) -> None:
        arithmetic = types.SimpleNamespace(
            addi=lambda a, b: a + b, subi=lambda a, b: a - b, muli=lambda a, b: (a * b).astype(np.uint32)
        )
        monkeypatch.setattr(register_decode, "ops", Instructions(np.asarray(words).reshape(-1)))
        monkeypatch.setattr(register_decode, "arith", arithmetic)
        monkeypatch.setattr(register_decode, "constant", lambda value: np.uint32(value) + np.zeros_like(THREAD))

    return install


def case(bits: int, has_zeros: bool) -> tuple[np.ndarray, jax.Array, np.ndarray, list[np.ndarray]]:
    """Codes of two tiles, their words, the zero point of each row, and the same as the registers of rows r0, r1."""
    random = np.random.default_rng(bits)
    codes = random.integers(0, 2**bits, (64, 128))
    zeros = random.integers(0, 2**bits, 64) if has_zeros else np.full(64, 2 ** (bits - 1))
    row = THREAD // 32 * 16 + THREAD % 32 // 4
    registers = [zeros[row].astype(np.uint32), zeros[row + 8].astype(np.uint32)]
    return codes, pack_fragments(jnp.asarray(codes), bits, "pairs"), zeros, registers


def assert_half_fragments(found: list[list[np.ndarray]], weights: np.ndarray, tile: int, operand: str) -> None:
    """A of the m64k16 of a tile: a0 is (g, 2t), a1 (g + 8, 2t), a2 (g, 2t + 8), a3 (g + 8, 2t + 8), two each."""
    row, pair = THREAD // 32 * 16 + THREAD % 32 // 4, THREAD % 4 * 2
    for step in range(4):
        for i in range(4):
            column = 64 * tile + 16 * step + pair + 8 * (i // 2)
            expected = weights[(row + 8 * (i % 2))[:, None], column[:, None] + np.arange(2)]
            got = found[step][i].view(FLOATS[operand]).reshape(128, 2).astype(np.float32)
            np.testing.assert_array_equal(got, expected)


def assert_byte_fragments(found: list[list[np.ndarray]], weights: np.ndarray, tile: int) -> None:
    """A of the m64k32 of a tile, weights in slot order: a0 is (g, 4t), a1 (g + 8, 4t), a2 (g, 16 + 4t), a3 (g + 8, 16 +
    4t), four each."""
    row, first = THREAD // 32 * 16 + THREAD % 32 // 4, THREAD % 4 * 4
    for step in range(2):
        for i in range(4):
            slot = 64 * tile + 32 * step + first + 16 * (i // 2)
            expected = weights[(row + 8 * (i % 2))[:, None], slot[:, None] + np.arange(4)]
            np.testing.assert_array_equal(found[step][i].view(np.int8).reshape(128, 4), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("operand", ["bf16", "f16"])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_half_registers_are_the_fragment_of_m64k16(bits: int, operand: Any, has_zeros: bool, emulate: Any) -> None:
    codes, words, zeros, registers = case(bits, has_zeros)
    emulate(words)
    scales = [np.repeat(np.full(128, s, FLOATS[operand]), 2).view(np.uint32) for s in (0.5, 2.0)]
    own = [register_decode.half_zeros(z if has_zeros else None, bits, operand) for z in registers]
    weights = codes - zeros[:, None]
    row_scales = np.where(np.arange(64) % 16 < 8, 0.5, 2.0)
    for tile in range(2):
        read = register_decode.read_tile(np.uint32(0), THREAD, tile, bits)
        plain = register_decode.half_fragments(read, bits, operand, own, has_zeros)
        assert_half_fragments(plain, weights, tile, operand)
        scaled = register_decode.scaled(plain, scales, operand)
        assert_half_fragments(scaled, weights * row_scales[:, None], tile, operand)


@pytest.mark.parametrize(
    ("bits", "has_zeros"), [(2, False), (2, True), (3, False), (3, True), (4, False), (4, True), (8, False)]
)
def test_byte_registers_are_the_fragment_of_m64k32_in_slot_order(bits: int, has_zeros: bool, emulate: Any) -> None:
    codes, words, zeros, registers = case(bits, has_zeros)
    emulate(words)
    own = [register_decode.byte_zeros(z) for z in registers] if has_zeros else None
    weights = ((codes - zeros[:, None]) * register_decode.byte_factor(bits, has_zeros))[:, slot_order(128)]
    for tile in range(2):
        read = register_decode.read_tile(np.uint32(0), THREAD, tile, bits)
        assert_byte_fragments(register_decode.byte_fragments(read, bits, own), weights, tile)


def problem(**changes: Any) -> affine.Problem:
    facts = dict(tokens=16, outputs=256, inputs=1024, bits=4, group_size=128, has_zeros=False)
    return affine.Problem(**{**facts, "x_dtype": "bfloat16", "scale_dtype": "bfloat16", **changes})


def test_reasons_name_what_is_wrong() -> None:
    assert affine.supported(problem()) is None
    for changes, words in (
        ({"bits": 5}, "bits=5"),
        ({"x_dtype": "float32"}, "float32"),
        ({"scale_dtype": "int8"}, "scales are int8"),
        ({"group_size": 32}, "group_size=32"),
        ({"tokens": 0}, "M=0"),
        ({"bits": 8, "has_zeros": True, "x_dtype": "int8"}, "zero points"),
    ):
        assert words in (affine.supported(problem(**changes)) or "")
    for config, words in (
        (affine.Config(12, 128, 1), "block_m=12"),
        (affine.Config(16, 96, 1), "block_k=96"),
        (affine.Config(16, 4096, 4, stages=8), "shared memory"),
        (affine.Config(128, 128, 4), "registers"),
        (affine.Config(16, 192, 1), "group_size=128"),
    ):
        assert words in (affine.supported_config(problem(), config) or "")


def test_every_supported_problem_has_a_configuration() -> None:
    for tokens in (1, 8, 9, 64, 100, 300, 4096):
        for x_dtype in ("bfloat16", "float16", "int8"):
            for bits in (2, 3, 4, 8):
                for group_size in (None, 64, 128, 192, 512, 2048):
                    for outputs, inputs in ((64, 64), (4096, 11008), (28672, 8192)):
                        facts = dict(tokens=tokens, x_dtype=x_dtype, bits=bits, group_size=group_size)
                        this = problem(**facts, outputs=outputs, inputs=inputs)
                        if affine.supported(this) is None:
                            assert affine.supported_config(this, choice.choose(this)) is None


SHAPES = [  # M, N, K, bits, group_size, zeros, x, scales
    (1, 256, 1024, 4, 128, False, "bfloat16", "bfloat16"),
    (5, 100, 576, 4, 64, True, "float16", "float16"),
    (16, 512, 2048, 4, 128, False, "int8", "bfloat16"),
    (20, 192, 640, 3, 128, True, "int8", "float32"),
    (64, 320, 1024, 2, 64, False, "bfloat16", "float32"),
    (77, 256, 1024, 3, None, False, "float16", "float32"),
    (130, 200, 1152, 4, 128, True, "bfloat16", "bfloat16"),
    (130, 128, 1024, 8, None, False, "int8", "float32"),
    (9, 100, 576, 4, None, False, "bfloat16", "float16"),
    (70, 200, 1024, 4, None, False, "int8", "bfloat16"),
    (300, 256, 1024, 4, None, True, "bfloat16", "bfloat16"),
    (300, 256, 1024, 8, 256, True, "bfloat16", "bfloat16"),
    (140, 200, 1152, 4, 128, False, "float16", "float16"),
    (301, 256, 1024, 8, None, True, "float16", "float16"),
    # sums of 8-bit operands that run on over groups and start anew every 512 inputs of a warpgroup
    (3, 128, 8192, 4, 128, False, "int8", "float16"),
    (50, 192, 2496, 2, 256, True, "int8", "float16"),
    (130, 200, 2880, 4, 128, False, "int8", "float16"),
    (300, 256, 4096, 4, 64, True, "int8", "bfloat16"),
    (300, 128, 1664, 8, 512, False, "int8", "float32"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lowers_for_cuda_in_every_configuration(shape: tuple[Any, ...]) -> None:
    m, n, k, bits, group_size, has_zeros, x_dtype, scale_dtype = shape
    groups = 1 if group_size is None else -(-k // group_size)
    arrays = {
        "x": jax.ShapeDtypeStruct((m, k), jnp.dtype(x_dtype)),
        "words": jax.ShapeDtypeStruct(fragments_shape((n, k), bits), jnp.uint32),
        "scales": jax.ShapeDtypeStruct((groups, n), jnp.dtype(scale_dtype)),
    }
    if has_zeros:
        arrays["zeros"] = jax.ShapeDtypeStruct((groups, n), jnp.uint8)
    # zeros belong to groups: the row is one, longer than any block
    group = 2**15 if has_zeros and group_size is None else group_size
    this = affine.Problem(m, n, k, bits, group, has_zeros, x_dtype, scale_dtype)
    configs = {config for config in choice.candidates(this) if affine.supported_config(this, config) is None}
    assert configs
    for config in configs:

        def run(arrays: dict[str, Any], config: affine.Config = config) -> jax.Array:
            return affine.affine_matmul(**arrays, bits=bits, outputs=n, group_size=group_size, config=config)

        lowered = jax.jit(run).trace(arrays).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(("kind", "name"), [("float16", "f16"), ("bfloat16", "bf16")])
@pytest.mark.parametrize("length", [100, 128])
def test_row_scales_are_read_as_they_are(kind: str, name: str, length: int) -> None:
    arrays = {
        "x": jax.ShapeDtypeStruct((16, 512), jnp.bfloat16),
        "words": jax.ShapeDtypeStruct(fragments_shape((100, 512), 4), jnp.uint32),
        "scales": jax.ShapeDtypeStruct((1, length), jnp.dtype(kind)),
    }
    config = affine.Config(16, 128, 1)  # without splits, whose sums are another kernel
    run = jax.jit(lambda arrays: affine.affine_matmul(**arrays, bits=4, outputs=100, config=config))
    lowered = run.trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert f"-> tensor<{length}x{name}>" in lowered
    assert not re.search(r"stablehlo\.convert .*f32>", lowered)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_equals_the_float32_reference(shape: tuple[Any, ...]) -> None:
    arrays, static, expected = arguments(shape)
    got = np.asarray(jax.jit(lambda arrays: affine.affine_matmul(**arrays, **static))(arrays))
    # Weights are exact, sums float32; a configuration that scales the operand rounds weights to 8 or 11 bits.
    has_groups = static["group_size"] is not None or "zeros" in arrays  # zeros make the whole row a group
    scaled = {"bfloat16": 3e-3, "float16": 4e-4, "int8": 2e-5}[shape[6]]
    tolerance = scaled if has_groups and shape[0] > 128 else 2e-5
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)


def test_slots_that_are_cut_are_refused() -> None:
    # the first half of a block of 16 slots does not hold the first eight columns
    arrays, static, _ = arguments((5, 64, 64, 4, None, False, "int8", "float32"))
    words = pack_fragments(jnp.zeros((64, 40), jnp.uint8), 4, "pairs")
    with pytest.raises(ValueError, match="8-bit x has 40 columns, slots come in blocks of 16"):
        affine.affine_matmul(**(arrays | {"x": arrays["x"][:, :40], "words": words}), **static)
