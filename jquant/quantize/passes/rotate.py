"""A decoder in rotated bases: other weights, the same outputs, and no channel much louder than the others.

    fold_norms        W diag(g) x/rms(x)                norm gains g go into the layers that read them
    rotate_residual   x' = R x                          the whole stream; no cost at run time
    rotate_values     W_o (I (x) R^T) (I (x) R) v       each head's values, between v_proj and o_proj; no cost either
    rotate_inputs     W x = (W R^T)(R x)                inputs rotated as the model runs (`format.rotation.Transformed`)

QuaRot, arXiv 2404.00456 section 4 (stream and online), SpinQuant, arXiv 2405.16406 section 3 (its R1 and R2, the two
without cost); R is a randomized Hadamard, never learned. The stream may turn because RMSNorm without a gain commutes
with an orthogonal R: rms(R x) = rms(x). The layers then read W diag(g) R^T and write R W, R b.

All functions are pure and take a concrete model (outside jit) with the paths of `decoder_paths`, nothing quantized yet.
They compute in float32 and round to the types of the leaves: "the same outputs" means up to that. Online rotation comes
last, since it hides the columns of a layer from the others.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jquant.format import tree as trees
from jquant.format.rotation import Rotation, Transformed, rotate
from jquant.format.weights import is_quantized
from jquant.quantize.passes.decoder_paths import (
    EMBEDDING,
    OUT,
    VALUE,
    WRITERS,
    Model,
    check_dense,
    check_finite,
    rotations,
    scaled_columns,
    survey,
    with_leaves,
)


def fold_norms(model: Model) -> Model:
    """Every norm's gain into the layers that read it; the gains become 1.

    The final norm of a tied model keeps its gain, because the embedding that reads it is also looked up.
    """
    view = survey(model)
    new: dict[str, jax.Array] = {}
    for norm, readers in view.readers():
        gain = view.leaves[norm]
        new |= {path: scaled_columns(view.leaves[path], gain) for path in readers}
        new[norm] = jnp.ones_like(gain)
    return with_leaves(model, new)


def rotate_residual(model: Model, seed: int = 0) -> Model:
    """The residual stream in the basis of Rotation(D, seed), norm gains folded on the way.

    ValueError for a tied model: its head would have to be E diag(g) R^T and its embedding E R^T.
    """
    view = survey(model)
    if view.tied:
        raise ValueError(
            "a model whose head is its embedding cannot be rotated: the norm's gain belongs to the head alone; "
            "give the head a weight of its own first (jquant.models.decoder.untied)"
        )
    embedding = view.leaves[EMBEDDING]
    r = Rotation(embedding.shape[1], seed)
    new = {EMBEDDING: _rotated_columns(embedding, r)}
    for norm, readers in view.readers():
        gain = view.leaves[norm]
        new |= {path: _rotated_columns(view.leaves[path], r, gain) for path in readers}
        new[norm] = jnp.ones_like(gain)
    for path in (prefix + name for prefix in view.blocks for name in WRITERS):
        new[f"{path}.weight"] = _rotated_rows(view.leaves[f"{path}.weight"], r)
        if (bias := view.leaves.get(f"{path}.bias")) is not None:
            new[f"{path}.bias"] = _rotated_columns(bias, r)
    return with_leaves(model, new)


def rotate_values(model: Model, head_dim: int, seed: int = 0) -> Model:
    """What each head mixes, in the basis of Rotation(head_dim, seed): v_proj's rows and o_proj's columns.

    Exact because attention weighs whole value vectors; query heads that share a kv head share its basis.
    """
    view, r = survey(model), Rotation(head_dim, seed)
    new: dict[str, jax.Array] = {}
    for prefix in view.blocks:
        value, out = prefix + VALUE, f"{prefix}{OUT}.weight"
        view.heads(prefix, head_dim)
        view.check_columns([out])
        new[f"{value}.weight"] = _rotated_rows(view.leaves[f"{value}.weight"], r)
        new[out] = _rotated_columns(view.leaves[out], r)
        if (bias := view.leaves.get(f"{value}.bias")) is not None:
            new[f"{value}.bias"] = _rotated_columns(bias, r)
    return with_leaves(model, new)


def rotate_inputs(model: Model, paths: Iterable[str] | Callable[[str], bool] | None = None, seed: int = 0) -> Model:
    """The chosen weights [N, K] as Transformed(W R^T, R), R = Rotation(K, seed): their inputs are rotated online.

    paths: those of the weights, or a predicate over the linear weights' paths; None means every o_proj and down_proj.
    The tree's structure changes at these places, its paths do not. Works for any pytree.
    """
    found = trees.leaves(model)
    if paths is None:
        chosen = [path for path in found if path.endswith(tuple(f"{name}.weight" for name in WRITERS))]
    elif callable(paths):
        linear = [path for path, leaf in found.items() if np.ndim(leaf) == 2 or is_quantized(leaf)]
        chosen = [path for path in linear if not path.endswith(EMBEDDING) and paths(path)]
    else:
        chosen = list(paths)
    if not chosen:
        raise ValueError(
            "no weight was chosen for online rotation; expected paths such as layers.0.mlp.down_proj.weight"
        )
    if missing := sorted(set(chosen) - set(found)):
        raise ValueError(f"the model has no leaves {missing}; expected paths such as layers.0.mlp.down_proj.weight")
    check_dense({path: found[path] for path in chosen})
    online = rotations(model)
    for path in chosen:
        if np.ndim(found[path]) != 2 or path.endswith(EMBEDDING):
            raise ValueError(f"{path} is not the weight of a linear layer, and has no input to rotate; leave it out")
        if path in online:
            raise ValueError(f"{path} has its input rotated already; leave it out")
    turns = {path: Rotation(found[path].shape[1], seed) for path in chosen}
    turned = {path: _rotated_columns(found[path], r) for path, r in turns.items()}
    check_finite(turned)
    return trees.replace(model, {path: Transformed(turned[path], r) for path, r in turns.items()})


@jax.jit
def _rotated_columns(W: jax.Array, r: Rotation, gain: jax.Array | None = None) -> jax.Array:
    """W diag(gain) (I (x) R^T): W [..., K], its last axis in K / size stretches."""
    wide = W.astype(jnp.float32)
    wide = wide if gain is None else wide * gain.astype(jnp.float32)
    return rotate(wide.reshape(-1, r.size), r).reshape(W.shape).astype(W.dtype)


@jax.jit
def _rotated_rows(W: jax.Array, r: Rotation) -> jax.Array:
    """(I (x) R) W, W [N, K]."""
    return _rotated_columns(W.T, r).T
