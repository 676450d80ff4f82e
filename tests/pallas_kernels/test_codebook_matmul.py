"""The codebook product: it lowers for every kind of x and table, says what it cannot do, and on a GPU is right."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.affine_matmul.config import Config, Problem, supported_config
from pallas_kernels.codebook_matmul import codebook_matmul, prepare_tables
from pallas_kernels.codebook_matmul.choice import candidates, choose, estimate, supported
from pallas_kernels.fragments import fragments_shape, pack_fragments, slot_order

TYPES = [("bfloat16", "bfloat16"), ("float16", "float16"), ("int8", "int8"), ("bfloat16", "int8"), ("float16", "int8")]


def _problem(tokens: int, outputs: int, inputs: int, bits: int, x_dtype: str) -> Problem:
    return Problem(tokens, outputs, inputs, bits, None, False, x_dtype, "float32")


@pytest.mark.parametrize(("x_dtype", "entry"), TYPES)
def test_every_width_lowers_for_cuda(x_dtype: str, entry: str) -> None:
    for bits, tokens, one_table, multiplier in [(2, 1, False, None), (3, 20, True, False), (4, 130, False, True)]:
        outputs, inputs = 200, 336
        args: dict[str, Any] = {
            "x": jax.ShapeDtypeStruct((tokens, inputs), jnp.dtype(x_dtype)),
            "words": jax.ShapeDtypeStruct(fragments_shape((outputs, inputs), bits), jnp.uint32),
            "codebook": jax.ShapeDtypeStruct((1 if one_table else outputs, 2**bits), jnp.dtype(entry)),
            "scales": jax.ShapeDtypeStruct((outputs,), jnp.float32),
        }
        if x_dtype == "int8":
            args["x_scales"] = jax.ShapeDtypeStruct((tokens, 1), jnp.float32)
            args["x_offsets"] = jax.ShapeDtypeStruct((tokens, 1), jnp.float32)
            args["row_sums"] = jax.ShapeDtypeStruct((outputs,), jnp.float32)

        def run(args: dict[str, Any], bits: int = bits, multiplier: bool | None = multiplier) -> jax.Array:
            args = dict(args)
            args["tables"] = prepare_tables(args.pop("codebook"), jnp.dtype(entry))
            return codebook_matmul(**args, bits=bits, outputs=200, multiplier=multiplier)

        lowered = jax.jit(run).trace(args).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()
        (out,) = jax.tree.leaves(lowered.out_info)
        assert out.shape == (tokens, outputs) and out.dtype == ("bfloat16" if x_dtype == "int8" else x_dtype)


CASES = [
    # tokens, outputs, inputs, one table
    (1, 64, 64, False),
    (5, 200, 328, False),
    (16, 200, 1024, True),
    (70, 192, 520, False),
    (130, 136, 2048, True),
    (300, 256, 264, False),
]


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("x_dtype", "entry"), TYPES)
def test_product_is_that_of_the_looked_up_matrix(bits: int, x_dtype: str, entry: str) -> None:
    for tokens, outputs, inputs, one_table in CASES:
        rng = np.random.default_rng(tokens)
        codes = rng.integers(0, 2**bits, (outputs, inputs), dtype=np.uint8)
        scales = rng.uniform(0.5, 2, outputs).astype(np.float32)
        shape = (1 if one_table else outputs, 2**bits)
        if entry == "int8":
            codebook = jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
        else:
            codebook = jnp.asarray(rng.normal(size=shape), jnp.dtype(entry))
        if x_dtype == "int8":
            x = jnp.asarray(rng.integers(-127, 128, (tokens, inputs)), jnp.int8)
        else:
            # bfloat16 beside int8 entries: tokens of any size, each with values of any size
            spread = (10.0 ** rng.integers(-3, 3, (tokens, inputs))) * 10.0 ** rng.integers(-20, 20, (tokens, 1))
            spread = spread if (x_dtype, entry) == ("bfloat16", "int8") else 1.0
            x = jnp.asarray(rng.normal(size=(tokens, inputs)) * spread, jnp.dtype(x_dtype))
        table = np.broadcast_to(np.asarray(codebook, np.float64), (outputs, 2**bits))
        w = np.take_along_axis(table, codes.astype(np.int64), axis=1) * scales[:, None]
        exact = np.asarray(x, np.float64) @ w.T
        terms = np.abs(np.asarray(x, np.float64)) @ np.abs(w).T
        rest: dict[str, Any] = {}
        if x_dtype == "int8":
            x_scales, x_offsets = rng.uniform(0.01, 1, (2, tokens, 1)).astype(np.float32)
            row_sums = w.sum(1).astype(np.float32)
            exact = exact * x_scales + x_offsets * row_sums
            terms = terms * x_scales + np.abs(x_offsets * row_sums)
            names = {"x_scales": x_scales, "x_offsets": x_offsets, "row_sums": row_sums}
            rest = {name: jnp.asarray(value) for name, value in names.items()}
            padded = jnp.pad(x, ((0, 0), (0, -inputs % 64)))
            x = padded[:, slot_order(padded.shape[1])]
        words = pack_fragments(jnp.asarray(codes), bits, "rows")
        tables = prepare_tables(codebook, jnp.dtype(entry))
        problem = _problem(tokens, outputs, inputs, bits, x_dtype)
        best = choose(problem, jnp.dtype(entry).itemsize)
        parted = [config for config in candidates(problem) if config.splits > 1 or config.k_warpgroups > 1]
        for config, multiplier in [(best, None), (best, False), *((config, True) for config in parted[-2:])]:
            y = codebook_matmul(
                x,
                words,
                tables,
                jnp.asarray(scales),
                bits=bits,
                outputs=outputs,
                out_dtype=jnp.float32,
                config=config,
                multiplier=multiplier,
                **rest,
            )
            # integer sums are exact; the tensor core adds 16-bit products with about 22 bits
            tolerance = 1e-6 if x_dtype == "int8" else 1e-5
            error = np.abs(np.asarray(y, np.float64) - exact)
            assert np.all(error <= tolerance * terms), (config, multiplier, float((error / terms).max()))


def test_a_choice_fits_and_is_the_best_estimate() -> None:
    for bits in (2, 3, 4):
        for x_dtype in ("bfloat16", "int8"):
            for tokens in (1, 9, 40, 64, 65, 500, 4000):
                for outputs, inputs in [(28672, 8192), (4096, 4096), (8, 24), (100, 14336)]:
                    problem = _problem(tokens, outputs, inputs, bits, x_dtype)
                    config = choose(problem)
                    assert supported(problem) is None and supported_config(problem, config) is None
                    assert estimate(problem, config) == min(estimate(problem, c) for c in candidates(problem))
                    assert config.blocks <= 132 and (config.block_m >= min(tokens, 128))


def test_what_has_no_kernel_is_said() -> None:
    good = _problem(4, 64, 128, 4, "bfloat16")
    assert supported(good) is None
    reasons = {
        "expected 2, 3 or 4": dataclasses.replace(good, bits=8),
        "activations are float32": dataclasses.replace(good, x_dtype="float32"),
        "nothing to multiply: M=0": dataclasses.replace(good, tokens=0),
        "may exceed int32": dataclasses.replace(good, x_dtype="int8", inputs=200000),
    }
    for sentence, problem in reasons.items():
        assert sentence in str(supported(problem))


def test_bad_arguments_say_what_was_expected() -> None:
    x, words = jnp.zeros((2, 64), jnp.bfloat16), jnp.zeros((1, 1, 4, 128), jnp.uint32)
    tables = prepare_tables(jnp.zeros((64, 16)), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"words has shape \[1, 1, 4, 128\]; expected \[2, 1, 4, 128\]"):
        codebook_matmul(x, words, tables, bits=4, outputs=128)
    with pytest.raises(ValueError, match=r"expected \[8, 1\] or \[8, 64\], what prepare_tables gives for entries"):
        codebook_matmul(x, words, tables[:2], bits=4, outputs=64)
    with pytest.raises(ValueError, match="one for each of the 2 tokens"):
        codebook_matmul(x, words, tables, bits=4, outputs=64, x_scales=jnp.zeros(3))
    with pytest.raises(ValueError, match="go together"):
        codebook_matmul(x, words, tables, bits=4, outputs=64, x_offsets=jnp.zeros(2))
    with pytest.raises(ValueError, match="does not fit"):
        codebook_matmul(x, words, tables, bits=4, outputs=64, config=Config(8, 96, 1))
    with pytest.raises(ValueError, match="snap it to a grid a row first"):
        prepare_tables(jnp.zeros((64, 16)), jnp.int8)
