"""Scales that are whole multiples of a step a row: how they are found, and the products that multiply codes by them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import affine_matmul as affine
from pallas_kernels.activation_quantize import quantize_rows
from pallas_kernels.affine_matmul import choice, register_decode
from pallas_kernels.fragments import slot_order
from tests.pallas_kernels.affine import arguments
from tests.pallas_kernels.test_affine_matmul import (
    THREAD,
    assert_byte_fragments,
    assert_half_fragments,
    case,
    emulate as emulate,
)

SHAPES = [  # M, N, K, bits, group_size, zeros, x, scales
    (1, 256, 1024, 4, 128, False, "bfloat16", "uint8"),
    (5, 100, 576, 3, 64, False, "float16", "uint8"),
    (40, 9000, 1024, 4, 128, False, "bfloat16", "uint8"),
    (77, 256, 1024, 2, 256, False, "bfloat16", "uint8"),
    (130, 200, 1152, 4, 128, False, "float16", "uint8"),
    (300, 256, 4096, 4, 64, False, "bfloat16", "uint8"),
    (1, 256, 1024, 4, 128, False, "int8", "uint8"),
    (5, 100, 576, 4, 64, False, "int8", "uint8"),
    (16, 512, 2048, 4, 128, False, "int8", "uint8"),
    (20, 192, 640, 3, 128, False, "int8", "uint8"),
    (50, 192, 2496, 2, 256, False, "int8", "uint8"),
    (64, 9000, 1024, 4, 128, False, "int8", "uint8"),
    (130, 200, 2880, 4, 128, False, "int8", "uint8"),
    (300, 256, 4096, 4, 64, False, "int8", "uint8"),
    (300, 128, 1664, 4, 512, False, "int8", "uint8"),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_steps_and_multiples_are_the_scales(dtype: str) -> None:
    random = np.random.default_rng(0)
    # three bits of a step, and four of a multiple: exact in every type
    steps = random.integers(4, 8, 150) * 2.0 ** random.integers(-12, 4, 150)
    multiples = random.integers(0, 17, (150, 9))
    multiples[3] = 0
    multiples[4] = 7
    scales = np.asarray(jnp.asarray(steps[:, None] * multiples, dtype))
    found = affine.split_scales(scales)
    assert found is not None
    counts, own = found
    assert counts.dtype == np.uint8 and own.dtype == scales.dtype and counts.max() <= 16
    np.testing.assert_array_equal(counts.astype(np.float32) * own.astype(np.float32)[:, None], scales)
    assert own[3] == 0 and set(counts[4]) == {1}  # the step is the largest there is


def test_scales_without_a_step_are_left_alone() -> None:
    scales = np.full((100, 4), 0.25, np.float32)
    assert affine.split_scales(scales) is not None
    for odd in (np.nan, np.inf, -0.25, np.nextafter(np.float32(0.25), 1), 0.25 * 17, 0.25 / 17):
        for row in (1, 99):
            changed = scales.copy()
            changed[row, 2] = odd
            assert affine.split_scales(changed) is None, odd
    assert affine.split_scales(np.zeros((3, 0), np.float32)) is not None
    # 2**-24 / 3 is no float16
    assert affine.split_scales(np.array([[2.0**-24, 2.0**-24]], np.float16)) is not None
    assert affine.split_scales(np.array([[5 * 2.0**-24, 3 * 2.0**-24]], np.float16)) is not None


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("largest", [False, True])
def test_byte_registers_are_codes_times_scales(bits: int, largest: bool, emulate: Any) -> None:
    codes, words, _, _ = case(bits, False)
    emulate(words)
    scales = np.full(64, 16) if largest else np.random.default_rng(1).integers(0, 17, 64)
    row = THREAD // 32 * 16 + THREAD % 32 // 4
    multiples = [register_decode.byte_multiples(scales[own].astype(np.uint32), bits) for own in (row, row + 8)]
    weights = ((codes - 2 ** (bits - 1)) * scales[:, None])[:, slot_order(128)]
    assert largest is False or weights.min() == -(2 ** (bits + 3))
    for tile in range(2):
        read = register_decode.read_tile(np.uint32(0), THREAD, tile, bits)
        assert_byte_fragments(register_decode.byte_fragments(read, bits, None, multiples), weights, tile)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("operand", ["bf16", "f16"])
@pytest.mark.parametrize("largest", [False, True])
def test_half_registers_are_codes_times_scales(bits: int, operand: Any, largest: bool, emulate: Any) -> None:
    codes, words, _, _ = case(bits, False)
    emulate(words)
    scales = np.full(64, 16) if largest else np.random.default_rng(1).integers(0, 17, 64)
    row = THREAD // 32 * 16 + THREAD % 32 // 4
    own = [scales[each].astype(np.uint32) for each in (row, row + 8)]
    weights = (codes - 2 ** (bits - 1)) * scales[:, None]
    for tile in range(2):
        read = register_decode.read_tile(np.uint32(0), THREAD, tile, bits)
        if bits == 4:
            multiples = [register_decode.half_multiples(scale, operand) for scale in own]
            found = register_decode.half_fragments(read, bits, operand, [], False, multiples)
        else:
            plain = register_decode.half_fragments(
                read, bits, operand, [register_decode.half_zeros(None, bits, operand)] * 2, False
            )
            factors = [register_decode.ops.pack_twice(scale.astype(np.float32), operand) for scale in own]
            found = register_decode.scaled(plain, factors, operand)
        assert_half_fragments(found, weights, tile, operand)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lowers_for_cuda_in_every_configuration(shape: tuple[Any, ...]) -> None:
    arrays, static, _ = arguments(shape)
    this = affine.Problem(*shape)
    configs = {config for config in choice.candidates(this) if affine.supported_config(this, config) is None}
    assert choice.choose(this) in configs
    for config in configs:

        def run(arrays: dict[str, Any], config: affine.Config = config) -> jax.Array:
            return affine.affine_matmul(**arrays, **static, config=config)

        assert "mosaic_gpu" in jax.jit(run).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_what_does_not_go_with_steps_is_refused() -> None:
    arrays, static, _ = arguments((3, 64, 256, 4, 128, False, "int8", "uint8"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"steps": None}, r"scales are uint8, steps None; expected uint8 with steps \[64\], or floats"),
        ({"steps": jnp.ones(63)}, r"steps \[63\]; expected uint8 with steps \[64\]"),
        ({"scales": arrays["scales"].astype(jnp.float32)}, "scales are float32"),
    ]
    for changes, reason in cases:
        with pytest.raises(ValueError, match=reason):
            affine.affine_matmul(**(arrays | changes), **static)
    this = affine.Problem(3, 64, 256, 4, 128, False, "int8", "uint8")
    assert affine.supported(this) is None
    for other in (
        dataclasses.replace(this, bits=8),
        dataclasses.replace(this, group_size=None),
        dataclasses.replace(this, has_zeros=True),
    ):
        assert "at most 4 bits" in (affine.supported(other) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_equals_the_float32_reference(shape: tuple[Any, ...]) -> None:
    arrays, static, expected = arguments(shape)
    got = np.asarray(jax.jit(lambda arrays: affine.affine_matmul(**arrays, **static))(arrays))
    # sums of 8-bit inputs are exact, operands of 16 bits; the reference's sums are rounded, too
    assert np.linalg.norm(got - expected) <= 2e-5 * np.linalg.norm(expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("outputs", "inputs"), [(130, 576), (4096, 8192), (28672, 1024)])
def test_a_token_quantized_in_the_kernel_gives_the_same(outputs: int, inputs: int) -> None:
    arrays, static, _ = arguments((1, outputs, inputs, 4, 64, False, "int8", "uint8"))
    x = jax.random.normal(jax.random.key(0), (1, inputs), jnp.bfloat16)
    weight = {name: arrays[name] for name in ("words", "scales", "steps")}
    tokens = quantize_rows(x, bits=8, symmetric=True)
    apart = affine.affine_matmul(tokens.codes, **weight, **static, x_scales=tokens.scales)
    inside = affine.affine_matmul(x, **weight, **static, quantize=8)
    np.testing.assert_array_equal(np.asarray(inside), np.asarray(apart))
