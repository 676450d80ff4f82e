"""Packed layers of every kind that a Hopper GPU has a kernel for, as if there were one, and what their product is."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.format.activations import ActivationQuant
from jquant.format.weights import (
    OutlierColumns,
    QuantizedLinear,
    affine_weight,
    codebook_weight,
    dequantize,
    sparse_residual,
)
from jquant.linear import hopper, preparation, xla
from pallas_kernels.affine_matmul import choice as blocks

N, K = 130, 200  # no multiple of a tile


def affine(bits: int, size: int | None, symmetric: bool = False, columns: int = K, rows: int = N) -> Any:
    rng = np.random.default_rng(bits)
    groups = (rows, 1 if size is None else -(-columns // size))
    codes = jnp.asarray(rng.integers(0, 2**bits, (rows, columns), dtype=np.uint8))
    zeros = None if symmetric else jnp.asarray(rng.integers(0, 2**bits, groups, dtype=np.uint8))
    scales = jnp.asarray(rng.uniform(0.5, 1.5, groups), jnp.float16)
    return affine_weight(codes, scales, zeros, bits, size, "in")


def codebook(bits: int, rows: int = N) -> Any:
    rng = np.random.default_rng(bits)
    codes = jnp.asarray(rng.integers(0, 2**bits, (rows, K), dtype=np.uint8))
    return codebook_weight(codes, jnp.asarray(rng.normal(size=(rows, 2**bits)), jnp.float16), bits)


def int8_table(bits: int, act: ActivationQuant | None = None, rows: int = N) -> QuantizedLinear:
    rng = np.random.default_rng(bits)
    codes = jnp.asarray(rng.integers(0, 2**bits, (N, K), dtype=np.uint8))
    table = jnp.asarray(np.sort(rng.integers(-127, 128, (rows, 2**bits))), jnp.int8)
    scales = jnp.asarray(rng.uniform(0.5, 1.5, N), jnp.float16)
    return QuantizedLinear(codebook_weight(codes, table, bits, scales), activation=act)


def quik(bits: int, symmetric: bool) -> QuantizedLinear:
    rng = np.random.default_rng(5)
    kept = OutlierColumns(jnp.asarray([3, 64, 65, 199], jnp.int32), jnp.asarray(rng.normal(size=(N, 4)), jnp.float16))
    act = ActivationQuant(None, None, bits, symmetric=symmetric)
    return QuantizedLinear(affine(4, None, True, K - 4), kept, activation=act)


def beside(base: Any) -> QuantizedLinear:
    """Kept columns beside a base, activations as they are."""
    rng = np.random.default_rng(6)
    index = jnp.asarray([0, 17, 130, 131, K], jnp.int32)
    return QuantizedLinear(base, OutlierColumns(index, jnp.asarray(rng.normal(size=(N, 5)), jnp.float16)))


def residual(base: Any, dtype: Any = jnp.float16) -> QuantizedLinear:
    mask = jnp.asarray(np.random.default_rng(0).random((N, K)) < 0.02)
    values = jnp.asarray(np.random.default_rng(1).normal(size=(N, K)), jnp.float32)
    return QuantizedLinear(base, residual=sparse_residual(mask, values, dtype))


def scaled(base: Any) -> Any:
    """A codebook weight with a scale a row."""
    return dataclasses.replace(base, scales=jnp.asarray(np.random.default_rng(2).uniform(0.5, 2, N), jnp.float32))


def with_zero_scales(base: Any) -> Any:
    """Groups of row 1 and the first group of row 7 are all zero."""
    return dataclasses.replace(base, scales=base.scales.at[1].set(0).at[7, 0].set(0))


def in_two_levels(base: Any) -> Any:
    """The same codes with scales that are whole multiples of a step a row."""
    rng = np.random.default_rng(8)
    rows, groups = base.scales.shape
    steps = rng.integers(64, 128, (rows, 1)) * 2.0**-12
    return dataclasses.replace(base, scales=jnp.asarray(steps * rng.integers(1, 17, (rows, groups)), jnp.float16))


LAYERS = {
    "w4-g64": affine(4, 64),
    "w4-g128-sym": affine(4, 128, symmetric=True),
    "w3-g64": affine(3, 64),
    "w2-g64": affine(2, 64),
    "w8": affine(8, None),
    "w3-codebook": codebook(3),
    "w4-codebook": codebook(4),
    "w4-codebook of one row": codebook(4, 1),
    "w4-codebook-int8": int8_table(4),
    "w3-codebook-int8 of one row": int8_table(3, rows=1),
    "w3a8-codebook-shared-int8": int8_table(3, ActivationQuant(None, None, 8), 1),
    "w4a8-codebook-int8-actsym": int8_table(4, ActivationQuant(None, None, 8, symmetric=True)),
    "w4a8-g64": QuantizedLinear(affine(4, 64, symmetric=True), activation=ActivationQuant(None, None, 8)),
    "w4a8-g64-sym-twolevel": QuantizedLinear(
        in_two_levels(affine(4, 64, symmetric=True)), activation=ActivationQuant(None, None, 8)
    ),
    "w3-codebook+s2%": residual(codebook(3)),
    "w4-codebook with scales+s2%": residual(scaled(codebook(4))),
    "w4-codebook-int8+s2%": residual(int8_table(4).weight),
    "w4-g64+s2%": residual(affine(4, 64)),
    "w8+s2%": residual(affine(8, None, symmetric=True)),
    "w4-g64 with zero scales+s2%": residual(with_zero_scales(affine(4, 64))),
    "w4a4+o4": quik(4, False),
    "w4a8+o4": quik(8, True),
    "w4-g64+o5": beside(affine(4, 64)),
    "w4-codebook-int8+o5": beside(int8_table(4).weight),
}


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests take the ways of large weights: tables in fixed point, and blocks that scale weights in 16 bits."""
    monkeypatch.setattr(preparation, "SMALL", 0)
    monkeypatch.setattr(blocks, "_WIDE", [pair for pair in blocks._WIDE if pair[0].scale == "operand"])


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the device were a Hopper GPU: programs can be lowered for it, not run."""
    monkeypatch.setattr(hopper, "no_hopper", lambda: None)
    monkeypatch.setattr(preparation, "no_hopper", lambda: None)
    for module in (preparation, xla):
        monkeypatch.setattr(module, "platform", lambda: "gpu")


def product_of(x: jax.Array, w: Any) -> np.ndarray:
    """x times the decoded weight in float64, activations as they are quantized."""
    exact, layer = np.asarray(x, np.float64), w if isinstance(w, QuantizedLinear) else QuantizedLinear(w)
    if layer.activation is None:
        return exact @ np.asarray(dequantize(w), np.float64).T
    kept = np.zeros(0, int) if layer.outliers is None else np.asarray(layer.outliers.index)
    base = np.setdiff1d(np.arange(exact.shape[1]), kept)
    y = (
        _quantized(np.asarray(x, np.float32)[:, base], layer.activation)
        @ np.asarray(dequantize(layer.weight), np.float64).T
    )
    return y if layer.outliers is None else y + exact[:, kept] @ np.asarray(layer.outliers.weight, np.float64).T


def _quantized(x: np.ndarray, act: ActivationQuant) -> np.ndarray:
    """Tokens on their grid, quotients as IEEE rounds them: XLA multiplies by a reciprocal, and one code in thousands
    is another then, which with 4 bits is an error of half a percent."""
    half, (low, high) = 2 ** (act.bits - 1), (x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True))
    if act.symmetric:
        scales = np.maximum(-low, high) / np.float32(half - 1)
        return scales.astype(np.float64) * np.clip(np.round(x / scales), -half, half - 1)
    scales = (high - low) / np.float32(2 * half - 1)
    return scales.astype(np.float64) * np.round((x - low) / scales) + low.astype(np.float64)
