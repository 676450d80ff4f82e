"""The algorithm box: a model, a plan and calibration text in; the same model with packed leaves, and a report, out.

    rtn                       for each block:                                       round, pack
    squeezellm, kllm          backward pass: for each block, from the last:         Fisher, split, k-means, pack
    gptq, adadim, quik        forward pass: for each block, from the first:         Hessian of each input, round, pack
    lnq, guided Hessians      backward pass for starts and saliency, then forward

Statistics exist for one block at a time. A finished block goes to the journal before the next begins, so a run can be
continued and gives the same bytes. Statistics that the caller gathered beforehand (`calibrate`) can be used instead:
then nothing is streamed, and every layer is judged by the unquantized model's activations.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jquant.format import tree as trees
from jquant.format.rotation import Transformed
from jquant.format.spec import QuantSpec
from jquant.format.weights import QuantizedLinear
from jquant.quantize.backward import Gathered, backward_pass, outlier_ranges
from jquant.quantize.calibrate import (
    FisherStats,
    HessianStats,
    HistogramStats,
    RangeStats,
    paths_by_block,
    split_batches,
)
from jquant.quantize.calibrate.blocks import block_prefix
from jquant.quantize.forward import forward_pass
from jquant.quantize.matrix import LayerReport, Recipe, default_method, quantize_array, with_activation
from jquant.quantize.plan import Plan, make_plan, needs_gradients
from jquant.quantize.run import Journal as Journal, Progress as Progress, Results as Results, Run


class Report(NamedTuple):
    """How a model was quantized: a line a layer, in the model's order."""

    method: str
    layers: list[LayerReport]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, "layers": [layer.to_json() for layer in self.layers]}

    def bits_per_weight(self) -> float:
        """The mean over all quantized layers."""
        weights = sum(8 * layer.size_bytes / layer.bits_per_weight for layer in self.layers)
        return sum(8 * layer.size_bytes for layer in self.layers) / weights

    def int8_tables(self) -> dict[str, Any] | None:
        """What snapping tables to int8 did to the layers' relative errors; None if no layer has such tables."""
        snapped = [(layer.float_table_error, layer) for layer in self.layers if layer.float_table_error is not None]
        if not snapped:
            return None
        before, worst = max(snapped, key=lambda pair: pair[1].objective_error - pair[0])
        return {
            "mean_error_before": sum(error for error, _ in snapped) / len(snapped),
            "mean_error": sum(layer.objective_error for _, layer in snapped) / len(snapped),
            "layer": worst.path,
            "layer_error_before": before,
            "layer_error": worst.objective_error,
        }


def quantize(
    model: Any,
    spec: QuantSpec | str | Plan,
    calibration: np.ndarray | Mapping[str, Any] | None = None,
    *,
    method: str | Recipe | None = None,
    journal: Journal | None = None,
    progress: Callable[[Progress], None] = lambda step: None,
) -> tuple[Any, Report]:
    """Returns (the model with QuantizedLinear leaves, the report); the argument is left as it was.

    spec: for every linear layer, as a QuantSpec, its spelling ("w4-g128", "w3-codebook+s0.45%") or {path: QuantSpec}.
    calibration: token sequences [S, T], from which statistics are gathered block by block; or the statistics
    themselves, {path: one or a tuple of them} from `calibrate`; None rounds to nearest (or fits unweighted codebooks).
    method: a name of `jquant.quantize.matrix.METHODS`, or a Recipe with its options; None follows from spec and
    calibration.
    """
    started = time.perf_counter()
    given = dict(calibration) if isinstance(calibration, Mapping) else None
    if isinstance(spec, str):
        spec = QuantSpec.parse(spec)
    sample = spec if isinstance(spec, QuantSpec) else next(iter(spec.values()))
    if method is None:
        stats = [stat for each in (given or {}).values() for stat in (each if isinstance(each, tuple) else (each,))]
        kinds = {type(stat) for stat in stats}
        has_hessian = HessianStats in kinds or (given is None and calibration is not None)
        method = default_method(sample, has_hessian)
    recipe = Recipe(method) if isinstance(method, str) else method
    plan = make_plan(model, spec, recipe.method) if isinstance(spec, QuantSpec) else spec
    if calibration is None and recipe.needs_hessian():
        raise ValueError(
            f"method {recipe.method} needs calibration: token sequences [S, T], or statistics from jq.calibrate"
        )
    run = Run(plan, recipe, paths_by_block(list(plan)), journal, progress)
    if given is not None or calibration is None:
        _block_by_block(model, run, _given(given or {}, plan, recipe))
    else:
        batches = split_batches(np.asarray(calibration))
        gathered = backward_pass(model, run, batches) if needs_gradients(plan, recipe) else Gathered()
        if recipe.needs_hessian():
            forward_pass(model, run, batches, gathered)
        elif not recipe.needs_fisher():
            _block_by_block(model, run, lambda path: {}, gathered)
    quantized = trees.replace(model, {path: weight for path, (weight, _) in run.results.items()})
    layers = [run.results[path][1] for path in plan]
    return _absorb_transforms(quantized), Report(recipe.method, layers, time.perf_counter() - started)


def _block_by_block(
    model: Any, run: Run, statistics: Callable[[str], Mapping[str, Any]], gathered: Gathered | None = None
) -> None:
    """Every layer by itself. statistics(path): the `quantize_array` arguments that its statistics make, if any."""
    ranges = outlier_ranges(model, run)
    tables = {} if gathered is None else gathered.activations
    for index, block in enumerate(model.layers):
        if not run.paths(index) or run.resumed(index) is not None:
            continue
        weights, results = trees.leaves(block), {}
        for path in run.paths(index):
            spec, full = run.spec(index, path), block_prefix(index) + path
            if full in tables:
                spec = dataclasses.replace(spec, activation=None)
            layer = quantize_array(
                weights[path],
                spec,
                recipe=run.recipe,
                outlier_range=ranges.get(run.spec(index, path)),
                path=full,
                **statistics(full),
            )
            if full in tables:
                quantized, report = with_activation(layer, tables[full])
                layer = quantized, dataclasses.replace(report, spec=str(run.spec(index, path)))
            results[path] = layer
        run.finish(index, results)


def _given(stats: Mapping[str, Any], plan: Plan, recipe: Recipe) -> Callable[[str], Mapping[str, Any]]:
    """Statistics gathered beforehand, as `_block_by_block` wants them; ValueError if a layer's is not there."""
    names = {HessianStats: "hessian", FisherStats: "fisher", RangeStats: "amax", HistogramStats: "inputs"}

    def of(path: str) -> dict[str, Any]:
        found = stats.get(path, ())
        each = found if isinstance(found, tuple | list) else (found,)
        return {names[type(s)]: s if isinstance(s, HistogramStats) else s.finalize() for s in each}

    needed = [HessianStats] * recipe.needs_hessian() + [FisherStats] * (recipe.needs_fisher() and bool(stats))
    for path in plan:
        for kind in needed:
            if names[kind] not in of(path):
                raise ValueError(
                    f"method {recipe.method} needs {kind.__name__} for {path}, got {sorted(of(path)) or 'nothing'}"
                )
    return of


def _absorb_transforms(model: Any) -> Any:
    """Rotations that wait before a packed weight become part of it."""

    def absorb(node: Any) -> Any:
        if isinstance(node, Transformed) and isinstance(node.value, QuantizedLinear):
            return dataclasses.replace(node.value, transform=node.transform)
        return node

    return jax.tree.map(absorb, model, is_leaf=lambda node: isinstance(node, Transformed))
