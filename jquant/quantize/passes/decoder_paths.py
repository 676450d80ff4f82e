"""The paths of a decoder that transforms know, and the checks that let them promise the same outputs.

    embed_tokens.weight [V, D]   norm.weight [D]   lm_head.weight [V, D]   and for every layer i, below layers.i:
    input_layernorm.weight -> self_attn.{q,k,v}_proj           self_attn.o_proj -> stream
    post_attention_layernorm.weight -> mlp.{gate,up}_proj      mlp.down_proj    -> stream

Linear layers have weights [N, K] over x [..., K], and biases [N] where the model has any; q_norm and k_norm concern no
transform. lm_head is missing where the embedding is the head. Any pytree with these paths will do: NNX modules, their
states, nested dictionaries. One with other leaves is refused, since what those do to the stream is unknown.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jquant.format import tree as trees
from jquant.format.rotation import Rotation, Transformed
from jquant.format.weights import is_quantized

Model = TypeVar("Model")

EMBEDDING, FINAL_NORM, HEAD = "embed_tokens.weight", "norm.weight", "lm_head.weight"
QUERY, KEY, VALUE, OUT = (f"self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
READERS = {"input_layernorm.weight": (QUERY, KEY, VALUE), "post_attention_layernorm.weight": (GATE, UP)}
WRITERS = (OUT, DOWN)
LAYERS = (QUERY, KEY, VALUE, OUT, GATE, UP, DOWN)
UNTOUCHED = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


class Survey(NamedTuple):
    """A decoder's leaves by path, checked; blocks are prefixes such as "layers.0."."""

    leaves: dict[str, jax.Array]
    blocks: list[str]
    online: dict[str, Rotation]

    @property
    def tied(self) -> bool:
        return HEAD not in self.leaves

    def readers(self) -> list[tuple[str, list[str]]]:
        """(norm, the weights that read it), their columns checked."""
        found = [
            (prefix + norm, [f"{prefix}{reader}.weight" for reader in readers])
            for prefix in self.blocks
            for norm, readers in READERS.items()
        ]
        if not self.tied:
            found.append((FINAL_NORM, [HEAD]))
        for _, paths in found:
            self.check_columns(paths)
        return found

    def check_columns(self, paths: Sequence[str]) -> None:
        """ValueError if the columns of one of the weights are not those of the stream any more."""
        for path in paths:
            if path in self.online:
                raise ValueError(f"{path} has its input rotated online, which hides its columns; do this before that")

    def heads(self, prefix: str, head_dim: int) -> tuple[int, int, int]:
        """(kv heads, query heads to each, head_dim) of a layer."""
        rows, columns = self.leaves[f"{prefix}{VALUE}.weight"].shape[0], self.leaves[f"{prefix}{OUT}.weight"].shape[1]
        if head_dim < 1 or rows % head_dim or columns % rows:
            raise ValueError(
                f"{prefix}{VALUE} makes {rows} values and {OUT} reads {columns}: not heads of size {head_dim} in equal "
                "groups; give the head_dim of the model"
            )
        return rows // head_dim, columns // rows, head_dim


def survey(model: Any) -> Survey:
    """The leaves of a model that has all the paths of the module's docstring and no others, dense and fitting."""
    found = trees.leaves(model)
    numbers = sorted({int(match[1]) for path in found if (match := re.match(r"layers\.(\d+)\.", path))})
    blocks = [f"layers.{number}." for number in numbers or [0]]
    needed = {EMBEDDING, FINAL_NORM} | {prefix + norm for prefix in blocks for norm in READERS}
    needed |= {f"{prefix}{layer}.weight" for prefix in blocks for layer in LAYERS}
    known = needed | {HEAD} | {prefix + name for prefix in blocks for name in UNTOUCHED}
    known |= {f"{prefix}{layer}.bias" for prefix in blocks for layer in LAYERS}
    if missing := sorted(needed - set(found)):
        raise ValueError(f"the model lacks the leaves {missing}; a transform needs all weights of a decoder")
    if unknown := sorted(set(found) - known):
        raise ValueError(
            f"the model has leaves {unknown}, of which no transform knows what they do to the stream; expected the "
            "paths of a jquant decoder"
        )
    check_dense(found)
    view = Survey(found, blocks, rotations(model))
    _check_shapes(view)
    return view


def rotations(model: Any) -> dict[str, Rotation]:
    """{path: rotation} of every `Transformed` weight of a tree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda node: isinstance(node, Transformed))
    return {trees.path_string(path): node.transform for path, node in flat if isinstance(node, Transformed)}


def check_dense(leaves: Mapping[str, Any]) -> None:
    """ValueError naming a leaf that is quantized."""
    for path, leaf in leaves.items():
        if is_quantized(leaf):
            raise ValueError(f"{path} is quantized already; transform the model first, then quantize it")


def _check_shapes(view: Survey) -> None:
    """Each layer reads what is written to it: (features in, features out) of all of them."""
    features = view.leaves[EMBEDDING].shape[1]
    widths: dict[str, tuple[int | None, int | None]] = {HEAD: (features, None), FINAL_NORM: (features, None)}
    for prefix in view.blocks:
        between = view.leaves[f"{prefix}{UP}.weight"].shape[0]
        widths |= {prefix + norm: (features, None) for norm in READERS}
        widths |= {f"{prefix}{name}.weight": (features, None) for names in READERS.values() for name in names}
        widths |= {f"{prefix}{OUT}.weight": (None, features), f"{prefix}{DOWN}.weight": (between, features)}
    for path, (inputs, outputs) in widths.items():
        shape = tuple(view.leaves[path].shape) if path in view.leaves else ()
        if shape and (inputs not in (None, shape[-1]) or outputs not in (None, shape[0])):
            wanted = f"{'any' if outputs is None else outputs} features out, {'any' if inputs is None else inputs} in"
            raise ValueError(f"{path} has shape {shape}; the layers around it need {wanted}; check the model's weights")


def with_leaves(model: Model, new: Mapping[str, jax.Array]) -> Model:
    """The model with these leaves; ValueError rather than one that is not finite."""
    check_finite(new)
    return trees.replace(model, new)


def check_finite(new: Mapping[str, jax.Array]) -> None:
    """ValueError naming a leaf that has values which are not finite."""
    for path, leaf in new.items():
        if not bool(jnp.all(jnp.isfinite(leaf))):
            raise ValueError(
                f"{path} would hold values that are not finite: the model has such values, or {leaf.dtype} cannot hold "
                "the transformed ones; check the model, or cast it to bfloat16 or float32 first"
            )


@jax.jit
def scaled_columns(W: jax.Array, scales: jax.Array) -> jax.Array:
    """W [..., K] times scales [K], in the type of W."""
    return (W.astype(jnp.float32) * scales.astype(jnp.float32)).astype(W.dtype)
