"""From text to the statistics that quantization needs."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np

from jquant.format import tree as trees
from jquant.quantize.calibrate.batches import cut_batches as cut_batches, split_batches as split_batches
from jquant.quantize.calibrate.blocks import (
    BlockModel,
    block_prefix,
    embed,
    make_context,
    observe_inputs,
    run_block,
    shared_inputs,
)
from jquant.quantize.calibrate.gradients import (
    BlockGradients as BlockGradients,
    Wanted as Wanted,
    diagonal_fisher as diagonal_fisher,
    relative_saliency as relative_saliency,
    stream_gradients as stream_gradients,
)
from jquant.quantize.calibrate.histogram import HistogramStats as HistogramStats
from jquant.quantize.calibrate.statistics import (
    FisherStats as FisherStats,
    HessianStats as HessianStats,
    InputStats as InputStats,
    RangeStats as RangeStats,
)

Stats = InputStats | FisherStats | HistogramStats


def linear_paths(model: Any) -> list[str]:
    """The weights that quantization touches by default: matrices inside `layers`, one a linear layer."""

    def is_linear(path: str, leaf: Any) -> bool:
        return path.startswith("layers.") and path.endswith("_proj.weight") and getattr(leaf, "ndim", 2) == 2

    return list(trees.select(model, is_linear))


Statistic = Literal["hessian", "guided", "range", "fisher", "inputs"]


def calibrate(
    model: BlockModel,
    batches: Sequence[np.ndarray],
    statistic: Statistic | Sequence[Statistic],
    *,
    exact: float = 0.0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """{path: statistics} of every linear layer of the unquantized model, all in memory at once.

    batches: token arrays [B, T]. statistic: "hessian", "guided" (a Hessian with tokens weighted by the loss), "range",
    "fisher" or "inputs" (histograms for activation tables, without the `exact` percent at either end of each token);
    several at once give a tuple a layer, in their order, from one backward and one forward pass. Statistics of two
    calls can be merged. `quantize` can gather its own block by block instead, which needs less memory and lets later
    layers see the errors of earlier ones.
    """
    kinds = (statistic,) if isinstance(statistic, str) else tuple(statistic)
    if unknown := [kind for kind in kinds if kind not in get_args(Statistic)]:
        raise ValueError(f"statistic is {unknown[0]!r}; expected one of {', '.join(get_args(Statistic))}")
    if {"hessian", "guided"} <= set(kinds):
        raise ValueError("'hessian' and 'guided' are both Hessians of a layer; gather them in two calls")
    inside = paths_by_block(linear_paths(model))
    found: dict[str, dict[str, Stats]] = {path: {} for path in linear_paths(model)}
    saliency: dict[str, np.ndarray] = {}
    if {"fisher", "guided", "inputs"} & set(kinds):
        context, x = jax.eval_shape(make_context, model, batches[0]), jax.eval_shape(embed, model, batches[0])

        def wanted(index: int) -> Wanted:
            paths = tuple(inside.get(index, ()))
            groups = shared_inputs(model.layers[index], paths, x, context) if paths and "inputs" in kinds else []
            return Wanted(
                fisher=paths if "fisher" in kinds else (),
                saliency=paths if "guided" in kinds else (),
                inputs=tuple((tuple(group), float(exact)) for group in groups),
            )

        asked = [wanted(index) for index in range(len(model.layers))]
        for index, gradients in stream_gradients(model, batches, asked.__getitem__, progress=progress):
            prefix = block_prefix(index)
            for path, stat in gradients.fisher.items():
                found[prefix + path]["fisher"] = stat
            for group, _ in asked[index].inputs:
                for path in group:
                    found[prefix + path]["inputs"] = gradients.inputs[group[0]]
            saliency |= {prefix + path: relative_saliency(s) for path, s in gradients.saliency.items()}
    forward = [kind for kind in kinds if kind in ("hessian", "guided", "range")]
    text = zip([embed(model, batch) for batch in batches], batches, strict=True) if forward else ()
    stream = [(x, make_context(model, batch)) for x, batch in text]
    for index, block in enumerate(model.layers if forward else ()):
        leaves, paths, prefix = trees.leaves(block), tuple(inside.get(index, ())), block_prefix(index)
        for kind in forward:
            init = RangeStats.init if kind == "range" else HessianStats.init
            stats: dict[str, Any] = {path: init(leaves[path].shape[1]) for path in paths}
            start = 0
            for x, context in stream:
                rows = slice(start, start + x.shape[0])
                start = rows.stop
                weights = {path: saliency[prefix + path][rows] for path in paths} if kind == "guided" else None
                stats = observe_inputs(block, x, context, stats, paths=paths, saliency=weights)
            for path, stat in stats.items():
                found[prefix + path][kind] = stat
        stream = [(run_block(block, x, context), context) for x, context in stream]
        progress("forward pass", index + 1, len(model.layers))
    if isinstance(statistic, str):
        return {path: stats[statistic] for path, stats in found.items()}
    return {path: tuple(stats[kind] for kind in kinds) for path, stats in found.items()}


def paths_by_block(paths: Sequence[str]) -> dict[int, list[str]]:
    """{block index: paths inside the block} of paths that begin with `layers.<index>.`; ValueError names others."""
    inside: dict[int, list[str]] = {}
    for path in paths:
        parts = path.split(".", 2)
        if len(parts) != 3 or parts[0] != "layers" or not parts[1].isdigit():
            raise ValueError(
                f"{path} lies in no block (layers.<index>.<name>); only layers inside blocks are quantized"
            )
        inside.setdefault(int(parts[1]), []).append(parts[2])
    return inside
