"""The forward pass over a model: methods that need Hessians, block by block from the first to the last.

    for each block, for each group of layers with a common input, in the order in which the block computes them:
        Hessian of that input, round, pack
    pass the text through the block as quantized so far                  (true sequential; or unquantized)

AdaDim (arXiv 2309.15531) chooses for each layer d in {in, out}:   argmin_d || f(x; W) - f(x; Q_d(W)) ||^2
with f the output of the layers that the group feeds: q, k, v are judged where o_proj ends, gate and up where down_proj
ends, o_proj and down_proj by their own outputs. Q_d rounds to nearest; siblings decided before stay quantized; ties go
to the usual direction, "in". The reference is the block before any of its layers was quantized.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.format import tree as trees
from jquant.format.spec import QuantSpec
from jquant.quantize.backward import Gathered, with_activations
from jquant.quantize.calibrate import (
    HessianStats,
    RangeStats,
    calibrate,
    linear_paths,
    paths_by_block,
    relative_saliency,
)
from jquant.quantize.calibrate.blocks import (
    block_prefix,
    embed,
    make_context,
    observe_inputs,
    output_error,
    run_block,
    shared_inputs,
)
from jquant.quantize.matrix import Recipe, both_axes, check_matrix, quantize_siblings, refine_table
from jquant.quantize.run import Results, Run, with_decoded


@dataclasses.dataclass
class Text:
    """Calibration on its way through the model: x [B, T, D] and context of every batch."""

    x: list[jax.Array]
    contexts: list[Any]

    def pairs(self) -> list[tuple[jax.Array, Any]]:
        return list(zip(self.x, self.contexts, strict=True))


def forward_pass(model: Any, run: Run, batches: list[np.ndarray], gathered: Gathered) -> None:
    """Quantizes every planned layer with the Hessian of its input."""
    ranges = {}
    if run.recipe.method == "quik":
        stats = calibrate(model, batches, "range", progress=run.stage("ranges"))
        ranges = {path: stat.finalize() for path, stat in stats.items() if isinstance(stat, RangeStats)}
    linear = paths_by_block(linear_paths(model))
    text = Text([embed(model, batch) for batch in batches], [make_context(model, batch) for batch in batches])
    for index, original in enumerate(model.layers):
        block, results = original, run.resumed(index)
        if results is None and run.paths(index):
            results = _quantize_block(run, index, block, linear[index], text, gathered, ranges)
            run.finish(index, with_activations(run, index, results, gathered.activations))
        if results is not None and run.recipe.sequential:
            block = with_decoded(block, results)
        if len(run.results) == len(run.plan):
            return
        text.x = [run_block(block, x, context) for x, context in text.pairs()]


def _quantize_block(
    run: Run,
    index: int,
    original: Any,
    linear: Sequence[str],
    text: Text,
    gathered: Gathered,
    ranges: Mapping[str, jax.Array],
) -> Results:
    """linear: the block's linear layers, planned or not."""
    prefix, block = block_prefix(index), original
    groups = shared_inputs(block, linear, text.x[0], text.contexts[0])
    results: Results = {}
    for place, siblings in enumerate(groups):
        group = [path for path in siblings if path in run.paths(index)]
        if not group:
            continue
        run.progress_note("hessian", index, group)
        hessians = _hessians(run, prefix, block, text, group, gathered)
        weights = trees.leaves(block)
        specs = {path: run.spec(index, path) for path in group}
        if run.recipe.method.startswith("adadim"):
            judged_at = siblings[0] if len(siblings) == 1 else groups[place + 1][0]
            specs = _choose_axes(original, block, text, specs, run.recipe, judged_at)
        found: Results = {}
        for members in _alike(specs, hessians):
            path = members[0]
            hessian = None if hessians is None else hessians[path]
            kernels = {prefix + p: check_matrix(weights[p], prefix + p) for p in members}
            if run.recipe.method == "lnq":
                assert hessian is not None
                start = gathered.starts.pop(prefix + path)
                found[path] = refine_table(start, kernels[prefix + path], specs[path], hessian)
                continue
            named = quantize_siblings(kernels, specs[path], run.recipe, hessian, ranges.get(prefix + path))
            found |= {p: named[prefix + p] for p in members}
        if run.recipe.sequential:
            block = with_decoded(block, found)
        results |= found
    return results


def _hessians(
    run: Run, prefix: str, block: Any, text: Text, group: Sequence[str], gathered: Gathered
) -> dict[str, jax.Array] | None:
    """The Hessian of every layer of the group: one shared array, unless each has a saliency of its own."""
    if run.recipe.method == "adadim-rtn":
        return None
    weights = trees.leaves(block)
    if not run.recipe.needs_saliency():
        shared = {group[0]: HessianStats.init(weights[group[0]].shape[1])}
        for x, context in text.pairs():
            shared = observe_inputs(block, x, context, shared, paths=(group[0],))
        hessian = shared[group[0]].finalize()
        return dict.fromkeys(group, hessian)
    stats = {path: HessianStats.init(weights[path].shape[1]) for path in group}
    saliency = {path: relative_saliency(gathered.saliency[prefix + path]) for path in group}
    start = 0
    for x, context in text.pairs():
        rows = slice(start, start + x.shape[0])
        start = rows.stop
        part = {path: jnp.asarray(s[rows]) for path, s in saliency.items()}
        stats = observe_inputs(block, x, context, stats, paths=tuple(group), saliency=part)
    return {path: stat.finalize() for path, stat in stats.items()}


def _alike(specs: Mapping[str, QuantSpec], hessians: Mapping[str, jax.Array] | None) -> list[list[str]]:
    """Paths with the same spec and the same Hessian, which are quantized as one problem."""
    alike: dict[tuple[QuantSpec, int], list[str]] = {}
    for path, spec in specs.items():
        alike.setdefault((spec, 0 if hessians is None else id(hessians[path])), []).append(path)
    return list(alike.values())


def _choose_axes(
    original: Any, block: Any, text: Text, specs: Mapping[str, QuantSpec], recipe: Recipe, judged_at: str
) -> dict[str, QuantSpec]:
    """AdaDim's choice for each layer of a group."""
    weights, chosen = trees.leaves(block), {}
    rounding = dataclasses.replace(recipe, method="rtn", guided=False)
    for path, spec in specs.items():
        tried = []
        for candidate in both_axes(spec):
            layer = quantize_siblings({path: check_matrix(weights[path], path)}, candidate, rounding)[path]
            changed = with_decoded(block, {path: layer})
            error = sum(output_error(original, changed, x, context, path=judged_at) for x, context in text.pairs())
            tried.append((float(error), candidate, changed))
        _, chosen[path], block = min(tried, key=lambda one: one[0])  # the first where equal
    return chosen
