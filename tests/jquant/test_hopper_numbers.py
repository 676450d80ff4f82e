"""What the products on a Hopper GPU add up to, where there is none: the kernels' arithmetic in JAX.

The kernels are replaced by the sums that they specify, over operands rounded as theirs are. So what `jquant.prepare`
made and `hopper.product` passes on is judged by its numbers: every product of bfloat16 tokens is within 2e-3 of float32
arithmetic on the decoded weight, of which rounding the output takes 1.66e-3.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.format.activations import ActivationQuant, fake_quantize
from jquant.format.weights import (
    OutlierColumns,
    QuantizedLinear,
    affine_weight,
    base_columns,
    canonical,
    codebook_weight,
    dequantize,
    sparse_residual,
)
from jquant.linear import choose, hopper, preparation, prepare
from pallas_kernels.affine_matmul import Problem, choice as blocks, rounds_weights
from pallas_kernels.fragments import slot_order, unpack_fragments
from pallas_kernels.half_tokens import half_tokens
from pallas_kernels.kept_columns import kept_weight
from pallas_kernels.sparse_matmul import EntryTiles, prepare_tiles

N, K = 200, 648


def _codebook_matmul(
    x: Any, words: Any, tables: Any, scales: Any = None, *, bits: int, outputs: int, **more: Any
) -> Any:
    codes = unpack_fragments(words, bits, "rows", (outputs, x.shape[1])).astype(jnp.int32)
    planes = jax.lax.bitcast_convert_type(tables.T, jnp.uint8).reshape(tables.shape[1], -1).astype(jnp.uint16)
    entries = planes[:, : 2**bits] | planes[:, 2**bits :] << 8
    table = jax.lax.bitcast_convert_type(entries, x.dtype).astype(jnp.float32)
    table = jnp.broadcast_to(table, (max(outputs, table.shape[0]), 2**bits))[:outputs]
    weight = jnp.take_along_axis(table, codes, axis=1)
    return _sum(x, weight, scales, more)


def _affine_matmul(
    x: Any,
    words: Any,
    scales: Any,
    zeros: Any = None,
    *,
    bits: int,
    outputs: int,
    entries: EntryTiles | None = None,
    **more: Any,
) -> Any:
    if x.dtype == jnp.int8:
        x = jnp.zeros_like(x).at[:, slot_order(x.shape[1])].set(x)
    codes = unpack_fragments(words, bits, "pairs", (outputs, x.shape[1])).astype(jnp.float32)
    size = more["group_size"] or x.shape[1]
    group, row = np.arange(x.shape[1]) // size, slice(0, outputs)
    offset = 2.0 ** (bits - 1) if zeros is None else zeros[group, row].T.astype(jnp.float32)
    scale = scales[group, row].T.astype(jnp.float32)
    if (steps := more.get("steps")) is not None:
        assert scales.dtype == jnp.uint8
        scale = scale * steps.astype(jnp.float32)[:, None]
    weight = codes - offset
    if entries is not None:
        assert entries.dtype == x.dtype.name
        weight = _rounded(weight + _dense(entries, weight.shape), x.dtype)
    tokens, inputs = x.shape
    kinds = x.dtype.name, scales.dtype.name, 0 if entries is None else entries.slots.shape[2]
    if rounds_weights(Problem(tokens, outputs, inputs, bits, more["group_size"], zeros is not None, *kinds)):
        weight = _rounded(_rounded(scale, x.dtype) * weight, x.dtype)
    else:
        weight = scale * weight
    assert weight.shape == (outputs, x.shape[1])
    return _sum(x, weight, None, more)


def _dense(tiles: EntryTiles, shape: tuple[int, ...]) -> Any:
    """The entries as a matrix, read as `pallas_kernels.sparse_matmul.tiles` draws them."""
    slots, overflow = np.asarray(tiles.slots), np.asarray(tiles.overflow)
    found = np.zeros((64 * slots.shape[0], 128 * slots.shape[1]), np.float32)
    for block in np.ndindex(slots.shape[:2]):
        words = slots[block]
        for i in range(8):
            half, warp = divmod(i, 4)
            mask, head = (int(word) for word in words[2 * i : 2 * i + 2])
            lanes, begin, further = _bits(mask), (head & 0xFF) + 2 * warp, (head >> 8 & 0x7F) - 1
            seconds = [lane for r, lane in enumerate(lanes) if head >> 31 - r & 1]
            pairs = [*zip(lanes, words[begin:], strict=False), *zip(seconds, words[begin - 1 :: -1], strict=False)]
            rest = overflow[words[begin] :] if head & 0x8000 else words[begin + len(lanes) :]
            for _ in range(further):
                lanes = _bits(int(rest[0]))
                pairs += zip(lanes, rest[1:], strict=False)
                rest = rest[1 + len(lanes) :]
            for lane, entry in pairs:
                row = 64 * block[0] + 16 * warp + lane // 4 + 8 * (entry & 1)
                column = 128 * block[1] + 64 * half + (entry >> 9 & 63)
                found[row, column] += np.uint16(entry >> 16).view(jnp.dtype(tiles.dtype))
    return jnp.asarray(found[: shape[0], : shape[1]])


def _bits(mask: int) -> list[int]:
    return [lane for lane in range(32) if mask >> lane & 1]


def _rounded(values: Any, dtype: Any) -> Any:
    return jax.lax.optimization_barrier(values.astype(dtype)).astype(jnp.float32)


def _sum(x: Any, weight: Any, scales: Any, more: dict[str, Any]) -> Any:
    y = jnp.dot(x.astype(jnp.float32), weight.T, precision="highest")
    if scales is not None:
        y = y * scales.astype(jnp.float32)
    if more.get("x_scales") is not None:
        y = y * more["x_scales"].reshape(-1, 1)
    if more.get("x_offsets") is not None:
        y = y + more["x_offsets"].reshape(-1, 1) * more["row_sums"]
    if more.get("kept") is not None:
        beside, fragments = more["kept"]
        kept = kept_weight(fragments, (y.shape[1], beside.shape[1])).astype(jnp.float32)
        y = y + jnp.dot(beside.astype(jnp.float32), kept.T, precision="highest")
    return y.astype(more["out_dtype"])


def _table(bits: int, rows: int = N, scaled: bool = False) -> Any:
    rng = np.random.default_rng(bits)
    codes = jnp.asarray(rng.integers(0, 2**bits, (N, K), dtype=np.uint8))
    table = jnp.asarray(rng.normal(size=(rows, 2**bits)), jnp.float16)
    scales = jnp.asarray(rng.uniform(0.5, 2, N), jnp.float16) if scaled else None
    return codebook_weight(codes, table, bits, scales)


@pytest.fixture(autouse=True)
def kernels_in_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hopper, preparation):
        monkeypatch.setattr(module, "no_hopper", lambda: None)
    monkeypatch.setattr(preparation, "platform", lambda: "gpu")
    # as beside large weights: with many tokens weights are scaled in 16 bits
    monkeypatch.setattr(blocks, "_WIDE", [pair for pair in blocks._WIDE if pair[0].scale == "operand"])
    monkeypatch.setattr(hopper.codebook_matmul, "codebook_matmul", _codebook_matmul)
    monkeypatch.setattr(hopper.affine_matmul, "affine_matmul", _affine_matmul)
    monkeypatch.setattr(hopper.half_tokens, "convert", half_tokens)
    monkeypatch.setattr(hopper.activation_quantize, "quantize_rows", hopper.activation_quantize.quantize)


def _error(w: Any, tokens: int, dtype: Any = jnp.bfloat16) -> float:
    layer = w if isinstance(w, QuantizedLinear) else QuantizedLinear(w)
    assert choose(layer, tokens, dtype=dtype).implementation == "pallas"
    x = jnp.asarray(np.random.default_rng(tokens).normal(size=(tokens, K)), dtype)
    y = np.asarray(hopper.product(x, layer, dtype), np.float64)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64).T
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("tokens", [5, 130])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("bits", "rows"), [(2, N), (3, N), (4, N), (4, 1)])
def test_tables_of_float16_lose_little_beside_bfloat16(bits: int, rows: int, scaled: bool, tokens: int) -> None:
    ready = prepare(_table(bits, rows, scaled))
    assert _error(ready, tokens) <= 2e-3
    assert _error(ready, tokens, jnp.float16) <= 3e-4  # entries are exact, and so are the scales beside them
    assert ready.table_scales.shape == (N,) and ready.table_scales.dtype == jnp.float32
    assert hopper.table_scales(ready, "float16") is ready.scales
    stored: Any = canonical(ready)
    assert stored.table_scales is None and stored.tables is None


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("running", [jnp.bfloat16, jnp.float16])
def test_entries_are_in_the_units_of_the_table_that_they_meet(scaled: bool, running: Any) -> None:
    mask = jnp.asarray(np.random.default_rng(0).random((N, K)) < 0.01)
    values = jnp.asarray(np.random.default_rng(1).normal(size=(N, K)), jnp.float32)
    layer = QuantizedLinear(_table(3, scaled=scaled), residual=sparse_residual(mask, values, jnp.float16))
    ready = prepare({"embed": jnp.zeros((8, 4), running), "layer": layer})["layer"]
    rest = ready.residual
    scales = hopper.table_scales(ready.weight, running.__name__)
    own = np.asarray(rest.values, np.float32)
    if scales is not None:
        row = np.repeat(np.arange(N), np.diff(np.asarray(rest.row_pointer, np.int64)))
        own = own / np.asarray(scales, np.float32)[row]
    expected = prepare_tiles(own, np.asarray(rest.columns), np.asarray(rest.row_pointer), K, running)
    assert rest.by_tile.dtype == expected.dtype
    np.testing.assert_array_equal(rest.by_tile.slots, expected.slots)
    if running == jnp.bfloat16:
        assert np.any(np.asarray(ready.weight.table_scales) != np.asarray(1 if not scaled else ready.weight.scales))


def _affine(bits: int, size: int | None, symmetric: bool, dtype: Any = jnp.float16, scale: float = 1.0) -> Any:
    rng = np.random.default_rng(bits)
    codes = jnp.asarray(rng.integers(0, 2**bits, (N, K), dtype=np.uint8))
    groups = (N, 1 if size is None else -(-K // size))
    zeros = None if symmetric else jnp.asarray(rng.integers(0, 2**bits, groups, dtype=np.uint8))
    scales = jnp.asarray(rng.uniform(0.5, 1.5, groups) * scale, dtype)
    return affine_weight(codes, scales, zeros, bits, size, "in")


@pytest.mark.parametrize("tokens", [5, 64, 65, 129])
@pytest.mark.parametrize(
    ("bits", "size", "symmetric"), [(4, 128, True), (4, 64, False), (3, 64, True), (2, 64, False), (8, None, False)]
)
def test_groups_lose_little_however_many_tokens_there_are(
    bits: int, size: int | None, symmetric: bool, tokens: int
) -> None:
    ready = prepare(_affine(bits, size, symmetric))
    assert _error(ready, tokens) <= 2e-3
    assert ("bfloat16 as float16" in choose(ready, tokens).reason) == (tokens > 64)
    stored: Any = canonical(ready)
    assert stored.fits_half is None


@pytest.mark.parametrize(
    ("dtype", "scale", "fits"),
    [
        (jnp.float16, 2.0**-18, True),  # subnormal: products are whole numbers of 2**-24
        (jnp.float16, 2.0**12, False),  # products overflow
        (jnp.bfloat16, 2.0**-4, True),
        (jnp.bfloat16, 2.0**-20, False),
        (jnp.float32, 2.0**-4, True),
        (jnp.float32, 2.0**20, False),
    ],
)
def test_weights_out_of_the_range_of_float16_stay_bfloat16(dtype: Any, scale: float, fits: bool) -> None:
    ready = prepare(_affine(4, 64, True, dtype, scale))
    assert ready.fits_half == fits
    assert ("as float16" in choose(ready, 200).reason) == fits
    assert _error(ready, 200) <= (2e-3 if fits else 3.2e-3)


def test_whole_rows_and_float16_tokens_stay_what_they_are() -> None:
    assert "as float16" not in choose(prepare(_affine(4, None, True)), 200).reason
    assert "as float16" not in choose(prepare(_affine(4, 64, True)), 200, dtype=jnp.float16).reason


def _with_entries(base: Any, share: float = 0.01, size: float = 1.0, kind: Any = jnp.float16) -> QuantizedLinear:
    mask = jnp.asarray(np.random.default_rng(0).random((N, K)) < share)
    values = jnp.asarray(np.random.default_rng(1).normal(size=(N, K)) * size, jnp.float32)
    return QuantizedLinear(base, residual=sparse_residual(mask, values, kind))


@pytest.mark.parametrize("tokens", [17, 64, 200])
@pytest.mark.parametrize("size", [1.0, 100.0])
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 128, True), (3, 64, False), (4, None, True)])
def test_entries_inside_the_product_lose_little(
    bits: int, group: int | None, symmetric: bool, size: float, tokens: int
) -> None:
    ready = prepare(_with_entries(_affine(bits, group, symmetric), size=size))
    reason = choose(ready, tokens).reason
    assert ready.residual.by_tile.dtype == "float16"
    assert "added to the weights" in reason and "bfloat16 as float16" in reason
    assert _error(ready, tokens) <= 2e-3
    # the same entries for tokens that are float16 from the start
    assert "as float16" not in choose(ready, tokens, dtype=jnp.float16).reason
    assert _error(ready, tokens, jnp.float16) <= 1e-3
    beside = dataclasses.replace(ready, residual=dataclasses.replace(ready.residual, by_tile=None))
    assert "by row" in choose(beside, tokens).reason
    assert ("as float16" in choose(beside, tokens).reason) == (tokens == 200 and group is not None)


@pytest.mark.parametrize(
    ("scale", "size", "fits"),
    [
        (2.0**-4, 1.0, True),
        (2.0**-4, 2.0**13, False),  # in units of the scale they overflow
        (2.0**11, 3e4, False),  # the sum with a weight does
        (2.0**-24, 2.0**-20, False),  # multiples of 2**-24
    ],
)
def test_entries_out_of_the_range_of_float16_stay_bfloat16(scale: float, size: float, fits: bool) -> None:
    base = _affine(4, 64, True, jnp.float32, scale)
    mask = jnp.zeros((N, K), bool).at[7, 300].set(True)
    rest = sparse_residual(mask, jnp.full((N, K), size, jnp.float32), jnp.float16)
    ready = prepare(QuantizedLinear(base, residual=rest))
    assert ready.residual.by_tile.dtype == ("float16" if fits else "bfloat16")
    assert ready.weight.fits_half == fits
    assert ("as float16" in choose(ready, 200).reason) == fits
    assert _error(ready, 200) <= (2e-3 if fits else 3.2e-3)


def test_entries_by_row_leave_the_weights_float16() -> None:
    base = _affine(4, 64, True)
    base = dataclasses.replace(base, scales=base.scales.at[7, 4].set(0))
    mask = jnp.zeros((N, K), bool).at[7, 300].set(True)  # beside a scale of zero
    ready = prepare(QuantizedLinear(base, residual=sparse_residual(mask, jnp.ones((N, K)), jnp.float16)))
    assert ready.residual.by_tile is None and ready.weight.fits_half
    reason = choose(ready, 200).reason
    assert "by row" in reason and "as float16" in reason


@pytest.mark.parametrize("tokens", [5, 130])
@pytest.mark.parametrize("running", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "act", [None, ActivationQuant(None, None, 4), ActivationQuant(None, None, 8, symmetric=True)], ids=str
)
def test_kept_columns_are_added_to_the_base_once(act: ActivationQuant | None, running: Any, tokens: int) -> None:
    rng = np.random.default_rng(3)
    kept = jnp.asarray(np.sort(rng.permutation(K + 70)[:70]), jnp.int32)
    weight = jnp.asarray(rng.normal(size=(N, 70)), jnp.float16)
    layer = QuantizedLinear(_affine(4, None, True), OutlierColumns(kept, weight), activation=act)
    ready = prepare({"embed": jnp.zeros((8, 4), running), "layer": layer})["layer"]
    base = base_columns(kept, K)
    for dtype in (jnp.bfloat16, jnp.float16):
        x = jnp.asarray(rng.normal(size=(tokens, K + 70)), dtype).at[:, kept].multiply(20)
        assert ("inside" in choose(ready, tokens, dtype=dtype).reason) == (dtype == running)
        inputs = x[:, base].astype(jnp.float32)
        inputs = inputs if act is None else fake_quantize(inputs, act)
        expected = np.asarray(inputs, np.float64) @ np.asarray(dequantize(layer.weight), np.float64).T
        columns = np.asarray(weight.astype(dtype), np.float64)
        expected += np.asarray(x[:, kept], np.float64) @ columns.T
        y = np.asarray(hopper.product(x, ready, jnp.float32), np.float64)
        assert np.linalg.norm(y - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("tokens", [1, 5, 130])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_whole_scales_and_steps_are_multiplied_once(bits: int, symmetric: bool, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    base = _affine(bits, 64, True)
    steps, multiples = rng.integers(64, 128, (N, 1)) * 2.0**-12, rng.integers(1, 17, base.scales.shape)
    base = dataclasses.replace(base, scales=jnp.asarray(steps * multiples, jnp.float16))
    act = ActivationQuant(None, None, 8, symmetric=symmetric)
    ready = prepare(QuantizedLinear(base, activation=act))
    assert ready.weight.steps is not None
    x = jnp.asarray(rng.normal(size=(tokens, K)), jnp.bfloat16)
    inputs = fake_quantize(x.astype(jnp.float32), act)
    expected = np.asarray(inputs, np.float64) @ np.asarray(dequantize(base), np.float64).T
    y = np.asarray(hopper.product(x, ready, jnp.float32), np.float64)
    assert np.linalg.norm(y - expected) <= 1e-4 * np.linalg.norm(expected)
