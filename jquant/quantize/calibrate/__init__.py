"""From text to the statistics that quantization needs."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from jquant.format import tree as trees
from jquant.quantize.calibrate.batches import cut_batches as cut_batches, split_batches as split_batches
from jquant.quantize.calibrate.blocks import BlockModel, block_prefix, embed, make_context, observe_inputs, run_block
from jquant.quantize.calibrate.gradients import (
    BlockGradients as BlockGradients,
    Wanted as Wanted,
    diagonal_fisher as diagonal_fisher,
    stream_gradients as stream_gradients,
)
from jquant.quantize.calibrate.histogram import HistogramStats as HistogramStats
from jquant.quantize.calibrate.statistics import (
    FisherStats as FisherStats,
    HessianStats as HessianStats,
    RangeStats as RangeStats,
    Stats as Stats,
)


def linear_paths(model: Any) -> list[str]:
    """The weights that quantization touches by default: matrices inside `layers`, one a linear layer."""

    def is_linear(path: str, leaf: Any) -> bool:
        return path.startswith("layers.") and path.endswith("_proj.weight") and getattr(leaf, "ndim", 2) == 2

    return list(trees.select(model, is_linear))


def calibrate(
    model: BlockModel,
    batches: Sequence[np.ndarray],
    statistic: Literal["hessian", "range", "fisher"],
    *,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Stats]:
    """{path: statistics} of every linear layer of the unquantized model, all in memory at once.

    batches: token arrays [B, T]. Statistics of two calls can be merged. `quantize` can gather its own block by block
    instead, which needs less memory and lets later layers see the errors of earlier ones.
    """
    if statistic not in ("hessian", "range", "fisher"):
        raise ValueError(f"statistic is {statistic!r}; expected 'hessian', 'range' or 'fisher'")
    inside = paths_by_block(linear_paths(model))
    found: dict[str, Stats] = {}
    if statistic == "fisher":
        wanted = {index: Wanted(fisher=tuple(paths)) for index, paths in inside.items()}
        for index, gradients in stream_gradients(model, batches, lambda i: wanted.get(i, Wanted()), progress=progress):
            found |= {block_prefix(index) + path: stat for path, stat in gradients.fisher.items()}
        return found
    kind = HessianStats if statistic == "hessian" else RangeStats
    contexts = [make_context(model, batch) for batch in batches]
    x = [embed(model, batch) for batch in batches]
    for index, block in enumerate(model.layers):
        leaves, paths = trees.leaves(block), tuple(inside.get(index, ()))
        stats: dict[str, Any] = {path: kind.init(leaves[path].shape[1]) for path in paths}
        for i, context in enumerate(contexts):
            stats = observe_inputs(block, x[i], context, stats, paths=paths)
            x[i] = run_block(block, x[i], context)
        found |= {block_prefix(index) + path: stat for path, stat in stats.items()}
        progress("forward pass", index + 1, len(model.layers))
    return found


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
