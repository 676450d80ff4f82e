"""Paths and surgery on any pytree whose leaves are dense arrays or packed weights.

A path is the dotted names from the root, `layers.0.self_attn.q_proj.weight`; Flax's own `.value` steps are left out,
so the same words name a leaf of an NNX module, of `nnx.split`'s state and of nested dictionaries.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from jquant.format.weights import is_quantized

Tree = TypeVar("Tree")


def path_string(key_path: tuple[Any, ...]) -> str:
    """The dotted form of a JAX key path."""
    names = []
    for key in key_path:
        if isinstance(key, jax.tree_util.GetAttrKey) and key.name in ("value", "raw_value"):
            continue  # inside a Flax variable
        for attribute in ("name", "key", "idx"):
            if hasattr(key, attribute):
                names.append(str(getattr(key, attribute)))
                break
    return ".".join(names)


def leaves(tree: Any) -> dict[str, Any]:
    """{path: leaf}; a packed weight is one leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)
    return {path_string(path): leaf for path, leaf in flat}


def select(tree: Any, predicate: Callable[[str, Any], bool]) -> dict[str, Any]:
    """The leaves for which predicate(path, leaf) holds."""
    return {path: leaf for path, leaf in leaves(tree).items() if predicate(path, leaf)}


def replace(tree: Tree, new: Mapping[str, Any]) -> Tree:
    """The same tree with the leaves at the given paths replaced, by anything; KeyError names paths it lacks."""
    left = set(new)

    def swap(key_path: tuple[Any, ...], leaf: Any) -> Any:
        path = path_string(key_path)
        left.discard(path)
        return new.get(path, leaf)

    swapped = jax.tree_util.tree_map_with_path(swap, tree, is_leaf=is_quantized)
    if left:
        raise KeyError(f"the tree has no leaves {sorted(left)}")
    return swapped
