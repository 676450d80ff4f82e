"""`dequantize` against its equations in NumPy float64, and `validate` against everything that can be off."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.format.layouts import affine_zeros, with_layout
from jquant.format.validity import validate
from jquant.format.weights import (
    OutlierColumns,
    QuantizedLinear,
    SparseResidual,
    affine_weight,
    base_columns,
    bits_per_weight,
    canonical,
    codebook_weight,
    dequantize,
    is_quantized,
    shape_of,
    size_bytes,
    sparse_residual,
)

ROWS, COLUMNS = 6, 37  # no multiple of a group, a word or a period of the stream
RNG = np.random.default_rng(7)


def _codes(bits: int, columns: int = COLUMNS) -> np.ndarray:
    return RNG.integers(0, 2**bits, (ROWS, columns), dtype=np.uint8)


def _affine(bits: int, size: int, axis: Any, symmetric: bool = False) -> tuple[Any, np.ndarray]:
    """A weight and its matrix by the equation, entry by entry."""
    groups = (ROWS, -(-COLUMNS // size)) if axis == "in" else (-(-ROWS // size), COLUMNS)
    codes = _codes(bits)
    scales = RNG.normal(size=groups).astype(np.float16)
    zeros = None if symmetric else RNG.integers(0, 2**bits, groups, dtype=np.uint8)
    dense = np.zeros((ROWS, COLUMNS))
    for n in range(ROWS):
        for k in range(COLUMNS):
            group = (n, k // size) if axis == "in" else (n // size, k)
            zero = 2 ** (bits - 1) if zeros is None else zeros[group]
            dense[n, k] = float(scales[group]) * (float(codes[n, k]) - float(zero))
    packed = None if zeros is None else jnp.asarray(zeros)
    return affine_weight(jnp.asarray(codes), jnp.asarray(scales), packed, bits, size, axis), dense


@pytest.mark.parametrize(
    ("bits", "size", "axis", "symmetric"),
    [(2, 8, "in", False), (3, 37, "in", True), (4, 5, "out", False), (5, 6, "out", True), (8, 16, "in", False)],
)
def test_affine_weight_means_its_equation(bits: int, size: int, axis: Any, symmetric: bool) -> None:
    weight, dense = _affine(bits, size, axis, symmetric)
    validate(weight, "w")
    # one float32 product of numbers that float32 holds exactly
    np.testing.assert_allclose(dequantize(weight), dense, rtol=1e-7)
    _layouts_agree(weight, ["stream_t"] + ["fragments"] * (axis == "in" and bits != 5))


def _layouts_agree(weight: Any, layouts: list[str]) -> None:
    for layout in layouts:
        other = with_layout(weight, layout)
        assert other.layout == layout
        np.testing.assert_array_equal(dequantize(other), dequantize(weight))
        assert size_bytes(other) == size_bytes(weight)  # padding is not stored
        back = with_layout(other, "stream")
        for was, now in zip(jax.tree.leaves(weight), jax.tree.leaves(back), strict=True):
            np.testing.assert_array_equal(now, was)


def test_layouts_without_a_way_between_are_refused() -> None:
    weight, _ = _affine(4, 5, "out")
    with pytest.raises(ValueError, match="groups of outputs"):
        with_layout(weight, "fragments")
    with pytest.raises(ValueError, match="expected one of stream"):
        with_layout(weight, "rows")


@pytest.mark.parametrize(("bits", "rows", "scaled"), [(2, ROWS, False), (3, 1, True), (5, ROWS, True)])
def test_codebook_weight_means_its_equation(bits: int, rows: int, scaled: bool) -> None:
    codes, table = _codes(bits), RNG.normal(size=(rows, 2**bits)).astype(np.float32)
    scales = RNG.normal(size=ROWS).astype(np.float32) if scaled else None
    weight = codebook_weight(
        jnp.asarray(codes), jnp.asarray(table), bits, None if scales is None else jnp.asarray(scales)
    )
    validate(weight, "w")
    full = np.broadcast_to(table, (ROWS, 2**bits)).astype(np.float64)
    dense = full[np.arange(ROWS)[:, None], codes]
    if scales is not None:
        dense = dense * scales[:, None].astype(np.float64)
    np.testing.assert_allclose(dequantize(weight), dense, rtol=1e-7)
    _layouts_agree(weight, ["stream_t"] + ["fragments"] * (bits != 5))


def _layer(columns: int = COLUMNS) -> tuple[QuantizedLinear, np.ndarray]:
    """Codebook base, four kept columns (both ends among them), residual entries, one of them in a kept column."""
    index = np.array([0, 5, 6, columns - 1], np.int32)
    base = codebook_weight(
        jnp.asarray(_codes(3, columns - 4)), jnp.asarray(RNG.normal(size=(ROWS, 8)).astype(np.float32)), 3
    )
    kept = RNG.normal(size=(ROWS, 4)).astype(np.float32)
    mask, values = RNG.random((ROWS, columns)) < 0.1, RNG.normal(size=(ROWS, columns)).astype(np.float32)
    mask[2, 5] = True
    mask[3] = False  # a row without entries
    dense = np.zeros((ROWS, columns))
    dense[:, np.setdiff1d(np.arange(columns), index)] = dequantize(base)
    dense[:, index] = kept
    dense += np.where(mask, values, 0)
    residual = sparse_residual(jnp.asarray(mask), jnp.asarray(values))
    return QuantizedLinear(base, OutlierColumns(jnp.asarray(index), jnp.asarray(kept)), residual), dense


def test_outliers_and_residual_are_put_in_their_places() -> None:
    layer, dense = _layer()
    validate(layer, "w")
    assert shape_of(layer) == (ROWS, COLUMNS) and is_quantized(layer)
    # a sum of two float32 numbers, rounded once
    np.testing.assert_allclose(dequantize(layer), dense, rtol=1e-6, atol=1e-7)


def test_all_columns_kept_reproduces_the_matrix() -> None:
    dense = RNG.normal(size=(ROWS, 5)).astype(np.float32)
    empty = codebook_weight(jnp.zeros((ROWS, 0), jnp.uint8), jnp.zeros((ROWS, 4)), 2)
    layer = QuantizedLinear(empty, OutlierColumns(jnp.arange(5, dtype=jnp.int32), jnp.asarray(dense)))
    validate(layer, "w")
    np.testing.assert_array_equal(dequantize(layer), dense)


def test_base_columns_are_the_ones_not_kept() -> None:
    for index in ([], [0], [3, 4, 9], list(range(10))):
        expected = np.setdiff1d(np.arange(10), index)
        np.testing.assert_array_equal(base_columns(jnp.asarray(index, jnp.int32), len(expected)), expected)


def test_zeros_come_back_as_they_were_packed() -> None:
    zeros = RNG.integers(0, 8, (ROWS, 5), dtype=np.uint8)
    weight = affine_weight(jnp.asarray(_codes(3)), jnp.ones((ROWS, 5)), jnp.asarray(zeros), 3, 8, "in")
    np.testing.assert_array_equal(affine_zeros(weight), zeros)


def test_layouts_are_each_others_inverse() -> None:
    layer, _ = _layer()
    again = canonical(dataclasses.replace(layer, weight=with_layout(layer.weight, "stream_t")))
    assert jax.tree.structure(again) == jax.tree.structure(layer)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), again, layer)))
    assert jax.tree.structure(canonical(layer)) == jax.tree.structure(layer)


def test_size_counts_every_array_and_bits_all_but_the_bias() -> None:
    layer, _ = _layer()
    entries = layer.residual.values.shape[0] if layer.residual else 0
    words = ROWS * -(-(COLUMNS - 4) * 3 // 32) * 4
    expected = words + ROWS * 8 * 4 + 4 * (4 + ROWS * 4) + entries * (4 + 2) + 4 * (ROWS + 1)
    assert size_bytes(layer) == expected
    assert bits_per_weight(layer) == 8 * expected / (ROWS * COLUMNS)
    with_bias = dataclasses.replace(layer, bias=jnp.zeros(ROWS))
    assert size_bytes(with_bias) == expected + 4 * ROWS and bits_per_weight(with_bias) == bits_per_weight(layer)


def test_absent_parts_are_no_leaves() -> None:
    weight = affine_weight(jnp.zeros((4, 8), jnp.uint8), jnp.ones((4, 1)), None, 4, None, "in")
    assert len(jax.tree.leaves(QuantizedLinear(weight))) == 2
    assert weight.group_size == 8


def test_static_fields_are_part_of_the_structure() -> None:
    weight, _ = _affine(4, 8, "in")
    other = dataclasses.replace(weight, group_axis="out")
    assert jax.tree.structure(weight) != jax.tree.structure(other)
    assert jax.tree.structure(weight) == jax.tree.structure(jax.tree.map(lambda a: a, weight))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("weight", {"bits": 4}, "path.w: codes has shape"),
        ("weight", {"bits": 9}, "path.w: bits is 9; expected 2 to 8"),
        ("weight", {"shape": (ROWS + 1, 33)}, "path.w: codes has shape"),
        ("weight", {"layout": "other"}, "layout is 'other'"),
        ("weight", {"codes": jnp.zeros((ROWS, 4), jnp.int32)}, "codes is int32; expected uint32"),
        ("weight", {"codebook": jnp.zeros((2, 8))}, "codebook has .* rows; expected 1 or 6"),
        ("weight", {"codebook": jnp.zeros((ROWS, 8), jnp.int32)}, "codebook is int32; expected float32 or float16"),
        ("weight", {"scales": jnp.zeros(3)}, "scales has shape"),
        ("outliers", {"index": jnp.zeros(4)}, "outliers.index is float32; expected int32"),
        ("outliers", {"index": jnp.int32(0)}, "outliers.index has shape .*one axis"),
        ("outliers", {"weight": jnp.zeros((ROWS, 3))}, "outliers.weight has shape"),
        ("residual", {"shape": (1, 1)}, "residual.shape is"),
        ("residual", {"columns": jnp.zeros(2, jnp.uint16)}, "residual.columns has shape"),
        ("residual", {"row_pointer": jnp.zeros(3, jnp.int32)}, "residual.row_pointer has shape"),
        ("residual", {"values": jnp.zeros((3, 1))}, "residual.values has shape .*one axis"),
    ],
)
def test_validate_names_path_and_field(part: str, change: dict[str, Any], message: str) -> None:
    layer, _ = _layer()
    broken = dataclasses.replace(layer, **{part: dataclasses.replace(getattr(layer, part), **change)})
    with pytest.raises(ValueError, match=message):
        validate(broken, "path.w")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 7}, "scales has shape"),
        ({"group_size": 0}, "make no groups"),
        ({"group_axis": "up"}, "make no groups"),
        ({"zeros": jnp.zeros((5, 2), jnp.uint32)}, "zeros has shape"),
        ({"scales": jnp.zeros((ROWS, 5), jnp.int8)}, "scales is int8"),
    ],
)
def test_validate_names_what_is_wrong_with_groups(change: dict[str, Any], message: str) -> None:
    weight, _ = _affine(4, 8, "in")
    with pytest.raises(ValueError, match=message):
        validate(dataclasses.replace(weight, **change), "w")


def test_wide_matrices_have_wide_column_numbers() -> None:
    shape = (1, 65537)
    mask = jnp.zeros(shape, bool).at[0, 65536].set(True)
    residual = sparse_residual(mask, jnp.ones(shape))
    assert isinstance(residual, SparseResidual) and residual.columns.dtype == jnp.int32
    assert int(residual.columns[0]) == 65536
