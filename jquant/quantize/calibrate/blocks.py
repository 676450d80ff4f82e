"""A model seen as embed -> blocks -> loss, and what the linear layers inside one block receive.

Quantizing never imports a model class. It takes any object with these members, `jquant.models.Decoder` among them:

    model.embed(tokens [B, T]) -> x          model.context(positions [B, T]) -> context
    model.layers[i](x, context) -> (x, _)    model.loss(x, tokens [B, T]) -> [B]

Blocks are pytrees, so one compiled function serves every block of equal structure. Inputs of linear layers are seen
by putting `jquant.linear.Tap`s in the place of their weights while a block is traced.
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jquant.format import tree as trees
from jquant.linear import Tap


class BlockModel(Protocol):
    """What calibration needs of a model."""

    layers: Any

    def embed(self, tokens: jax.Array) -> jax.Array: ...

    def context(self, positions: jax.Array) -> Any: ...

    def loss(self, x: jax.Array, tokens: jax.Array) -> jax.Array: ...


def block_prefix(index: int) -> str:
    """The path of block `index`, with its dot."""
    return f"layers.{index}."


def run_tapped(block: Any, paths: Sequence[str], x: jax.Array, context: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(block output, {path: input of that layer}) for the weights at `paths` inside the block. Only under a trace."""
    seen: dict[str, jax.Array] = {}
    weights = trees.leaves(block)

    def tap(path: str) -> Tap:
        return Tap(weights[path], lambda inputs, _: seen.__setitem__(path, inputs))

    y, _ = trees.replace(block, {path: tap(path) for path in paths})(x, context)
    return y, seen


def layer_output(block: Any, path: str, x: jax.Array, context: Any) -> jax.Array:
    """The output, without bias, of the linear layer at `path` inside the block, float32. Only under a trace."""
    seen: dict[str, jax.Array] = {}
    tap = Tap(trees.leaves(block)[path], lambda _, outputs: seen.__setitem__(path, outputs))
    trees.replace(block, {path: tap})(x, context)
    return seen[path].astype(jnp.float32)


def shared_inputs(block: Any, paths: Sequence[str], x: jax.Array, context: Any) -> list[list[str]]:
    """The paths grouped by the array they multiply, in the order the block computes them: [[q, k, v], [o], ...].

    Traces the block abstractly; nothing is computed.
    """
    groups: dict[int, list[str]] = {}
    kept = []

    def trace(block: Any, x: jax.Array, context: Any) -> None:
        _, seen = run_tapped(block, paths, x, context)
        kept.append(seen)  # keeps the traced arrays alive, so that their identities stay distinct
        for path, inputs in seen.items():
            groups.setdefault(id(inputs), []).append(path)

    jax.eval_shape(trace, block, x, context)
    found = {path for group in groups.values() for path in group}
    if missing := sorted(set(paths) - found):
        raise ValueError(f"the block never multiplies by {missing}; leave them out of the plan")
    return list(groups.values())


@jax.jit
def embed(model: BlockModel, tokens: jax.Array) -> jax.Array:
    """x [B, T, D] of tokens [B, T]."""
    return model.embed(tokens)


@jax.jit
def make_context(model: BlockModel, tokens: jax.Array) -> Any:
    """The context of whole sequences from position 0."""
    return model.context(jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape))


@jax.jit
def run_block(block: Any, x: jax.Array, context: Any) -> jax.Array:
    """One block's output [B, T, D]."""
    return block(x, context)[0]


@functools.partial(jax.jit, static_argnames=("paths",), donate_argnames=("stats",))
def observe_inputs(
    block: Any,
    x: jax.Array,
    context: Any,
    stats: dict[str, Any],
    *,
    paths: tuple[str, ...],
    saliency: dict[str, jax.Array] | None = None,
) -> dict[str, Any]:
    """{path: HessianStats or RangeStats} with this batch's inputs added, tokens weighted by saliency [B, T] if given.

    Only what leads to those inputs is computed: for q, k and v that is a norm.
    """
    _, seen = run_tapped(block, paths, x, context)
    if saliency is None:
        return {path: stats[path].update(seen[path]) for path in paths}
    return {path: stats[path].update(seen[path], saliency[path]) for path in paths}


@functools.partial(jax.jit, static_argnames=("path",))
def output_error(reference: Any, candidate: Any, x: jax.Array, context: Any, *, path: str) -> jax.Array:
    """Sum of squared differences of two blocks' outputs of the layer at `path`, for the same input; float32 scalar."""
    difference = layer_output(candidate, path, x, context) - layer_output(reference, path, x, context)
    return jnp.sum(jnp.square(difference))
