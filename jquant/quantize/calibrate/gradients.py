"""What only a backward pass tells, streamed: one block's gradients at a time, from the last block to the first.

Per sequence s with mean cross-entropy L_s, and per linear layer y = W x with gradient g = dL_s/dy [T, N]:

    Fisher      F += (g^T x)**2                   [N, K]   squared weight gradient                 (SqueezeLLM eq. 3)
    saliency    s_t = mean_j g_tj**2              [S, T]   weights of GuidedQuant's Hessian        (arXiv 2505.07004)
    inputs      histogram of x, weighted by (sum over the layers that read x of g W)**2            (KLLM, A9)

A plain backward pass would hold squared gradients for the whole model. Here the forward pass keeps the stream only
before every sqrt(L)-th block (on the host); going back, a segment's block inputs are recomputed from there, and each
block is differentiated by itself, recomputing its inside. So memory holds the parameters, one block's statistics and
about 2 sqrt(L) copies of the stream x [sequences, T, D].

`diagonal_fisher` is the Fisher for any differentiable loss over any pytree, all at once.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.format import tree as trees
from jquant.linear import Tap
from jquant.quantize.calibrate.blocks import BlockModel, embed, make_context, run_block
from jquant.quantize.calibrate.histogram import HistogramStats
from jquant.quantize.calibrate.statistics import FisherStats


class Wanted(NamedTuple):
    """What to gather in one block: paths inside it.

    inputs: groups of paths that share an input, each with the percent of a token's entries that its histogram leaves
    out at either end.
    """

    fisher: tuple[str, ...] = ()
    saliency: tuple[str, ...] = ()
    inputs: tuple[tuple[tuple[str, ...], float], ...] = ()

    def paths(self) -> tuple[str, ...]:
        grouped = (path for group, _ in self.inputs for path in group)
        return tuple(dict.fromkeys((*self.fisher, *self.saliency, *grouped)))


class BlockGradients(NamedTuple):
    """fisher {path: FisherStats}, saliency {path: [S, T] float32, in the order of the batches}, inputs {first path of a
    group: HistogramStats}."""

    fisher: dict[str, FisherStats]
    saliency: dict[str, np.ndarray]
    inputs: dict[str, HistogramStats]


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


def stream_gradients(
    model: BlockModel,
    batches: Sequence[np.ndarray],
    wanted_of: Callable[[int], Wanted],
    *,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Iterator[tuple[int, BlockGradients]]:
    """Yields (block index, what was wanted there) from the last block to the first.

    batches: token arrays [B, T]. A block of which nothing is wanted is only passed through. Blocks are read from
    model.layers when their turn comes and must still be unquantized then.
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
            block, parts, wanted = model.layers[index], inputs.pop(), wanted_of(index)
            stats, saliency = _empty_stats(block, wanted), []
            for i, (part, context) in enumerate(zip(parts, contexts, strict=True)):
                stats, gradients[i], salient = _differentiate_block(stats, block, part, context, gradients[i], wanted)
                saliency.append(salient)
            fisher, histograms = stats
            joined = {path: np.concatenate([np.asarray(s[path]) for s in saliency]) for path in wanted.saliency}
            progress("backward pass", depth - index, depth)
            yield index, BlockGradients(fisher, joined, histograms)


def relative_saliency(saliency: np.ndarray) -> np.ndarray:
    """Saliency in units of its mean: squared gradients are tiny, and multiplied further they would leave float32."""
    finite = np.where(np.isfinite(saliency), saliency, 0.0)
    return (finite / max(float(np.mean(finite, dtype=np.float64)), 1e-37)).astype(np.float32)


_BlockStats = tuple[dict[str, FisherStats], dict[str, HistogramStats]]


def _empty_stats(block: Any, wanted: Wanted) -> _BlockStats:
    weights = trees.leaves(block)
    fisher = {path: FisherStats.init(weights[path].shape) for path in wanted.fisher}
    return fisher, {group[0]: HistogramStats.init(exact) for group, exact in wanted.inputs}


@jax.jit
def _loss_gradient(model: BlockModel, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """d(sum of the sequences' mean losses) / dx: sequences do not mix, so row s is the gradient of L_s."""
    return jax.grad(lambda x: jnp.sum(model.loss(x, tokens)))(x)


@functools.partial(jax.jit, donate_argnums=(0, 4), static_argnames=("wanted",))
def _differentiate_block(
    stats: _BlockStats, block: Any, x: jax.Array, context: Any, gradient: jax.Array, wanted: Wanted
) -> tuple[_BlockStats, jax.Array, dict[str, jax.Array]]:
    """Adds each sequence to the statistics; returns them, the gradient at the input x, and {path: saliency [B, T]}.

    Taps add a zero to each layer's output: the gradient of that zero is g, and with x it gives everything wanted.
    """
    leaves = trees.leaves(block)
    weights = {path: leaves[path] for path in wanted.paths()}

    def one(stats: _BlockStats, item: tuple[Any, ...]) -> tuple[_BlockStats, tuple[jax.Array, dict[str, jax.Array]]]:
        x, context, gradient = jax.tree.map(lambda a: a[None], item)

        def run(shifts: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            seen: dict[str, jax.Array] = {}

            def tap(path: str) -> Tap:
                return Tap(weights[path], lambda inputs, _: seen.__setitem__(path, inputs), shifts[path])

            return trees.replace(block, {path: tap(path) for path in weights})(x, context)[0], seen

        shifts = {path: jnp.zeros((*x.shape[:-1], W.shape[0]), jnp.float32) for path, W in weights.items()}
        _, pull, seen = jax.vjp(run, shifts, x, has_aux=True)
        by_output, by_input = pull(gradient)
        g = {path: by_output[path].reshape(-1, W.shape[0]) for path, W in weights.items()}
        seen = {path: inputs.reshape(-1, inputs.shape[-1]) for path, inputs in seen.items()}
        fisher, histograms = stats
        fisher = {path: stat.update(_matmul(g[path].T, seen[path])) for path, stat in fisher.items()}
        histograms = {
            group[0]: histograms[group[0]].update(
                seen[group[0]], functools.reduce(jnp.add, (_matmul(g[path], weights[path]) for path in group))
            )
            for group, _ in wanted.inputs
        }
        saliency = {path: jnp.mean(jnp.square(g[path]), axis=-1) for path in wanted.saliency}
        return (fisher, histograms), (by_input[0], saliency)

    stats, (gradient, saliency) = jax.lax.scan(one, stats, (x, context, gradient))
    return stats, gradient, saliency


def _matmul(gradient: jax.Array, other: jax.Array) -> jax.Array:
    """float32 sums; in the type of a half-precision operand, as the model's own backward pass would."""
    precision = "highest" if other.dtype == jnp.float32 else None
    return jnp.matmul(gradient.astype(other.dtype), other, precision=precision, preferred_element_type=jnp.float32)


def _is_stats(node: Any) -> bool:
    return isinstance(node, FisherStats)
