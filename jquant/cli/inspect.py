"""`jquant inspect`: what a model holds, layer by layer, from its headers where it is not quantized."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jquant.api import QuantizedDirectory, open_model
from jquant.cli import show
from jquant.format import checkpoint, tree as trees
from jquant.format.weights import WEIGHT_TYPES, QuantizedLinear, bits_per_weight, is_snapped, shape_of, size_bytes
from jquant.models import Decoder
from jquant.quantize.calibrate import linear_paths


def inspect_command(options: argparse.Namespace) -> None:
    """Runs the command; see `jquant inspect --help`."""
    source = open_model(options.source)
    if isinstance(source, QuantizedDirectory):
        leaves, header = checkpoint.load(source.path)
    else:
        header: Mapping[str, Any] = {}
        leaves = trees.leaves(jax.eval_shape(lambda: Decoder(source.config, dtype=source.config.dtype)))
    errors = {layer["path"]: layer for layer in (header.get("report") or {}).get("layers", [])}
    linears = set(linear_paths(leaves))
    layers = [_row(path, leaf, errors.get(path)) for path, leaf in leaves.items()]
    inside = [row for row in layers if row["path"] in linears]
    weights = sum(row["shape"][0] * row["shape"][1] for row in inside)
    data = {
        "bits_per_weight": 8 * sum(row["bytes"] for row in inside) / weights,
        "size_bytes": sum(row["bytes"] for row in layers),
        "family": source.config.family,
        "method": (header.get("report") or {}).get("method"),
        "calibration": header.get("calibration"),
        "layers": layers,
    }
    if options.plot is not None:
        plot_layers(inside, options.plot)
    if not options.json:
        headers = ["layer", "shape", "kind", "bits", "bytes", "weight error", "method's error", "note"]
        snapped = any(row["float_table_error"] is not None for row in layers)
        if snapped:
            headers.insert(-1, "before int8 tables")
        show.table(headers, [_cells(row, snapped) for row in layers])
    line = f"{data['bits_per_weight']:.3f} bits a weight in linear layers, {show.size(data['size_bytes'])} in all"
    show.result(data, options.json, [line])


def plot_layers(rows: list[dict[str, Any]], file: Path) -> None:
    """Bits a weight and relative error of every layer, as a PNG."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib; pip install 'jquant-jax[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted({row["path"].split(".", 2)[2].removesuffix(".weight") for row in rows})
    figure, axes = plt.subplots(2, 1, figsize=(10, 7), sharex=True)
    for name in names:
        own = [row for row in rows if row["path"].endswith(f".{name}.weight")]
        blocks = [int(row["path"].split(".")[1]) for row in own]
        axes[0].plot(blocks, [row["bits_per_weight"] for row in own], marker=".", label=name)
        if all(row["objective_error"] is not None for row in own):
            axes[1].plot(blocks, [row["objective_error"] for row in own], marker=".", label=name)
    axes[0].set_ylabel("bits a weight")
    axes[0].legend(fontsize="small", ncols=4)
    axes[1].set_ylabel("relative error, method's measure")
    axes[1].set_xlabel("block")
    if axes[1].lines:
        axes[1].set_yscale("log")
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def _row(path: str, leaf: Any, report: Mapping[str, Any] | None) -> dict[str, Any]:
    quantized = isinstance(leaf, WEIGHT_TYPES)
    inner = leaf.weight if isinstance(leaf, QuantizedLinear) else leaf
    kind = f"{type(inner).__name__.removesuffix('Weight').lower()} {inner.bits}-bit" if quantized else str(leaf.dtype)
    if quantized and is_snapped(inner):
        kind += ", int8 table"
    return {
        "path": path,
        "shape": list(shape_of(leaf) if quantized else leaf.shape),
        "kind": kind,
        "spec": report["spec"] if report else None,
        "bits_per_weight": bits_per_weight(leaf) if quantized else 8.0 * leaf.dtype.itemsize,
        "bytes": size_bytes(leaf),
        "weight_error": report["weight_error"] if report else None,
        "objective_error": report["objective_error"] if report else None,
        "float_table_error": report.get("float_table_error") if report else None,
        "note": report["note"] if report else None,
    }


def _cells(row: Mapping[str, Any], snapped: bool) -> tuple[str, ...]:
    def error(name: str) -> str:
        return "" if row[name] is None else f"{row[name]:.2e}"

    return (
        row["path"].removesuffix(".weight"),
        " x ".join(map(str, row["shape"])),
        row["spec"] or row["kind"],
        f"{row['bits_per_weight']:.3f}",
        str(row["bytes"]),
        error("weight_error"),
        error("objective_error"),
        *([error("float_table_error")] if snapped else []),
        row["note"] or "",
    )
