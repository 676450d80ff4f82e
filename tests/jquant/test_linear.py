"""The seam: every packed weight, whatever the tokens, is the product with `dequantize` of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.format.activations import ActivationQuant, quantize_tokens
from jquant.format.weights import (
    CodebookWeight,
    OutlierColumns,
    QuantizedLinear,
    affine_weight,
    codebook_weight,
    dequantize,
    sparse_residual,
    unpack,
)
from jquant.linear import STREAMING_TOKENS, Tap, choose, explain, linear, prepare
from pallas_kernels.device import platform

ON_CPU = platform() == "cpu"
N, K = 24, 45


def _affine(bits: int, size: int, axis: Any, symmetric: bool = False, columns: int = K) -> Any:
    rng = np.random.default_rng(bits)
    groups = (N, -(-columns // size)) if axis == "in" else (-(-N // size), columns)
    codes = jnp.asarray(rng.integers(0, 2**bits, (N, columns), dtype=np.uint8))
    zeros = None if symmetric else jnp.asarray(rng.integers(0, 2**bits, groups, dtype=np.uint8))
    return affine_weight(codes, jnp.asarray(rng.normal(size=groups), jnp.float16), zeros, bits, size, axis)


def _codebook(bits: int, columns: int = K, rows: int = N) -> Any:
    rng = np.random.default_rng(bits)
    codes = jnp.asarray(rng.integers(0, 2**bits, (rows, columns), dtype=np.uint8))
    return codebook_weight(codes, jnp.asarray(rng.normal(size=(rows, 2**bits)), jnp.bfloat16), bits)


def _int8_table(bits: int, rows: int = N, activation: ActivationQuant | None = None) -> QuantizedLinear:
    rng = np.random.default_rng(bits)
    codes = jnp.asarray(rng.integers(0, 2**bits, (N, K), dtype=np.uint8))
    table = jnp.asarray(np.sort(rng.integers(-127, 128, (rows, 2**bits))), jnp.int8)
    scales = jnp.asarray(rng.uniform(0.01, 0.02, N), jnp.float16)
    return QuantizedLinear(codebook_weight(codes, table, bits, scales), activation=activation)


def _everything() -> QuantizedLinear:
    """Kept columns, residual entries and a bias beside a table."""
    rng = np.random.default_rng(0)
    index = jnp.asarray([0, 7, 8, K - 1], jnp.int32)
    mask = jnp.asarray(rng.random((N, K)) < 0.05)
    return QuantizedLinear(
        _codebook(3, K - 4),
        OutlierColumns(index, jnp.asarray(rng.normal(size=(N, 4)), jnp.float16)),
        sparse_residual(mask, jnp.asarray(rng.normal(size=(N, K)), jnp.float32)),
        jnp.asarray(rng.normal(size=N), jnp.float32),
    )


WEIGHTS = {
    "w2-g8": _affine(2, 8, "in"),
    "w4-sym": _affine(4, K, "in", symmetric=True),
    "w4-g7-out": _affine(4, 7, "out"),
    "w8-g12": _affine(8, 12, "in"),
    "w5-codebook": _codebook(5),
    "w4-codebook-int8": _int8_table(4),
    "w3-codebook with everything": _everything(),
}
linear_jit = jax.jit(linear)


def _x(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(*shape, K)).astype(np.float32)


def _expected(x: np.ndarray, w: Any) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, and the sum of the sizes of its terms, to which float32 errors are proportional."""
    dense = np.asarray(dequantize(w), np.float64)
    bias = 0.0 if getattr(w, "bias", None) is None else np.asarray(w.bias, np.float64)
    return x @ dense.T + bias, np.abs(x) @ np.abs(dense).T + np.abs(bias)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("tokens", [3, 20])
def test_packed_product_is_the_dense_product(name: str, tokens: int) -> None:
    w, x = WEIGHTS[name], _x(tokens)
    expected, size = _expected(x, w)
    y = linear_jit(jnp.asarray(x), w)
    assert y.dtype == jnp.float32
    # forty-five float32 terms in any order: a few units in the last place of the sum of sizes
    assert np.all(np.abs(y - expected) <= 2e-6 * size)


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), ()])
def test_leading_axes_are_kept(shape: tuple[int, ...]) -> None:
    w, x = WEIGHTS["w3-codebook with everything"], _x(*shape)
    y = linear_jit(jnp.asarray(x), w)
    expected, size = _expected(x, w)
    assert y.shape == (*shape, N)
    assert np.all(np.abs(y - expected) <= 2e-6 * size)


@pytest.mark.parametrize("tokens", [2, 20])
def test_bfloat16_tokens_are_summed_in_float32(tokens: int) -> None:
    w = WEIGHTS["w3-codebook with everything"]
    x = jnp.asarray(_x(tokens), jnp.bfloat16)
    expected, size = _expected(np.asarray(x, np.float64), w)
    y = linear_jit(x, w)
    assert y.dtype == jnp.bfloat16
    # rounded once, to 8 bits; off the CPU the decoded weights are rounded to 8 bits too
    slack = 2e-6 if ON_CPU else 2**-8
    assert np.all(np.abs(np.asarray(y, np.float64) - expected) <= 2**-8 * np.abs(expected) + slack * size)


def test_bfloat16_tokens_meet_kept_columns_and_integer_codes() -> None:
    rng = np.random.default_rng(0)
    kept = OutlierColumns(jnp.asarray([0, 7, K - 1], jnp.int32), jnp.asarray(rng.normal(size=(N, 3)), jnp.float16))
    base = _affine(4, K - 3, "in", symmetric=True, columns=K - 3)
    w = QuantizedLinear(base, kept, activation=ActivationQuant(None, None, 8, True))
    for tokens in (1, 20):
        x = jnp.asarray(_x(tokens), jnp.bfloat16)
        expected, size = _expected(np.asarray(x, np.float64), w)
        y = np.asarray(linear_jit(x, w), np.float64)
        # half a step of 127 to an input, beside bfloat16's 8 bits
        assert np.all(np.abs(y - expected) <= 2**-8 * np.abs(expected) + 0.02 * size)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "rows"), [(4, N), (3, 1)])
def test_int8_tables_multiply_integer_activations_in_int32(bits: int, rows: int, symmetric: bool) -> None:
    w = _int8_table(bits, rows, ActivationQuant(None, None, 8, symmetric))
    base, act = w.weight, w.activation
    assert isinstance(base, CodebookWeight) and base.scales is not None and act is not None
    assert choose(w, 3).implementation == "xla integer"
    x = jnp.asarray(_x(3))
    tokens = quantize_tokens(x, act)
    integers = np.take_along_axis(
        np.broadcast_to(np.asarray(base.codebook, np.int64), (N, 2**bits)), np.asarray(unpack(base)), axis=1
    )
    scales = np.asarray(base.scales, np.float64)
    expected = (np.asarray(tokens.codes, np.int64) @ integers.T) * scales * np.asarray(tokens.scales, np.float64)
    if tokens.offsets is not None:
        expected += np.asarray(tokens.offsets, np.float64) * (integers.sum(axis=1) * scales)
    for ready in (w, prepare(w)):
        # the sum of integers is exact; it meets two scales, an offset and a sum in float32
        np.testing.assert_allclose(linear_jit(x, ready), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    floats = dataclasses.replace(w, weight=_codebook(bits))
    assert "not snapped to int8" in choose(floats, 3).reason


def test_dense_weight_and_bias_argument() -> None:
    w, bias, x = _x(N), np.arange(N, dtype=np.float32), _x(3)
    y = linear_jit(jnp.asarray(x), jnp.asarray(w), jnp.asarray(bias))
    np.testing.assert_allclose(y, x.astype(np.float64) @ w.T + bias, rtol=1e-5, atol=1e-5)


def test_all_columns_kept_is_the_dense_product() -> None:
    dense = _x(N)
    kept = OutlierColumns(jnp.arange(K, dtype=jnp.int32), jnp.asarray(dense))
    w = QuantizedLinear(_codebook(2, 0), kept)
    for tokens in (2, 20):
        x = _x(tokens)
        np.testing.assert_allclose(linear(jnp.asarray(x), w), x @ dense.T, rtol=1e-4, atol=1e-4)


def test_prepared_model_computes_the_same() -> None:
    model = {name: WEIGHTS[name] for name in ("w4-g7-out", "w3-codebook with everything")}
    prepared = prepare(model)
    if ON_CPU:
        assert prepared["w4-g7-out"].layout == "stream_t"
    assert jax.tree.structure(prepare(prepared)) == jax.tree.structure(prepared), "a second time changes nothing"
    for name, w in model.items():
        x = jnp.asarray(_x(3))
        ours, theirs = linear_jit(x, prepared[name]), linear_jit(x, w)
        # a GPU adds sparse entries in no fixed order
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=0 if ON_CPU else 1e-5 * float(jnp.max(jnp.abs(theirs))))


def test_vmap_over_tokens_is_the_batched_product() -> None:
    w, x = WEIGHTS["w3-codebook with everything"], jnp.asarray(_x(4, 2))
    np.testing.assert_allclose(jax.vmap(linear, (0, None))(x, w), linear_jit(x, w), rtol=1e-5, atol=1e-5)


def test_vmap_over_weights_is_a_loop_over_them() -> None:
    pair = [WEIGHTS["w2-g8"], dataclasses.replace(WEIGHTS["w2-g8"], scales=-WEIGHTS["w2-g8"].scales)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *pair)
    y = jax.vmap(linear, (None, 0))(jnp.asarray(_x(3)), stacked)
    for got, w in zip(y, pair, strict=True):
        np.testing.assert_allclose(got, linear_jit(jnp.asarray(_x(3)), w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 20])
def test_gradient_of_the_tokens_is_the_transposed_product(tokens: int) -> None:
    w, x = WEIGHTS["w3-codebook with everything"], jnp.asarray(_x(tokens))
    weigh = jnp.asarray(np.random.default_rng(2).normal(size=(tokens, N)).astype(np.float32))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(linear(x, w) * weigh)))(x)
    expected = np.asarray(weigh, np.float64) @ np.asarray(dequantize(w), np.float64)
    # sums of twenty-four float32 terms of order one
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not ON_CPU, reason="the streamed path is the CPU's")
@pytest.mark.parametrize("bits", [3, 5])
def test_few_tokens_need_no_memory_of_the_weights_size(bits: int) -> None:
    w = prepare({"w": _codebook(bits, 1024, 512)})["w"]
    compiled = jax.jit(linear).lower(jnp.zeros((1, 1024)), w).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    # the packed words themselves are not copied either, in any layout
    assert analysis.temp_size_in_bytes < w.codes.size * 4 / 2


def test_tap_shows_the_input_and_changes_nothing() -> None:
    seen: list[jax.Array] = []
    x, w = jnp.asarray(_x(3)), jnp.asarray(_x(N))
    np.testing.assert_array_equal(linear(x, Tap(w, lambda inputs, _: seen.append(inputs))), linear(x, w))
    assert seen[0] is x


def test_choice_follows_tokens_and_demands() -> None:
    w = WEIGHTS["w2-g8"]
    if ON_CPU:
        assert choose(w, STREAMING_TOKENS).implementation == "xla streaming"
        assert choose(w, STREAMING_TOKENS + 1).implementation == "xla decode+dot"
        assert choose(w, 1, "xla").implementation == "xla streaming"
    assert choose(jnp.ones((N, K)), 1).reason == "not quantized"


def test_demanded_kernel_that_cannot_serve_says_why() -> None:
    x = jnp.asarray(_x(2))
    for w, reason in (
        (WEIGHTS["w2-g8"], "cannot serve this layer: .*; use None or 'xla'"),
        (jnp.ones((N, K)), "dense"),
    ):
        with pytest.raises(ValueError, match=reason):
            linear(x, w, implementation="pallas")
    with pytest.raises(ValueError, match="implementation is 'fast'; expected None, 'xla' or 'pallas'"):
        linear(x, w, implementation="fast")  # pyright: ignore[reportArgumentType]


def test_wrong_width_is_named() -> None:
    with pytest.raises(ValueError, match=r"x has 7 features, the weight \[N, K\] = \[24, 45\] takes 45"):
        linear(jnp.ones((2, 7)), WEIGHTS["w3-codebook with everything"])


def test_explain_has_a_row_a_packed_layer() -> None:
    model = {"layers": [{"weight": WEIGHTS["w2-g8"]}, {"weight": WEIGHTS["w5-codebook"]}], "norm": jnp.ones(K)}
    head, *rows = explain(model, 1).splitlines()
    assert head.split() == ["path", "bits/weight", "bytes", "implementation", "reason"]
    assert [row.split()[0] for row in rows] == ["layers.0.weight", "layers.1.weight"]
    assert all("xla" in row for row in rows)
