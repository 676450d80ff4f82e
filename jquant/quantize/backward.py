"""The backward pass over a model: everything that needs gradients, block by block from the last to the first.

squeezellm, kllm   the Fisher of the unquantized model; each block is finished when its gradients are there
lnq                squeezellm's solutions, packed, as starts; the saliency of every token
guided Hessians    the saliency of every token
activation tables  histograms of every distinct layer input, weighted by the loss
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jquant.format import tree as trees
from jquant.format.spec import QuantSpec
from jquant.quantize.calibrate import Wanted, stream_gradients
from jquant.quantize.calibrate.blocks import block_prefix, embed, make_context, shared_inputs
from jquant.quantize.matrix import (
    InputQuantizer,
    Layer,
    activation_of,
    check_matrix,
    sparse_shares,
    table_layer,
    with_activation,
)
from jquant.quantize.passes.squeezellm import outlier_range
from jquant.quantize.run import Results, Run


@dataclasses.dataclass
class Gathered:
    """What later passes need of the gradients, by full path: saliency [S, T], starting solutions, input quantizers."""

    saliency: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    starts: dict[str, Layer] = dataclasses.field(default_factory=dict)
    activations: dict[str, InputQuantizer] = dataclasses.field(default_factory=dict)


def backward_pass(model: Any, run: Run, batches: list[np.ndarray]) -> Gathered:
    """Finishes the layers of squeezellm and kllm; gathers for the others."""
    recipe, gathered = run.recipe, Gathered()
    finishes = recipe.needs_fisher() and not recipe.needs_hessian()
    ranges = outlier_ranges(model, run)
    resumed = {i for i in range(len(model.layers)) if finishes and run.resumed(i) is not None}
    context = jax.eval_shape(make_context, model, batches[0])
    x = jax.eval_shape(embed, model, batches[0])

    def inputs(index: int) -> tuple[tuple[tuple[str, ...], float], ...]:
        specs = {path: run.spec(index, path).activation for path in run.paths(index)}
        paths = [path for path, act in specs.items() if act is not None and act.grid == "codebook"]
        groups = shared_inputs(model.layers[index], paths, x, context) if paths else []
        found = []
        for group in groups:
            # One histogram serves all layers that leave out the same share.
            for exact in dict.fromkeys(act.exact for path in group if (act := specs[path]) is not None):
                members = tuple(p for p in group if (act := specs[p]) is not None and act.exact == exact)
                found.append((members, float(exact)))
        return tuple(found)

    def wanted(index: int) -> Wanted:
        paths = () if index in resumed else tuple(run.paths(index))
        return Wanted(
            fisher=paths if recipe.needs_fisher() else (),
            saliency=paths if recipe.needs_saliency() else (),
            inputs=inputs(index) if paths else (),
        )

    wants = {index: wanted(index) for index in range(len(model.layers))}
    last = min((index for index, want in wants.items() if want.paths()), default=None)
    if last is None:
        return gathered
    for index, found in stream_gradients(model, batches, lambda i: wants[i], progress=run.stage("gradients")):
        prefix = block_prefix(index)
        gathered.saliency |= {prefix + path: array for path, array in found.saliency.items()}
        for group, _ in wants[index].inputs:
            for path in group:
                act = run.spec(index, path).activation
                gathered.activations[prefix + path] = activation_of(act, found.inputs[group[0]], prefix + path)
        if found.fisher:
            fishers = {path: stat.finalize() for path, stat in found.fisher.items()}
            results = fit_tables(model, run, index, fishers, ranges)
            if finishes:
                run.finish(index, with_activations(run, index, results, gathered.activations))
            else:
                gathered.starts |= {prefix + path: layer for path, layer in results.items()}
        if index == last:
            break
    return gathered


def fit_tables(
    model: Any, run: Run, index: int, fishers: Mapping[str, jax.Array], ranges: Mapping[QuantSpec, float]
) -> Results:
    """Codebooks of one block's layers, weighted by {path: Fisher}, unweighted where there is none."""
    weights = trees.leaves(model.layers[index])
    results: Results = {}
    for path in run.paths(index):
        spec, full = run.spec(index, path), block_prefix(index) + path
        W = check_matrix(weights[path], full)
        results[path] = table_layer(full, W, spec, run.recipe, fishers.get(path), ranges.get(spec))
    return results


def with_activations(run: Run, index: int, results: Results, tables: Mapping[str, InputQuantizer]) -> Results:
    """The block's layers with the input quantizers that their specs ask for."""
    done: Results = {}
    for path, layer in results.items():
        full = block_prefix(index) + path
        act = tables[full] if full in tables else activation_of(run.spec(index, path).activation, None, full)
        done[path] = with_activation(layer, act)
    return done


def outlier_ranges(model: Any, run: Run) -> dict[QuantSpec, float]:
    """SqueezeLLM's R for every spec of the plan that keeps outliers, over all layers that share the spec."""
    weights = trees.leaves(model)
    ranges = {}
    for spec in set(run.plan.values()):
        if spec.sparse:
            paths = [path for path, other in run.plan.items() if other == spec]
            _, share = sparse_shares(spec)
            ranges[spec] = outlier_range(lambda paths=paths: (weights[path] for path in paths), share)
    return ranges
