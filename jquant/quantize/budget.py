"""A bit budget for a whole model: which width each layer gets so that the mean stays under a target.

    predicted loss increase  =  sum_l a_l t_l(b)^2         (linearity theorem, arXiv 2411.17525)

t_l(b)^2 is the relative error of layer l's weights at b bits, measured by quantizing it once at every width; a_l is how
much the loss feels such an error. For noise spread evenly over a layer the second-order expansion of the loss gives
a_l = 1/2 mean(W^2) sum(F), F the diagonal Fisher, so one backward pass measures every slope. Codebook methods put their
error where F is small, so for them the prediction is 1/2 sum F (w - w_hat)^2 itself. The widths follow by dynamic
programming (`jquant.quantize.allocate`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.format import tree as trees
from jquant.format.spec import TWO_LEVEL_BITS, QuantSpec
from jquant.quantize.allocate import allocate
from jquant.quantize.calibrate import Wanted, paths_by_block, stream_gradients
from jquant.quantize.calibrate.blocks import block_prefix
from jquant.quantize.matrix import Recipe, check_matrix, quantize_array
from jquant.quantize.plan import Plan, stored_bits

WIDTHS = (2, 3, 4, 5, 6, 8)


def spend_bits(
    model: Any,
    plan: Plan,
    recipe: Recipe,
    batches: Sequence[np.ndarray],
    target: float,
    *,
    widths: Sequence[int] = WIDTHS,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, QuantSpec]:
    """The plan with every layer's bits chosen so that its mean bits a weight, all included, is at most `target`.

    Everything else of each layer's spec stays, so layers with two-level scales get at most 4 bits. batches: calibration
    tokens [B, T]. ValueError if the target is out of reach, with what can be reached, or if a layer is to be readable
    at several widths.
    """
    if nested := [path for path, spec in plan.items() if spec.nested_from is not None]:
        raise ValueError(
            f"{nested[0]} is to be readable at several widths; a budget chooses one: "
            "leave out --nested-from or --target-bpw"
        )
    inside = paths_by_block(list(plan))
    wanted = {index: Wanted(fisher=tuple(paths)) for index, paths in inside.items()}
    most = {path: TWO_LEVEL_BITS if spec.two_level else max(widths) for path, spec in plan.items()}
    options = {
        path: [dataclasses.replace(spec, bits=min(bits, most[path])) for bits in widths] for path, spec in plan.items()
    }
    losses: dict[str, list[float]] = {}
    for index, found in stream_gradients(model, batches, lambda i: wanted.get(i, Wanted()), progress=progress):
        weights = trees.leaves(model.layers[index])
        for path, stat in found.fisher.items():
            full = block_prefix(index) + path
            losses[full] = predicted_losses(check_matrix(weights[path], full), stat.finalize(), options[full], recipe)
        progress("bit budget", len(losses), len(plan))
    leaves, paths = trees.leaves(model), list(plan)
    cost = [[stored_bits(spec, leaves[path].shape) / leaves[path].size for spec in options[path]] for path in paths]
    chosen = allocate([losses[path] for path in paths], cost, [leaves[path].size for path in paths], target)
    return {path: options[path][int(k)] for path, k in zip(paths, chosen, strict=True)}


def predicted_losses(W: jax.Array, fisher: jax.Array, options: Sequence[QuantSpec], recipe: Recipe) -> list[float]:
    """The predicted loss increase of W [N, K] under each spec; only their order and ratios mean something."""
    slope = float(_slope(W, fisher))
    rounding = Recipe("squeezellm" if recipe.needs_fisher() else "rtn")
    losses = []
    for spec in options:
        # What is kept exactly, and how inputs are quantized, hardly changes with the width.
        bare = dataclasses.replace(spec, outliers=0, sparse=0.0, semistructured=False, shared=False, activation=None)
        _, report = quantize_array(W, bare, fisher=fisher if recipe.needs_fisher() else None, recipe=rounding)
        if recipe.needs_fisher():
            losses.append(report.objective_error * float(_weighted_energy(W, fisher)) / 2)
        else:
            losses.append(report.weight_error * slope)
    return losses


@jax.jit
def _slope(W: jax.Array, fisher: jax.Array) -> jax.Array:
    return 0.5 * jnp.mean(W * W) * jnp.sum(_usable(fisher))


@jax.jit
def _weighted_energy(W: jax.Array, fisher: jax.Array) -> jax.Array:
    return jnp.sum(_usable(fisher) * W * W)


def _usable(fisher: jax.Array) -> jax.Array:
    return jnp.where(jnp.all(jnp.isfinite(fisher)), fisher, 1.0)
