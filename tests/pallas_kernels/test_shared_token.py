"""Entries by row times tokens in shared memory, against NumPy float64: the instructions carried out, and on a GPU.

The instructions are the very text that the kernel assembles; `tests.pallas_kernels.ptx` says what each means.
"""

import string
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_matmul import (
    Config,
    SharedConfig,
    SparseRows,
    add_rows,
    default_shared,
    gather_sum,
    no_shared_token,
    prepare_rows,
    shape_of,
)
from pallas_kernels.sparse_matmul.shared_token import shared_bytes
from pallas_kernels.sparse_matmul.token_text import kernel_text
from tests.pallas_kernels.ptx import Cta
from tests.pallas_kernels.test_sparse_matmul import matrix, shapes
from tests.pallas_kernels.triton import lower_for_gpu

_CASES: dict[str, tuple[Any, int]] = {  # entries of each row, and K
    "one row": ([7], 131),
    "full rows": ([0, 131, 0, 3, 131, 90, 64, 65, 1], 132),
    "a full row among empty ones": ([0] * 5 + [131] + [0] * 300, 131),
    "few": (np.random.default_rng(0).integers(0, 12, 70), 300),
    "many rows": (np.random.default_rng(1).poisson(20, 300), 1001),
    "dense": ([120] * 20, 124),
}
_CALLS = [  # tokens, type of x, type of the result, parts
    (1, "bfloat16", "bfloat16", 3),
    (2, "float16", "float32", 2),
    (3, "bfloat16", "float16", 5),
    (8, "bfloat16", "bfloat16", 1),
    (11, "float16", "bfloat16", 2),
]


def _carried_out(y: np.ndarray, x: np.ndarray, sparse: SparseRows, out_dtype: str, config: SharedConfig) -> np.ndarray:
    """What the threads of the kernel write."""
    shape = shape_of(x, sparse, out_dtype)
    operands = ("thread", "part", "block", "inputs", "sums", "totals", "x", "y", "out", *sparse._fields)
    text = string.Template(kernel_text(shape, config)).substitute({name: name for name in operands})
    out = np.full(y.shape, np.nan, jnp.dtype(out_dtype))
    arrays = {name: np.asarray(array).copy() for name, array in sparse._asdict().items()}
    arrays |= {"x": x.copy(), "y": y.copy(), "out": out}
    sums = -(-2 * shape.columns * config.block_m // 16) * 16
    totals = sums + 4 * (shape.part + shape.halo) * config.block_m
    size = totals + 16 * config.warpgroups * config.block_m
    assert size <= shared_bytes(shape, config)
    for part, block in np.ndindex(shape.parts, -(-shape.tokens // config.block_m)):
        cta = Cta(128 * config.warpgroups, size, arrays)
        places = {"part": part, "block": block, "inputs": 0, "sums": sums, "totals": -(-totals // 16) * 16}
        cta.registers |= {name: np.full(cta.threads, place) for name, place in places.items()}
        cta.registers["thread"] = np.arange(cta.threads)
        cta.run(text)
    return out


def _assert_rounded(found: Any, y: np.ndarray, x: np.ndarray, dense: np.ndarray) -> None:
    """At most a few hundred float32 products of order one, then half a unit in the last place."""
    expected = y + x.astype(np.float64) @ dense.T
    half = float(jnp.finfo(found.dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=1.01 * half, atol=3e-5)


@pytest.mark.parametrize("name", _CASES)
@pytest.mark.parametrize("call", _CALLS, ids=str)
def test_the_instructions_add_every_entry_once(name: str, call: tuple[int, str, str, int]) -> None:
    counts, columns = _CASES[name]
    tokens, dtype, out_dtype, parts = call
    values, column, pointer, dense = matrix(np.array(counts), columns)
    sparse = prepare_rows(values, column, pointer, parts=parts)
    rng = np.random.default_rng(tokens)
    x = rng.normal(size=(tokens, columns)).astype(jnp.dtype(dtype))
    y = rng.normal(size=(tokens, len(counts))).astype(np.float32)
    found = _carried_out(y, x, sparse, out_dtype, default_shared(shape_of(x, sparse, out_dtype)))
    _assert_rounded(found, y, x, dense)


def test_rows_without_entries_may_lie_far_in_front_of_their_part() -> None:
    # from some part on the bytes between are more than the address of the sums
    counts, columns = _CASES["a full row among empty ones"]
    values, column, pointer, dense = matrix(np.array(counts), columns)
    sparse = prepare_rows(values, column, pointer, parts=132)
    x, y = np.ones((2, columns), np.float16), np.ones((2, len(counts)), np.float32)
    shape = shape_of(x, sparse, "float32")
    assert 4 * 2 * (132 * shape.part - shape.quads) > 2 * 2 * columns
    found = _carried_out(y, x, sparse, "float32", default_shared(shape))
    _assert_rounded(found, y, x, dense)


@pytest.mark.parametrize("config", [SharedConfig(1, 1, 1), SharedConfig(1, 3, 32), SharedConfig(2, 2, 8)], ids=str)
def test_every_configuration_gives_the_same_sums(config: SharedConfig) -> None:
    counts = np.random.default_rng(0).integers(0, 40, 200)
    counts[[3, 90]] = 1200
    values, columns, pointer, dense = matrix(counts, 1202)
    sparse = prepare_rows(values, columns, pointer, parts=2)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 1202)).astype(np.float16)
    y = rng.normal(size=(2, 200)).astype(np.float32)
    np.testing.assert_allclose(
        _carried_out(y, x, sparse, "float32", config), y + x.astype(np.float64) @ dense.T, atol=3e-4
    )


def test_no_column_is_read_that_the_row_has_not() -> None:
    values, columns, pointer, _ = matrix(np.array([1, 2, 3, 0, 5, 70]), 400)
    sparse = prepare_rows(values, columns, pointer, parts=1)
    x = np.zeros((1, 400), np.float16)
    x[:, np.setdiff1d(np.arange(400), columns)] = np.nan
    y = np.zeros((1, 6), np.float32)
    found = _carried_out(y, x, sparse, "float32", default_shared(shape_of(x, sparse, "float32")))
    np.testing.assert_array_equal(found, y)


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 28672, 8192), (3, 130, 8191), (8, 4097, 4096)])
@pytest.mark.parametrize("long", [0, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_lowers_for_a_gpu(tokens: int, rows: int, columns: int, long: int, dtype: str) -> None:
    x = jax.ShapeDtypeStruct((tokens, columns), jnp.dtype(dtype))
    y, sparse = jax.ShapeDtypeStruct((tokens, rows), jnp.float32), shapes(rows, 40 * rows, long)
    for out_dtype in ("float32", dtype):
        config = default_shared(shape_of(x, sparse, out_dtype))

        def run(y: Any, x: Any, sparse: Any, out: str = out_dtype, config: SharedConfig = config) -> jax.Array:
            return add_rows(y, x, sparse, out_dtype=out, config=config)

        assert lower_for_gpu(run, y, x, sparse).count("stablehlo.custom_call @mosaic_gpu") == 1
        batch = jax.ShapeDtypeStruct((2, *y.shape), y.dtype), jax.ShapeDtypeStruct((2, *x.shape), x.dtype)
        assert "mosaic_gpu" in lower_for_gpu(jax.vmap(run, in_axes=(0, 0, None)), *batch, sparse)


def test_what_it_cannot_serve_is_said_and_goes_to_the_other_kernel() -> None:
    sparse = shapes(100, 4000, 0)
    y = jax.ShapeDtypeStruct((1, 100), jnp.float32)
    for tokens, columns, dtype, word in [(9, 64, "bfloat16", "9"), (1, 64, "float32", "float32")]:
        x = jax.ShapeDtypeStruct((tokens, columns), jnp.dtype(dtype))
        assert word in (no_shared_token(shape_of(x, sparse, "float32")) or "")
    assert no_shared_token(shape_of(jax.ShapeDtypeStruct((8, 65536), jnp.float16), sparse, "float32")) is None
    x = jax.ShapeDtypeStruct((1, 64), jnp.float32)
    with pytest.raises(ValueError, match="shared memory cannot serve this: activations are float32"):
        jax.eval_shape(lambda *a: add_rows(*a, config=SharedConfig(1, 8, 4)), y, x, sparse)
    assert "mosaic_gpu" not in lower_for_gpu(add_rows, y, x, sparse)


def test_tokens_are_as_many_as_shared_memory_holds() -> None:
    sparse = shapes(8192, 2**20, 0)
    for tokens, columns, block_m in [(1, 65536, 1), (3, 8192, 4), (8, 8192, 8), (8, 16384, 4), (4, 65536, 1)]:
        shape = shape_of(jax.ShapeDtypeStruct((tokens, columns), jnp.bfloat16), sparse, "float32")
        assert default_shared(shape).block_m == block_m


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_on_the_device(tokens: int, dtype: str) -> None:
    rng = np.random.default_rng(tokens)
    uneven = rng.poisson(20, 1000)
    uneven[[5, 700, 999]] = [0, 900, 1001]
    for counts, columns in ((rng.poisson(30, 28672), 128), (uneven, 1001), *_CASES.values()):
        values, column, pointer, dense = matrix(np.minimum(counts, columns), columns)
        sparse = prepare_rows(values, column, pointer)
        x = rng.normal(size=(tokens, columns)).astype(jnp.dtype(dtype))
        y = rng.normal(size=(tokens, len(counts))).astype(np.float32)
        rows = np.repeat(np.arange(len(counts)), np.diff(pointer)).astype(np.int32)
        for out_dtype in ("float32", dtype):
            config = default_shared(shape_of(x, sparse, out_dtype))
            found = add_rows(jnp.asarray(y), jnp.asarray(x), sparse, out_dtype=out_dtype, config=config)
            # 1001 float32 products of order one in the longest row
            expected = y + x.astype(np.float64) @ dense.T
            half = float(jnp.finfo(found.dtype).eps) / 2
            np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=1.01 * half, atol=3e-4)
            entries = [jnp.asarray(a) for a in (values, column, rows)]
            other = gather_sum(jnp.asarray(x, jnp.float32), entries[0], entries[1], entries[2], len(counts))
            np.testing.assert_allclose(found.astype(jnp.float32), y + other, rtol=2 * half, atol=3e-4)


@pytest.mark.gpu
def test_a_batch_on_the_device() -> None:
    values, column, pointer, dense = matrix(np.random.default_rng(0).poisson(20, 300), 1001)
    sparse = prepare_rows(values, column, pointer)
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(3, 1, 1001)).astype(np.float16), rng.normal(size=(3, 1, 300)).astype(np.float32)
    found = jax.jit(jax.vmap(lambda y, x: add_rows(y, x, sparse)))(jnp.asarray(y), jnp.asarray(x))
    np.testing.assert_allclose(found, y + x.astype(np.float64) @ dense.T, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_both_kernels_agree_on_the_device() -> None:
    values, column, pointer, _ = matrix(np.random.default_rng(0).poisson(20, 3000), 4096)
    sparse = prepare_rows(values, column, pointer)
    x = jax.random.normal(jax.random.key(0), (1, 4096), jnp.bfloat16)
    y = jax.random.normal(jax.random.key(1), (1, 3000))
    one, other = (add_rows(y, x, sparse, config=c) for c in (SharedConfig(1, 8, 4), Config(32, 16, 4, 1, 4)))
    np.testing.assert_allclose(one, other, atol=1e-4)
