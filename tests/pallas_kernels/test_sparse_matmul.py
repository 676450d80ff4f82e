"""The sparse sum against NumPy float64: empty rows, no entries, no tokens, rows of very uneven length.

Entries by row and by tile hold what they were made from, whatever the pattern.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_matmul import Config, SparseRows, add_rows, gather_sum, prepare_rows, supported
from tests.pallas_kernels.triton import count_kernels, lower_for_gpu


@pytest.mark.parametrize(("tokens", "entries"), [(3, 11), (1, 0), (0, 11)])
def test_gather_sum_is_the_sparse_product(tokens: int, entries: int) -> None:
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice([0, 1, 3, 6], entries)).astype(np.int32)  # rows 2, 4 and 5 have no entry
    columns = rng.integers(0, 9, entries).astype(np.uint16)
    values = rng.normal(size=entries).astype(np.float16)
    x = rng.normal(size=(tokens, 9)).astype(np.float32)
    dense = np.zeros((7, 9))
    np.add.at(dense, (rows, columns), values.astype(np.float64))
    y = gather_sum(jnp.asarray(x), jnp.asarray(values), jnp.asarray(columns), jnp.asarray(rows), 7)
    assert y.dtype == jnp.float32
    # at most eleven float32 terms of order one
    np.testing.assert_allclose(y, x.astype(np.float64) @ dense.T, atol=1e-5)


def matrix(counts: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(values, columns, row pointer, dense float64) with so many entries in each row."""
    rng = np.random.default_rng(int(counts.sum()))
    pointer = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    places = [np.sort(rng.choice(columns, count, replace=False)) for count in counts]
    column = np.concatenate(places).astype(np.uint16)
    values = rng.normal(size=column.size).astype(np.float16)
    dense = np.zeros((counts.size, columns))
    dense[np.repeat(np.arange(counts.size), counts), column] = values
    return values, column, pointer, dense


def shapes(rows: int, words: int, long: int, parts: int = 132) -> SparseRows:
    """Shapes of entries by row, `long` rows of which are long."""
    sizes = {"words": words, "starts": rows + 1, "first_rows": parts + 1}
    sizes |= {"long_words": 256 * long, "long_rows": long, "long_starts": long + 1}
    kinds = {name: jnp.uint32 if name.endswith("words") else jnp.int32 for name in sizes}
    arrays: dict[str, Any] = {name: jax.ShapeDtypeStruct((size,), kinds[name]) for name, size in sizes.items()}
    return SparseRows(**arrays)


def _counts(name: str) -> np.ndarray:
    counts = np.random.default_rng(0).integers(0, 12, 70)
    counts[[3, 5, 69]] = 0
    if name == "uneven":
        counts[[0, 7, 68]] = [300, 67, 200]
    if name == "one full row":
        counts[:] = 0
        counts[40] = 300
    return counts


@pytest.mark.parametrize("name", ["even", "uneven", "one full row"])
def test_rows_are_added_to_what_is_there(name: str) -> None:
    values, columns, pointer, dense = matrix(_counts(name), 300)
    sparse = prepare_rows(values, columns, pointer)
    assert (sparse.long_rows.shape[0] > 0) == (name != "even")
    rng = np.random.default_rng(1)
    for tokens, dtype in [(1, "bfloat16"), (3, "float32"), (20, "float16")]:
        x = jnp.asarray(rng.normal(size=(tokens, 300)).astype(np.float32)).astype(dtype)
        y = rng.normal(size=(tokens, 70)).astype(np.float32)
        result = add_rows(jnp.asarray(y), x, sparse, interpret=True)
        # at most 300 float32 products of order one
        expected = y + np.asarray(x.astype(jnp.float32), np.float64) @ dense.T
        np.testing.assert_allclose(result, expected, atol=3e-5)
        # rows without entries keep their values
        empty = np.diff(pointer) == 0
        np.testing.assert_array_equal(np.asarray(result)[:, empty], y[:, empty])


@pytest.mark.parametrize("counts", [[7], [0], [131], [0, 131, 0, 3, 131, 90, 64, 65, 1], [131] * 35])
def test_rows_of_any_kind_are_rounded_once_to_the_type_asked_for(counts: list[int]) -> None:
    values, columns, pointer, dense = matrix(np.array(counts), 131)
    sparse = prepare_rows(values, columns, pointer)
    rng = np.random.default_rng(3)
    for tokens, dtype in ((1, "bfloat16"), (2, "float32"), (5, "float16")):
        x = rng.normal(size=(tokens, 131)).astype(np.float16)
        y = rng.normal(size=(tokens, len(counts))).astype(np.float32)
        result = add_rows(jnp.asarray(y), jnp.asarray(x), sparse, out_dtype=dtype, interpret=True)
        assert result.dtype == dtype
        # at most 131 float32 products of order one, then half a unit in the last place
        half = float(jnp.finfo(dtype).eps) / 2
        expected = y + x.astype(np.float64) @ dense.T
        np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=1.01 * half, atol=2e-5)


def test_every_configuration_gives_the_same_sums() -> None:
    values, columns, pointer, dense = matrix(_counts("uneven"), 300)
    sparse = prepare_rows(values, columns, pointer)
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(5, 300)).astype(np.float32), rng.normal(size=(5, 70)).astype(np.float32)
    for config in (Config(32, 64, 1, 1, 4), Config(8, 16, 2, 1, 1), Config(16, 2, 1, 4, 1), Config(64, 4, 4, 8, 8)):
        result = add_rows(jnp.asarray(y), jnp.asarray(x), sparse, config=config, interpret=True)
        np.testing.assert_allclose(result, y + x.astype(np.float64) @ dense.T, atol=3e-5)


def test_padding_reads_no_column_that_the_row_has_not() -> None:
    values, columns, pointer, _ = matrix(np.array([1, 2, 3, 0, 5]), 40)
    sparse = prepare_rows(values, columns, pointer)
    x = np.zeros((1, 40), np.float32)
    unused = np.setdiff1d(np.arange(40), columns)
    x[:, unused] = np.nan
    y = add_rows(jnp.zeros((1, 5), jnp.float32), jnp.asarray(x), sparse, interpret=True)
    np.testing.assert_array_equal(y, np.zeros((1, 5)))


def test_rows_grow_by_little() -> None:
    rng = np.random.default_rng(0)
    for counts in (rng.poisson(37, 4000), rng.integers(0, 3000, 300), np.zeros(10, int)):
        values = np.ones(counts.sum(), np.float16)
        pointer = np.concatenate([[0], np.cumsum(counts)])
        sparse = prepare_rows(values, np.zeros(values.size, np.uint16), pointer)
        assert sparse.words.shape[0] + sparse.long_words.shape[0] <= 1.07 * (values.size + 2 * counts.size) + 64
        lengths = np.diff(np.asarray(sparse.starts) & (2**31 - 1)) * 4
        assert lengths.max() <= max(64, 2.1 * counts.mean() + 40)


@pytest.mark.parametrize("parts", [1, 2, 7, 132])
@pytest.mark.parametrize("name", ["even", "uneven", "one full row", "dense"])
def test_the_rows_of_a_part_lie_where_shapes_say(name: str, parts: int) -> None:
    counts = np.full(300, 299) if name == "dense" else np.tile(_counts(name), 9)
    values, columns, pointer, _ = matrix(counts, 300)
    sparse = prepare_rows(values, columns, pointer, parts=parts)
    size, halo = sparse.part()
    first, bounds = np.asarray(sparse.first_rows), np.asarray(sparse.starts) & (2**31 - 1)
    assert first[0] == 0 and first[-1] == counts.size and np.all(np.diff(first) >= 0)
    part = np.repeat(np.arange(parts), np.diff(first))
    quads = np.diff(bounds)
    assert np.all((bounds[:-1] >= part * size) | (quads == 0))
    assert np.all((bounds[1:] <= part * size + size + halo) | (quads == 0))
    if name != "dense":  # and no part has many more rows than others
        assert np.diff(first).max() <= 1.3 * counts.size / parts + 20


def test_what_the_rows_cannot_serve_is_said() -> None:
    assert supported(1, 8192, "bfloat16") is None
    for arguments, word in [
        ((0, 64, "float32"), "no tokens"),
        ((1, 65537, "float32"), "65537"),
        ((1, 8, "int8"), "int8"),
    ]:
        assert word in (supported(*arguments) or "")
    values, columns, pointer, _ = matrix(np.array([1, 2]), 8)
    with pytest.raises(ValueError, match="expected float16"):
        prepare_rows(values.astype(np.float32), columns, pointer)
    sparse = prepare_rows(values, columns, pointer)
    with pytest.raises(ValueError, match=r"expected float32\[1, 2\]"):
        add_rows(jnp.zeros((1, 3), jnp.float32), jnp.zeros((1, 8), jnp.float32), sparse)


@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("long", [0, 4])
def test_rows_lower_for_a_gpu_as_one_kernel(tokens: int, long: int) -> None:
    sparse = shapes(28672, 2**20, long)
    y, x = jax.ShapeDtypeStruct((tokens, 28672), jnp.float32), jax.ShapeDtypeStruct((tokens, 8192), jnp.bfloat16)
    for dtype in ("float32", "bfloat16"):
        program = lower_for_gpu(functools.partial(add_rows, out_dtype=dtype), y, x, sparse)
        assert count_kernels(program) == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_rows_on_the_device() -> None:
    counts = np.random.default_rng(0).poisson(20, 1000)
    counts[[5, 999]] = 4000
    values, columns, pointer, dense = matrix(counts, 4096)
    sparse = prepare_rows(values, columns, pointer)
    rng = np.random.default_rng(2)
    for tokens in (1, 2, 8, 16, 33):
        x = jnp.asarray(rng.normal(size=(tokens, 4096)).astype(np.float32)).astype(jnp.bfloat16)
        y = add_rows(jnp.ones((tokens, 1000), jnp.float32), x, sparse)
        expected = 1 + np.asarray(x.astype(jnp.float32), np.float64) @ dense.T
        # 4000 float32 products of order one in the longest rows
        np.testing.assert_allclose(y, expected, atol=1e-3)
        y = add_rows(jnp.ones((tokens, 1000), jnp.float32), x, sparse, out_dtype="bfloat16")
        np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8, atol=1e-3)
