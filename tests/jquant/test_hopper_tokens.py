"""The seam on a Hopper GPU by the number of tokens: one that becomes integers in the kernel or in pieces, and many."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.format.activations import ActivationQuant
from jquant.format.weights import QuantizedLinear, codebook_weight
from jquant.linear import choose, hopper, linear, preparation, prepare
from pallas_kernels import device
from pallas_kernels.affine_matmul import choice as blocks
from tests.jquant.hopper_layers import (
    LAYERS,
    K,
    N,
    affine,
    in_two_levels,
    nothing_is_small as nothing_is_small,
    on_hopper as on_hopper,
    product_of,
    quik,
)
from tests.pallas_kernels.triton import count_kernels, lower_for_gpu


def _actsym(base: Any, bits: int = 8) -> QuantizedLinear:
    return QuantizedLinear(base, activation=ActivationQuant(None, None, bits, symmetric=True))


def _token_layers(columns: int) -> dict[str, tuple[QuantizedLinear, bool]]:
    """Layers of so many inputs, and whether one token becomes integers for them."""
    rng = np.random.default_rng(7)
    codes = jnp.asarray(rng.integers(0, 16, (N, columns), dtype=np.uint8))
    table = jnp.asarray(np.sort(rng.integers(-127, 128, (N, 16))), jnp.int8)
    snapped = codebook_weight(codes, table, 4, jnp.asarray(rng.uniform(0.5, 1.5, N), jnp.float16))
    free = codebook_weight(codes, jnp.asarray(rng.normal(size=(N, 16)), jnp.float16), 4)
    grouped, whole = affine(4, 64, True, columns), affine(8, None, True, columns)
    return {
        "w4a8-g64-actsym": (_actsym(grouped), True),
        "w4a4-g64-actsym": (_actsym(grouped, 4), True),
        "w4a8-g64-sym-twolevel-actsym": (_actsym(in_two_levels(grouped)), True),
        "w8a8-actsym": (_actsym(whole), True),
        "w4a8-codebook-int8-actsym": (_actsym(snapped), True),
        "w4-codebook-int8": (QuantizedLinear(snapped), True),
        "w4-codebook": (QuantizedLinear(free), True),
        "w8a8": (QuantizedLinear(whole, activation=ActivationQuant(None, None, 8)), False),
        "w4-g64": (QuantizedLinear(grouped), True),
        "w4-g64-sym-twolevel": (QuantizedLinear(in_two_levels(grouped)), True),
    }


@pytest.mark.usefixtures("on_hopper")
def test_one_token_is_split_beside_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, dtype in itertools.product(("w4-codebook-int8", "w4-codebook"), (jnp.bfloat16, jnp.float16)):
        ready = prepare(LAYERS[name])
        assert "in 3 pieces of 8 bits" in choose(ready, 1, dtype=dtype).reason
        assert "pieces" not in choose(ready, 2, dtype=dtype).reason
        program = lower_for_gpu(linear, jax.ShapeDtypeStruct((1, K), dtype), ready)
        assert count_kernels(program) == program.count('name = "split_row"') == 1 and "mosaic_gpu" in program
    assert "pieces" not in choose(prepare(LAYERS["w4a8-codebook-int8-actsym"]), 1).reason
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "SMALL", 2**24)
        assert "pieces" not in choose(prepare(LAYERS["w4-codebook"]), 1).reason
        assert "pieces" in choose(prepare(LAYERS["w4-codebook-int8"]), 1).reason
    # entries of their own product leave the base's to pieces; in one product they need 16-bit operands
    assert "pieces" in choose(prepare(LAYERS["w4-codebook-int8+s2%"]), 1).reason
    monkeypatch.setattr(hopper, "ROWS_TOKENS", 0)
    ready = prepare(LAYERS["w4-codebook-int8+s2%"])
    assert "pieces" not in choose(ready, 1).reason and "added to the weights" in choose(ready, 1).reason
    program = lower_for_gpu(linear, jax.ShapeDtypeStruct((1, K), jnp.bfloat16), ready)
    assert count_kernels(program) == program.count('name = "half_rows"') == 1


@pytest.mark.usefixtures("on_hopper")
def test_many_tokens_of_16_bits_are_said_to_gain_no_time() -> None:
    for name, (layer, _) in _token_layers(208).items():
        ready = prepare(layer)
        for tokens in (1, hopper.DENSE_TOKENS, 256):
            slow = layer.activation is None and tokens > hopper.DENSE_TOKENS
            assert ("by dense weights" in choose(ready, tokens, dtype=jnp.bfloat16).reason) == slow, name


@pytest.mark.usefixtures("on_hopper")
def test_one_token_becomes_integers_in_the_kernel() -> None:
    for name, (layer, inside) in _token_layers(208).items():
        ready = prepare(layer)
        for tokens, dtype in itertools.product((1, 2), (jnp.bfloat16, jnp.float16)):
            alone = inside and tokens == 1
            assert ("made in the kernel" in choose(ready, tokens, dtype=dtype).reason) == alone, name
            if tokens == 1:
                program = lower_for_gpu(linear, jax.ShapeDtypeStruct((1, 208), dtype), ready)
                assert count_kernels(program) == (name == "w8a8") and "mosaic_gpu" in program, name
        many = jax.ShapeDtypeStruct((3, 1, 208), jnp.bfloat16)
        assert "mosaic_gpu" in lower_for_gpu(jax.vmap(linear, in_axes=(0, None)), many, ready)
    for inputs in (hopper.SPLIT_INPUTS, hopper.SPLIT_INPUTS + 16):
        split = blocks.Problem(1, 64, inputs, 4, None, False, "int8", "float32", pieces=3)
        own = hopper._own_token(split, None, None, "bfloat16")
        assert (own is not None) == (inputs <= hopper.SPLIT_INPUTS)
    # not of a length that is no multiple of 16, of float32, or with columns that are kept
    ready = prepare(_token_layers(200)["w8a8-actsym"][0])
    assert "made in the kernel" not in choose(ready, 1).reason
    assert count_kernels(lower_for_gpu(linear, jax.ShapeDtypeStruct((1, 200), jnp.bfloat16), ready)) == 1
    ready = prepare(_token_layers(208)["w8a8-actsym"][0])
    assert count_kernels(lower_for_gpu(linear, jax.ShapeDtypeStruct((1, 208), jnp.float32), ready)) == 1
    assert "made in the kernel" not in choose(prepare(quik(8, True)), 1).reason


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [208, 1024])
def test_one_token_is_that_of_the_decoded_weight(columns: int) -> None:
    if reason := device.no_hopper():
        pytest.skip(reason)
    for name, (layer, _) in _token_layers(columns).items():
        x = jnp.asarray(np.random.default_rng(1).normal(size=(1, columns)), jnp.bfloat16)
        y = jax.jit(linear, static_argnames="implementation")(x, prepare(layer), implementation="pallas")
        expected = product_of(x, layer)
        error = np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)
        assert error <= 2.5e-3, name
