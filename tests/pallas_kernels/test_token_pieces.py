"""One token in three int8 rows: the digits are right for every size of token, and so is the product of the pieces."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.affine_matmul.config import Problem
from pallas_kernels.codebook_matmul import (
    PIECES,
    codebook_matmul,
    fixed_point,
    prepare_tables,
    split_row,
    split_token,
    supported_pieces,
)
from pallas_kernels.codebook_matmul.choice import candidates, choose, supported
from pallas_kernels.fragments import fragments_shape, pack_fragments, slot_order
from tests.pallas_kernels.triton import count_kernels, lower_for_gpu

LARGEST = 127 * (2**16 + 2**8 + 1)  # of three balanced digits


def _pieces(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The specification, in float64 and Python's integers: pieces [3, K rounded up to 128] in slots, scales [3]."""
    exact = x.astype(np.float64)
    largest = np.abs(exact).max()
    exponent = -126  # the least normal number
    while np.rint(largest / 2.0**exponent) > LARGEST:
        exponent += 1
    scales = 2.0 ** (exponent + np.array([16.0, 8.0, 0.0]))
    whole = np.rint(exact / 2.0**exponent).astype(np.int64)
    digits = []
    for _ in range(3):
        digits.insert(0, (whole + 128) % 256 - 128)
        whole = (whole - digits[0]) // 256
    assert not whole.any()
    padded = np.pad(np.stack(digits), ((0, 0), (0, -x.size % 128)))
    return padded[:, np.asarray(slot_order(padded.shape[1]))], scales


def _tokens(dtype: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=2100)
    small, large = (1e-33, 3e38) if dtype == "bfloat16" else (3e-5, 6.5e4)
    found = {
        "usual": normal,
        "with an outlier": np.where(np.arange(2100) == 77, 1000.0, normal),
        "of all sizes": normal * 2.0 ** rng.integers(-30, 1, 2100),
        "just below a power": np.where(np.arange(200) % 2, 1.9921875, -1.9921875),
        "powers": 2.0 ** -np.arange(14.0),
        "small": normal * small,
        "large": np.clip(normal, -1, 1)[:900] * large,
        "zero": np.zeros(64),
        "one": np.array([-3.0]),
        "subnormal": normal[:130] * (1e-39 if dtype == "bfloat16" else 1e-7),
    }
    return {name: np.asarray(jnp.asarray(x, dtype).astype(jnp.float32)) for name, x in found.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pieces_are_the_digits_of_the_token(dtype: str) -> None:
    for name, x in _tokens(dtype).items():
        token = jnp.asarray(x, dtype)[None]
        pieces, scales = split_row(token, interpret=True)
        for kernel, specified in zip((pieces, scales), jax.jit(split_token)(token), strict=True):
            np.testing.assert_array_equal(kernel, specified, err_msg=name)
        expected, powers = _pieces(x)
        assert pieces.dtype == jnp.int8 and pieces.shape == expected.shape and scales.dtype == jnp.float32
        np.testing.assert_array_equal(scales, powers, err_msg=name)
        if name == "subnormal" and dtype == "bfloat16":  # a processor may take such numbers for zero
            assert not np.any(pieces[:2]) and np.all(np.abs(np.asarray(pieces[2], int)) <= 1)
            continue
        np.testing.assert_array_equal(pieces, expected, err_msg=name)
        error = np.abs(powers @ expected - np.pad(x, (0, -x.size % 128))[slot_order(expected.shape[1])].astype(float))
        assert error.max() <= max(np.abs(x).max() / (LARGEST + 0.5), 2.0**-127), name
        size = np.abs(x[np.minimum(slot_order(expected.shape[1]), x.size - 1)])
        if dtype == "bfloat16" and name != "small":
            assert not error[size >= 2.0**-14 * np.abs(x).max()].any()
        if name == "powers":
            assert error.max() == 0


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
def test_a_token_that_is_not_finite_has_no_scale(odd: float) -> None:
    for dtype in (jnp.bfloat16, jnp.float16):
        x = jnp.ones((1, 300), dtype).at[0, 299].set(odd)
        for pieces, scales in (split_row(x, interpret=True), jax.jit(split_token)(x)):
            assert not np.any(pieces) and np.all(np.isnan(scales)) and scales.shape == (3,)


def test_every_program_writes_its_slots_of_a_long_token() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 28672)), jnp.bfloat16)
    expected, powers = _pieces(np.asarray(x[0].astype(jnp.float32)))
    pieces, scales = split_row(x, interpret=True)
    np.testing.assert_array_equal(pieces, expected)
    np.testing.assert_array_equal(scales, powers)


def test_what_is_no_token_to_split_is_said() -> None:
    assert supported_pieces(1, 8192, jnp.bfloat16) is None and supported_pieces(1, 28672, jnp.float16) is None
    assert "2 tokens" in str(supported_pieces(2, 64, jnp.bfloat16))
    assert "float32" in str(supported_pieces(1, 64, jnp.float32))
    assert "K=40000" in str(supported_pieces(1, 40000, jnp.bfloat16))
    with pytest.raises(ValueError, match="K=0 is not in"):
        split_row(jnp.zeros((1, 0), jnp.bfloat16))
    problem = Problem(1, 64, 128, 4, None, False, "int8", "float32", pieces=PIECES)
    assert supported(problem) is None
    for changes in ({"tokens": 2}, {"x_dtype": "float16"}, {"pieces": 9}):
        assert "expected 8 of one, int8" in str(supported(dataclasses.replace(problem, **changes)))
    words, tables = jnp.zeros((1, 1, 4, 128), jnp.uint32), prepare_tables(jnp.zeros((64, 16), jnp.int8), jnp.int8)
    x = jnp.zeros((3, 64), jnp.int8)
    cases: list[tuple[jax.Array, dict[str, Any]]] = [
        (x, {}),
        (x[:2], {"x_scales": jnp.ones(2)}),
        (x.astype(jnp.float16), {"x_scales": jnp.ones(3)}),
    ]
    for rows, more in cases:
        with pytest.raises(ValueError, match=r"expected int8 \[3, K\], a token in 3 pieces, with x_scales"):
            codebook_matmul(rows, words, tables, bits=4, outputs=64, pieces=PIECES, **more)
    with pytest.raises(ValueError, match=r"words has shape \[1, 1, 4, 128\]; expected \[1, 3, 4, 128\]"):
        codebook_matmul(
            jnp.zeros((3, 192), jnp.int8), words, tables, bits=4, outputs=64, pieces=PIECES, x_scales=jnp.ones(3)
        )


@pytest.mark.parametrize("inputs", [200, 328, 1024])
def test_the_product_of_pieces_lowers_for_cuda(inputs: int) -> None:
    """Columns in an odd and an even number of tiles: x has an even number in any case."""
    outputs = 200
    problem = Problem(1, outputs, inputs, 4, None, False, "int8", "float32", pieces=PIECES)
    args = {
        "words": jax.ShapeDtypeStruct(fragments_shape((outputs, inputs), 4), jnp.uint32),
        "tables": jax.ShapeDtypeStruct((4, 256), jnp.uint32),
        "scales": jax.ShapeDtypeStruct((outputs,), jnp.float32),
    }
    for config in {config.splits: config for config in candidates(problem)}.values():

        def run(x: jax.Array, args: dict[str, Any], config: Any = config) -> jax.Array:
            x, x_scales = split_row(x)
            more: dict[str, Any] = {"out_dtype": jnp.bfloat16, "pieces": PIECES, "config": config}
            return codebook_matmul(x, **args, bits=4, outputs=outputs, x_scales=x_scales, **more)

        x = jax.ShapeDtypeStruct((1, inputs), jnp.bfloat16)
        program = lower_for_gpu(run, x, args)
        assert count_kernels(program) == 1 and "mosaic_gpu" in program
        assert jax.eval_shape(run, x, args).shape == (1, outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("entry", ["int8", "fixed point"])
def test_the_product_of_pieces_is_that_of_the_token(bits: int, dtype: str, entry: str) -> None:
    for outputs, inputs, one_table in [(64, 64, False), (200, 328, True), (136, 1024, False), (512, 8192, False)]:
        rng = np.random.default_rng(inputs)
        codes = rng.integers(0, 2**bits, (outputs, inputs), dtype=np.uint8)
        scales = rng.uniform(0.5, 2, outputs).astype(np.float32)
        shape = 1 if one_table else outputs, 2**bits
        if entry == "int8":
            codebook = jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
            table = np.asarray(codebook, np.float64)
        else:
            whole = rng.integers(-fixed_point.LARGEST, fixed_point.LARGEST + 1, shape)
            whole[:, 0] = fixed_point.LARGEST  # so that the unit is 1
            codebook, unit = fixed_point.fixed_point_tables(jnp.asarray(whole, jnp.float32))
            assert np.all(unit == 1)
            table = whole.astype(np.float64)
        table = np.broadcast_to(table, (outputs, 2**bits))
        w = np.take_along_axis(table, codes.astype(np.int64), axis=1) * scales[:, None]
        spread = 10.0 ** rng.integers(-3, 3, (1, inputs)) * (1e20 if dtype == "bfloat16" else 1.0)
        x = jnp.asarray(rng.normal(size=(1, inputs)) * spread, dtype)
        pieces, x_scales = split_row(x)
        np.testing.assert_array_equal(pieces, split_token(x)[0])
        exact = np.asarray(x, np.float64) @ w.T
        # half a unit of every input, and four roundings of float32
        size = np.abs(np.asarray(x, np.float64))
        bound = 0.5 * float(x_scales[2]) * np.abs(w).sum(1) + 5e-7 * (size @ np.abs(w).T)
        arrays = (
            pack_fragments(jnp.asarray(codes), bits, "rows"),
            prepare_tables(codebook, codebook.dtype),
            jnp.asarray(scales),
        )
        problem = Problem(1, outputs, inputs, bits, None, False, "int8", "float32", pieces=PIECES)
        problem = dataclasses.replace(problem, planes=codebook.dtype.itemsize)
        parted = [config for config in candidates(problem) if config.splits > 1 or config.k_warpgroups > 1]
        more: dict[str, Any] = {"bits": bits, "outputs": outputs, "pieces": PIECES, "out_dtype": jnp.float32}
        for config in (choose(problem, problem.planes), *parted[-3:]):
            y = codebook_matmul(pieces, *arrays, x_scales=x_scales, config=config, **more)
            assert y.shape == (1, outputs)
            assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= bound), config
        odd, nothing = split_row(x.at[0, -1].set(jnp.inf)), split_row(jnp.zeros_like(x))
        assert np.all(np.isnan(codebook_matmul(odd[0], *arrays, x_scales=odd[1], **more)))
        assert not np.any(codebook_matmul(nothing[0], *arrays, x_scales=nothing[1], **more))
