"""The state of one quantization: what is planned, what is done, and the way in and out of the journal."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jquant.format import tree as trees
from jquant.format.spec import QuantSpec
from jquant.format.weights import dequantize, padded
from jquant.quantize.calibrate.blocks import block_prefix
from jquant.quantize.matrix import Layer, LayerReport, Recipe
from jquant.quantize.plan import Plan

Results = dict[str, Layer]  # by path inside the block


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


class Run:
    """One run of one recipe: results so far by full path."""

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        inside: Mapping[int, Sequence[str]],
        journal: Journal | None,
        progress: Callable[[Progress], None],
    ):
        self.plan, self.recipe, self.inside = plan, recipe, inside
        self.journal, self.progress = journal, progress
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
        results = {path: results[path] for path in self.paths(block)}  # the model's order, however they came
        for _, report in results.values():
            if not math.isfinite(report.weight_error):
                raise ValueError(f"{report.path} decodes to values that are not finite; is its range beyond float32's?")
        if self.journal is not None:
            self.journal.store(block, results)
        self._add(block, results)

    def stage(self, name: str) -> Callable[[str, int, int], None]:
        """A callback that reports steps within a stage."""
        return lambda stage, done, total: self.progress(
            Progress(f"{name}: {stage} {done}/{total}", len(self.results), len(self.plan))
        )

    def progress_note(self, stage: str, block: int, paths: Sequence[str]) -> None:
        """Says that the statistics of some layers of a block are being gathered."""
        names = ", ".join(path.removesuffix(".weight").rpartition(".")[2] for path in paths)
        self.progress(Progress(f"{stage}: block {block} {names}", len(self.results), len(self.plan)))

    def _add(self, block: int, results: Results) -> None:
        for path, (weight, report) in results.items():
            self.results[block_prefix(block) + path] = (weight, report)
            self.progress(Progress("quantize", len(self.results), len(self.plan), report))


def with_decoded(block: Any, results: Results) -> Any:
    """The block as it will compute once quantized, with dense weights, so that it runs as every other block does."""
    weights, decoded = trees.leaves(block), {}
    for path, (weight, _) in results.items():
        rest = None if weight.residual is None else padded(weight.residual)
        bare = dataclasses.replace(weight, residual=rest, activation=None, transform=None)
        decoded[path] = _decode(bare).astype(weights[path].dtype)
    return trees.replace(block, decoded)


@jax.jit
def _decode(weight: Any) -> jax.Array:
    return dequantize(weight).astype(jnp.float32)
