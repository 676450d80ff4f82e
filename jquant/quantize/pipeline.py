"""The algorithm box: a model, a plan and calibration text in; the same model with packed leaves, and a report, out.

    rtn          for each block:                                               round, pack
    gptq         for each block, from the first:
                     for each group of layers with a common input, in order:   Hessian of that input, round, pack
                     pass the text through the block as quantized so far       (true sequential)
    squeezellm   one outlier range R for the whole model
                 for each block, from the last:                                Fisher, split, k-means, pack

Statistics exist for one block at a time. A finished block goes to the journal before the next begins, so a run can be
continued and gives the same bytes. Statistics that the caller gathered beforehand (`calibrate`) can be used instead:
then nothing is streamed, and every layer is judged by the unquantized model's activations.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jquant.format import tree as trees
from jquant.format.spec import QuantSpec
from jquant.format.weights import QuantizedLinear, dequantize
from jquant.quantize.calibrate import FisherStats, HessianStats, Stats, paths_by_block, split_batches, stream_fisher
from jquant.quantize.calibrate.blocks import block_prefix, embed, make_context, observe_block, run_block, shared_inputs
from jquant.quantize.matrix import (
    STATISTIC,
    LayerReport,
    default_method,
    quantize_array,
    quantize_siblings,
    sparse_shares,
)
from jquant.quantize.passes.squeezellm import outlier_range
from jquant.quantize.plan import Plan, make_plan

Results = dict[str, tuple[QuantizedLinear, LayerReport]]  # by path inside the block


class Progress(NamedTuple):
    """One step of the work. `report` comes with a finished layer; `done` of `total` counts layers."""

    stage: str
    done: int
    total: int
    report: LayerReport | None = None


class Journal(Protocol):
    """Where finished blocks are kept. `jquant.quantize.journal.DirectoryJournal` is one on disk."""

    def load(self, block: int) -> Results | None: ...

    def store(self, block: int, results: Results) -> None: ...


class Report(NamedTuple):
    """How a model was quantized: a line a layer, in the model's order."""

    method: str
    layers: list[LayerReport]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, "layers": [layer.to_json() for layer in self.layers]}


def quantize(
    model: Any,
    spec: QuantSpec | str | Plan,
    calibration: np.ndarray | Mapping[str, Stats] | None = None,
    *,
    method: str | None = None,
    journal: Journal | None = None,
    progress: Callable[[Progress], None] = lambda step: None,
) -> tuple[Any, Report]:
    """Returns (the model with QuantizedLinear leaves, the report); the argument is left as it was.

    spec: for every linear layer, as a QuantSpec, its spelling ("w4-g128", "w3-codebook+s0.45%") or {path: QuantSpec}.
    calibration: token sequences [S, T], from which statistics are gathered block by block; or the statistics
    themselves, from `calibrate`; None rounds to nearest (or fits codebooks without weights).
    method: "rtn", "gptq" or "squeezellm"; None follows from spec and calibration.
    """
    started = time.perf_counter()
    given = dict(calibration) if isinstance(calibration, Mapping) else None
    if isinstance(spec, str):
        spec = QuantSpec.parse(spec)
    sample = spec if isinstance(spec, QuantSpec) else next(iter(spec.values()))
    if method is None:
        kinds = {type(stat) for stat in given.values()} if given else set()
        has_hessian = HessianStats in kinds or (given is None and calibration is not None)
        method = default_method(sample, "hessian" if has_hessian else None)
    plan = make_plan(model, spec, method) if isinstance(spec, QuantSpec) else spec
    needed = STATISTIC[method]
    if needed and calibration is None and not (method == "squeezellm"):
        raise ValueError(f"method {method} needs calibration: token sequences [S, T], or statistics from jq.calibrate")
    run = _Run(plan, paths_by_block(list(plan)), journal, progress)
    if given is not None or calibration is None or needed is None:
        ranges = _outlier_ranges(model, run) if method == "squeezellm" else {}
        statistic = _given(given, plan, method) if given is not None and needed else lambda path: {}
        _block_by_block(model, run, ranges, statistic)
    elif needed == "hessian":
        _true_sequential(model, run, split_batches(np.asarray(calibration)))
    else:
        _last_to_first(model, run, split_batches(np.asarray(calibration)))
    quantized = trees.replace(model, {path: weight for path, (weight, _) in run.results.items()})
    layers = [run.results[path][1] for path in plan]
    return quantized, Report(method, layers, time.perf_counter() - started)


class _Run:
    """The state of one run: results so far, and the way in and out of the journal."""

    def __init__(
        self,
        plan: Plan,
        inside: Mapping[int, Sequence[str]],
        journal: Journal | None,
        progress: Callable[[Progress], None],
    ):
        self.plan, self.inside, self.journal, self.progress = plan, inside, journal, progress
        self.results: Results = {}

    def paths(self, block: int) -> Sequence[str]:
        return self.inside.get(block, ())

    def spec(self, block: int, path: str) -> QuantSpec:
        return self.plan[block_prefix(block) + path]

    def resumed(self, block: int) -> Results | None:
        """The block's results if the journal has them; they count as done."""
        found = self.journal.load(block) if self.journal is not None and self.paths(block) else None
        if found is not None:
            self._add(block, found)
        return found

    def finish(self, block: int, results: Results) -> None:
        """Takes in a block's results; ValueError rather than ever keep a weight that is not finite."""
        for _, report in results.values():
            if not math.isfinite(report.weight_error):
                raise ValueError(f"{report.path} decodes to values that are not finite; is its range beyond float32's?")
        if self.journal is not None:
            self.journal.store(block, results)
        self._add(block, results)

    def stage(self, name: str) -> Callable[[str, int, int], None]:
        return lambda stage, done, total: self.progress(
            Progress(f"{name}: {stage} {done}/{total}", len(self.results), len(self.plan))
        )

    def _add(self, block: int, results: Results) -> None:
        for path, (weight, report) in results.items():
            self.results[block_prefix(block) + path] = (weight, report)
            self.progress(Progress("quantize", len(self.results), len(self.plan), report))


def _block_by_block(
    model: Any, run: _Run, ranges: Mapping[QuantSpec, float], statistic: Callable[[str], Mapping[str, jax.Array]]
) -> None:
    """Every layer by itself. statistic(path): the `quantize_array` arguments that its statistic makes, if any."""
    for index, block in enumerate(model.layers):
        if not run.paths(index) or run.resumed(index) is not None:
            continue
        weights = trees.leaves(block)
        results = {}
        for path in run.paths(index):
            spec, full = run.spec(index, path), block_prefix(index) + path
            results[path] = quantize_array(
                weights[path], spec, outlier_range=ranges.get(spec), path=full, **statistic(full)
            )
        run.finish(index, results)


def _given(stats: Mapping[str, Stats], plan: Plan, method: str) -> Callable[[str], Mapping[str, jax.Array]]:
    """Statistics gathered beforehand, as `_block_by_block` wants them; ValueError if a layer's is not there."""
    name = STATISTIC[method]
    wanted = HessianStats if name == "hessian" else FisherStats
    for path in plan:
        if not isinstance(stats.get(path), wanted):
            kind = type(stats.get(path)).__name__
            raise ValueError(f"method {method} needs {wanted.__name__} for {path}, got {kind}")
    return lambda path: {str(name): stats[path].finalize()}


def _true_sequential(model: Any, run: _Run, batches: list[np.ndarray]) -> None:
    """GPTQ: every layer sees what the quantized layers before it produce."""
    contexts = [make_context(model, batch) for batch in batches]
    x = [embed(model, batch) for batch in batches]
    for index, block in enumerate(model.layers):
        results = run.resumed(index)
        if results is None:
            results, block = _sequential_block(run, index, block, x, contexts)
            run.finish(index, results)
        else:
            block = _with_decoded(block, results)
        if len(run.results) == len(run.plan):
            return
        x = [run_block(block, part, context) for part, context in zip(x, contexts, strict=True)]


def _sequential_block(
    run: _Run, index: int, block: Any, x: list[jax.Array], contexts: list[Any]
) -> tuple[Results, Any]:
    """The block's results, and the block with decoded weights in their places."""
    results: Results = {}
    groups = shared_inputs(block, run.paths(index), x[0], contexts[0]) if run.paths(index) else []
    for group in groups:
        weights = trees.leaves(block)
        stats = {group[0]: HessianStats.init(weights[group[0]].shape[1])}
        for part, context in zip(x, contexts, strict=True):
            _, stats = observe_block(block, part, context, stats, paths=(group[0],))
        hessian = stats[group[0]].finalize()
        by_spec: dict[QuantSpec, list[str]] = {}
        for path in group:
            by_spec.setdefault(run.spec(index, path), []).append(path)
        found: Results = {}
        for spec, paths in by_spec.items():
            named = quantize_siblings({block_prefix(index) + path: weights[path] for path in paths}, spec, hessian)
            found |= {path: named[block_prefix(index) + path] for path in paths}
        block = _with_decoded(block, found)
        results |= found
    return results, block


def _with_decoded(block: Any, results: Results) -> Any:
    """The block as it will compute once quantized, with dense weights, so that it runs as every other block does."""
    weights = trees.leaves(block)
    return trees.replace(
        block, {path: _decode(weight).astype(weights[path].dtype) for path, (weight, _) in results.items()}
    )


_decode = jax.jit(dequantize)


def _last_to_first(model: Any, run: _Run, batches: list[np.ndarray]) -> None:
    """SqueezeLLM: the Fisher of the unquantized model, block by block as the backward pass reaches them."""
    ranges = _outlier_ranges(model, run)
    resumed = {index for index in range(len(model.layers)) if run.resumed(index) is not None}

    def wanted(index: int) -> Sequence[str]:
        return () if index in resumed else run.paths(index)

    if all(not wanted(index) for index in range(len(model.layers))):
        return
    last = min(index for index in range(len(model.layers)) if wanted(index))
    for index, stats in stream_fisher(model, batches, wanted, progress=run.stage("fisher")):
        if stats:
            weights = trees.leaves(model.layers[index])
            results = {}
            for path, stat in stats.items():
                spec, full = run.spec(index, path), block_prefix(index) + path
                results[path] = quantize_array(
                    weights[path], spec, fisher=stat.finalize(), outlier_range=ranges[spec], path=full
                )
            run.finish(index, results)
        if index == last:
            return


def _outlier_ranges(model: Any, run: _Run) -> dict[QuantSpec, float]:
    """SqueezeLLM's R for every spec of the plan, over all layers that share the spec."""
    weights = trees.leaves(model)
    ranges = {}
    for spec in set(run.plan.values()):
        paths = [path for path, other in run.plan.items() if other == spec]
        _, share = sparse_shares(spec)
        ranges[spec] = outlier_range(lambda paths=paths: (jnp.asarray(weights[path]) for path in paths), share)
    return ranges
