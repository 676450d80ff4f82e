"""Products of one token that the matrix kernel quantizes or splits itself: their lowering, and numbers on a GPU, which
are bit for bit those after the launch that it saves."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import affine_matmul as affine, codebook_matmul as codebook
from pallas_kernels.activation_quantize import quantize_rows
from pallas_kernels.affine_matmul import choice
from pallas_kernels.codebook_matmul import choice as table_choice
from pallas_kernels.codebook_matmul.decode import table_words
from pallas_kernels.fragments import fragments_shape, unpack_fragments
from tests.pallas_kernels.test_own_token import tokens
from tests.pallas_kernels.triton import count_kernels, lower_for_gpu

CASES = [  # bits, group_size, table entry bytes, pieces; 0: affine
    (4, 128, 0, 1),
    (8, None, 0, 1),
    (4, None, 1, 1),
    (4, None, 1, 3),
    (3, None, 2, 3),
]
PARTED = [(4, 128, 0, 3), (8, None, 0, 3)]  # 16 bits beside affine weights


def product(case: tuple[int, int | None, int, int], outputs: int) -> Any:
    """The function (x, arrays) -> y [1, outputs] of a token that the kernel makes integers of."""
    bits, group_size, entry, pieces = case

    def run(x: jax.Array, arrays: dict[str, Any]) -> jax.Array:
        more: dict[str, Any] = {"bits": bits, "outputs": outputs, "out_dtype": jnp.bfloat16}
        if entry == 0:
            more |= {"pieces": pieces} if pieces > 1 else {"quantize": 8}
            return affine.affine_matmul(x, **arrays, group_size=group_size, **more)
        more |= {"pieces": pieces} if pieces > 1 else {"quantize": 8}
        return codebook.codebook_matmul(x, **arrays, **more)

    return run


def launched(case: tuple[int, int | None, int, int], outputs: int) -> Any:
    """The same with a launch before it."""
    bits, group_size, entry, pieces = case

    def run(x: jax.Array, arrays: dict[str, Any], config: Any) -> jax.Array:
        more: dict[str, Any] = {"bits": bits, "outputs": outputs, "out_dtype": jnp.bfloat16, "config": config}
        if pieces > 1:
            codes, scales = codebook.split_row(x)
            return codebook.codebook_matmul(codes, **arrays, x_scales=scales, pieces=pieces, **more)
        token = quantize_rows(x, bits=8, symmetric=True)
        if entry == 0:
            return affine.affine_matmul(
                token.codes[:, : x.shape[1]], **arrays, group_size=group_size, x_scales=token.scales, **more
            )
        return codebook.codebook_matmul(token.codes[:, : x.shape[1]], **arrays, x_scales=token.scales, **more)

    return run


def shapes(case: tuple[int, int | None, int, int], outputs: int, inputs: int) -> dict[str, Any]:
    bits, group_size, entry, _ = case
    found = {"words": jax.ShapeDtypeStruct(fragments_shape((outputs, inputs), bits), jnp.uint32)}
    if entry == 0:
        groups = 1 if group_size is None else -(-inputs // group_size)
        return found | {"scales": jax.ShapeDtypeStruct((groups, outputs), jnp.bfloat16)}
    planes = table_words(bits, entry)
    found["tables"] = jax.ShapeDtypeStruct((planes, -(-outputs // 64) * 64), jnp.uint32)
    return found | {"scales": jax.ShapeDtypeStruct((outputs,), jnp.float32)}


def problem_of(case: tuple[int, int | None, int, int], outputs: int, inputs: int, dtype: str) -> affine.Problem:
    bits, group_size, entry, pieces = case
    facts: dict[str, Any] = dict(x_dtype="int8", scale_dtype="float32" if entry else "bfloat16", token_dtype=dtype)
    return affine.Problem(1, outputs, inputs, bits, group_size, False, **facts, pieces=pieces, planes=max(entry, 1))


@pytest.mark.parametrize("case", CASES + PARTED, ids=str)
@pytest.mark.parametrize("inputs", [576, 1024, 8192, 28672])
def test_lowers_for_cuda_without_a_launch(case: tuple[int, int | None, int, int], inputs: int) -> None:
    for dtype in ("bfloat16", "float16"):
        x = jax.ShapeDtypeStruct((1, inputs), jnp.dtype(dtype))
        program = lower_for_gpu(product(case, 200), x, shapes(case, 200, inputs))
        assert count_kernels(program) == 0 and "mosaic_gpu" in program
    many = jax.ShapeDtypeStruct((3, 1, inputs), jnp.bfloat16)
    program = lower_for_gpu(jax.vmap(product(case, 200), in_axes=(0, None)), many, shapes(case, 200, inputs))
    assert count_kernels(program) == 0 and "mosaic_gpu" in program


def test_every_token_has_a_configuration() -> None:
    for case, inputs, outputs in itertools.product(CASES + PARTED, (16, 576, 8192, 28672, 32768), (64, 4096, 28672)):
        this = problem_of(case, outputs, inputs, "bfloat16")
        config = (table_choice.choose if case[2] else affine.choose)(this)
        assert affine.supported_config(this, config) is None and not choice.few_stages(this, config)


def made(case: tuple[int, int | None, int, int], outputs: int, inputs: int) -> dict[str, Any]:
    """The arrays of a random weight: what packing large codes would take on the device is not to be had for all."""
    bits, group_size, entry, _ = case
    random = np.random.default_rng(inputs)
    words = jnp.asarray(random.integers(0, 2**32, fragments_shape((outputs, inputs), bits), dtype=np.uint32))
    if entry == 0:
        groups = 1 if group_size is None else -(-inputs // group_size)
        scales = jnp.asarray(random.uniform(0.01, 0.02, (groups, outputs)), jnp.bfloat16)
        return {"words": words, "scales": scales}
    largest = 127 if entry == 1 else 32000
    table = jnp.asarray(
        random.integers(-largest, largest + 1, (outputs, 2**bits)), jnp.int8 if entry == 1 else jnp.int16
    )
    if entry == 2:
        table, scales = codebook.fixed_point_tables(table.astype(jnp.float32))
    else:
        scales = jnp.asarray(random.uniform(0.5, 2, outputs), jnp.float32)
    return {"words": words, "tables": codebook.prepare_tables(table, table.dtype), "scales": scales}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("outputs", "inputs"), [(130, 576), (4096, 8192), (130, 28672)])
def test_the_product_is_that_after_a_launch(
    case: tuple[int, int | None, int, int], dtype: str, outputs: int, inputs: int
) -> None:
    arrays = made(case, outputs, inputs)
    this = problem_of(case, outputs, inputs, dtype)
    config = (table_choice.choose if case[2] else affine.choose)(this)
    inside, before = jax.jit(product(case, outputs)), jax.jit(launched(case, outputs), static_argnums=2)
    alike = tokens(dtype, inputs)
    # with as many stages as fit beside inputs in them, so that sums are added in the same order
    given = dataclasses.replace(this, token_dtype="")
    while affine.supported_config(given, config) is not None:
        config = dataclasses.replace(config, stages=config.stages - 1)
    for name, x in alike.items():
        y, expected = inside(jnp.asarray(x), arrays), before(jnp.asarray(x), arrays, config)
        np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(expected, np.float32), err_msg=name)
        assert name in ("zero", "subnormal") or np.any(np.asarray(y, np.float32))
    for odd in (np.inf, np.nan):
        x = jnp.asarray(alike["usual"]).at[0, inputs - 1].set(odd)
        assert np.all(np.isnan(np.asarray(inside(x, arrays), np.float32)))
    batch = jnp.stack([jnp.asarray(x) for name, x in alike.items() if name != "large"])  # which may overflow
    many = jax.jit(jax.vmap(product(case, outputs), in_axes=(0, None)))(batch, arrays)
    for x, y in zip(batch, many, strict=True):
        # parts of the inputs may be added in another order
        expected = np.asarray(inside(x, arrays), np.float32)
        np.testing.assert_allclose(np.asarray(y, np.float32), expected, rtol=2**-7, atol=1e-6 * np.abs(expected).max())


@pytest.mark.gpu
@pytest.mark.parametrize("case", PARTED, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("inputs", [576, 8192])
def test_a_token_in_pieces_beside_affine_weights(
    case: tuple[int, int | None, int, int], dtype: str, inputs: int
) -> None:
    bits, group_size, _, pieces = case
    arrays = made(case, 200, inputs)
    codes = np.asarray(unpack_fragments(arrays["words"], bits, "pairs", (200, inputs)), np.float64) - 2 ** (bits - 1)
    group = np.arange(inputs) // (group_size or inputs)
    weights = codes * np.asarray(arrays["scales"], np.float64)[group].T
    more: dict[str, Any] = {"bits": bits, "outputs": 200, "group_size": group_size, "out_dtype": jnp.float32}
    for name in ("usual", "with an outlier", "zero"):
        x = tokens(dtype, inputs)[name]
        y = affine.affine_matmul(jnp.asarray(x), **arrays, pieces=pieces, **more)
        exact = x.astype(np.float64) @ weights.T
        assert np.linalg.norm(np.asarray(y, np.float64) - exact) <= 3e-5 * np.linalg.norm(exact), name
