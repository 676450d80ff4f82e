"""Paths are the same words for every kind of tree, and surgery touches what it names and nothing else."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jquant.format import tree
from jquant.format.weights import CodebookWeight, QuantizedLinear, is_quantized


def _packed() -> QuantizedLinear:
    return QuantizedLinear(CodebookWeight(jnp.zeros((4, 1), jnp.uint32), jnp.zeros((4, 4)), None, 2, (4, 6)))


class _Layer(nnx.Module):
    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.ones((4, 6)))
        self.bias = nnx.Param(jnp.zeros(4))


class _Model(nnx.Module):
    def __init__(self) -> None:
        self.layers = nnx.List([_Layer(), _Layer()])


PATHS = [f"layers.{i}.{name}" for i in range(2) for name in ("bias", "weight")]


@pytest.mark.parametrize("kind", ["module", "state", "dict"])
def test_paths_are_the_same_words_for_every_tree(kind: str) -> None:
    model: Any = _Model()
    if kind == "state":
        model = nnx.split(model)[1]
    elif kind == "dict":
        model = {"layers": [{"weight": 1, "bias": 2}, {"weight": 3, "bias": 4}]}
    assert sorted(tree.leaves(model)) == PATHS


def test_replaced_leaf_is_one_leaf_and_the_rest_is_untouched() -> None:
    model = _Model()
    packed = tree.replace(model, {"layers.1.weight": _packed()})
    assert isinstance(packed, _Model)
    leaves = tree.leaves(packed)
    assert sorted(leaves) == PATHS and is_quantized(leaves["layers.1.weight"])
    assert leaves["layers.0.weight"] is tree.leaves(model)["layers.0.weight"]
    assert not tree.select(model, lambda _, leaf: is_quantized(leaf)), "the given tree is left as it was"
    again = tree.replace(packed, {"layers.1.weight": jnp.ones((4, 6))})
    assert jax.tree.structure(again) == jax.tree.structure(model)


def test_select_sees_path_and_leaf() -> None:
    found = tree.select(_Model(), lambda path, leaf: path.startswith("layers.0") and leaf.ndim == 2)
    assert list(found) == ["layers.0.weight"]


def test_unknown_path_is_an_error() -> None:
    with pytest.raises(KeyError, match="layers.7.weight"):
        tree.replace(_Model(), {"layers.7.weight": jnp.ones(1), "layers.0.weight": jnp.ones(1)})
