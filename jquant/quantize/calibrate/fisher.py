"""The diagonal Fisher information, streamed: one block's gradients at a time, from the last block to the first.

    F = 1/n sum_s (dL_s / dW)**2,      L_s the mean cross-entropy of calibration sequence s        (SqueezeLLM eq. 3)

A plain backward pass would hold squared gradients for the whole model. Here the forward pass keeps the stream only
before every sqrt(L)-th block (on the host); going back, a segment's block inputs are recomputed from there, and each
block is differentiated by itself, recomputing its inside. So memory holds the parameters, one block's statistics and
about 2 sqrt(L) copies of the stream x [sequences, T, D].

`diagonal_fisher` is the same quantity for any differentiable loss over any pytree, all at once.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.format import tree as trees
from jquant.quantize.calibrate.blocks import BlockModel, embed, make_context, run_block
from jquant.quantize.calibrate.statistics import FisherStats


def diagonal_fisher(loss: Callable[[Any, Any], jax.Array], params: Any, samples: Iterable[Any]) -> Any:
    """A tree of `FisherStats` like params: squared gradients of loss(params, sample), one sample at a time."""

    @functools.partial(jax.jit, donate_argnums=0)
    def add(stats: Any, params: Any, sample: Any) -> Any:
        gradient = jax.grad(loss)(params, sample)
        return jax.tree.map(lambda stat, g: stat.update(g), stats, gradient, is_leaf=_is_stats)

    stats = jax.tree.map(lambda leaf: FisherStats.init(leaf.shape), params)
    for sample in samples:
        stats = add(stats, params, sample)
    return stats


def stream_fisher(
    model: BlockModel,
    batches: Sequence[np.ndarray],
    paths_of: Callable[[int], Sequence[str]],
    *,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Iterator[tuple[int, dict[str, FisherStats]]]:
    """Yields (block index, {path inside the block: FisherStats}) from the last block to the first.

    batches: token arrays [B, T]. paths_of(i): the weights of block i to differentiate; with none, the block is only
    passed through. Blocks are read from model.layers when their turn comes and must still be unquantized then.
    """
    tokens = [jnp.asarray(batch) for batch in batches]
    contexts = [make_context(model, batch) for batch in tokens]
    depth = len(model.layers)
    stride = max(1, math.isqrt(depth))
    kept: dict[int, list[np.ndarray]] = {}
    x = [embed(model, batch) for batch in tokens]
    for index in range(depth):
        if index % stride == 0:
            kept[index] = [np.asarray(part) for part in x]
        x = [run_block(model.layers[index], part, context) for part, context in zip(x, contexts, strict=True)]
        progress("forward pass", index + 1, depth)
    gradients = [_loss_gradient(model, part, batch) for part, batch in zip(x, tokens, strict=True)]
    del x
    for start in reversed(range(0, depth, stride)):
        inputs = [[jnp.asarray(part) for part in kept.pop(start)]]
        stop = min(start + stride, depth)
        for index in range(start, stop - 1):
            block = model.layers[index]
            inputs.append([run_block(block, part, context) for part, context in zip(inputs[-1], contexts, strict=True)])
        for index in reversed(range(start, stop)):
            block, parts = model.layers[index], inputs.pop()
            weights = trees.leaves(block)
            stats = {path: FisherStats.init(weights[path].shape) for path in paths_of(index)}
            for i, (part, context) in enumerate(zip(parts, contexts, strict=True)):
                stats, gradients[i] = _differentiate_block(stats, block, part, context, gradients[i])
            yield index, stats


@jax.jit
def _loss_gradient(model: BlockModel, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """d(sum of the sequences' mean losses) / dx: sequences do not mix, so row s is the gradient of L_s."""
    return jax.grad(lambda x: jnp.sum(model.loss(x, tokens)))(x)


@functools.partial(jax.jit, donate_argnums=(0, 4))
def _differentiate_block(
    stats: dict[str, FisherStats], block: Any, x: jax.Array, context: Any, gradient: jax.Array
) -> tuple[dict[str, FisherStats], jax.Array]:
    """Adds each sequence's squared weight gradients to the statistics; returns them and the gradient at the input x."""
    weights = {path: trees.leaves(block)[path] for path in stats}

    def one(stats: dict[str, FisherStats], item: tuple[Any, ...]) -> tuple[dict[str, FisherStats], jax.Array]:
        x, context, gradient = jax.tree.map(lambda a: a[None], item)
        _, pull = jax.vjp(lambda weights, x: trees.replace(block, weights)(x, context)[0], weights, x)
        by_weight, by_input = pull(gradient)
        return {path: stats[path].update(by_weight[path]) for path in stats}, by_input[0]

    return jax.lax.scan(one, stats, (x, context, gradient))


def _is_stats(node: Any) -> bool:
    return isinstance(node, FisherStats)
