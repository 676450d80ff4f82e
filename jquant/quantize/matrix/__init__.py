"""One matrix: W [N, K], statistics and a spec in; a packed weight and a report out.

    method       statistics               grid        what is minimised
    rtn          none                     affine      each weight's own rounding error
    gptq         Hessian [K, K]           affine      trace((W - Q) H (W - Q)^T)
    adadim       Hessian [K, K]           affine      the same; groups along inputs or outputs, whichever is better
    adadim-rtn   Hessian [K, K]           affine      the choice of adadim, rounded to nearest
    quik         Hessian, range [K]       affine      as gptq, the inputs of largest range kept as they are
    squeezellm   Fisher [N, K]            codebook    sum f (w - q)^2 outside the entries kept exactly
    kllm         Fisher [N, K]            codebook    the same; with `shared` one table for the matrix, a scale a row
    lnq          Fisher, Hessian          codebook    squeezellm's solution, refined for (w - q)^T H (w - q)

A spec with -int8 has the tables of the last three snapped to int8, after all else. With -twolevel the scales that rtn
and gptq round to are whole multiples of one step a row.
The passes work on plain arrays; packing happens in this package and nowhere else.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jquant.format.spec import QuantSpec
from jquant.format.weights import bits_per_weight, size_bytes
from jquant.quantize.calibrate.histogram import HistogramStats
from jquant.quantize.matrix.affine import Matrices, gptq_layers, quik_layers, rounded_layers
from jquant.quantize.matrix.report import Layer as Layer, LayerReport as LayerReport
from jquant.quantize.matrix.tables import (
    InputQuantizer as InputQuantizer,
    activation_of as activation_of,
    kllm_layer,
    refine_table as refine_table,
    snapped_layer,
    sparse_shares as sparse_shares,
    squeezellm_layer,
)

METHODS = ("rtn", "gptq", "adadim", "adadim-rtn", "quik", "squeezellm", "kllm", "lnq")
TABLES = ("squeezellm", "kllm", "lnq")  # methods that fit codebooks


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to quantize, beside what each layer's spec says.

    guided: Hessians weigh each token by the loss's squared gradient at the layer's output (GuidedQuant); lnq always is.
    sequential: Hessians are of what the layers quantized so far produce, else of the unquantized model's activations.
    clip_search: rtn, gptq, adadim: ranges that minimise the 2.4th power of the error (quik always does).
    exact: tables by dynamic programming over every entry.
    row_scale: kllm with one table for the matrix: "rms" as published, "absmax", or the "best" of both a matrix.
    zero_outliers: quik: layers whose inputs never exceed this keep no columns.
    act_order: quik: columns by falling diag H, as gptq has them, instead of by rising activation range.
    """

    method: str
    guided: bool = False
    sequential: bool = True
    clip_search: bool = False
    exact: bool = False
    row_scale: Literal["rms", "absmax", "best"] = "best"
    zero_outliers: float = 0.0
    act_order: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; expected one of {', '.join(METHODS)}")
        if self.guided and not self.needs_hessian():
            raise ValueError(f"method {self.method} has no Hessian to guide; use gptq, adadim, quik or lnq")
        if self.zero_outliers and self.method != "quik":
            raise ValueError(f"method {self.method} keeps no columns; the zero-outlier rule goes with quik")
        if self.act_order and self.method != "quik":
            raise ValueError(f"act_order is a choice of quik; method {self.method} has its own order of columns")

    def needs_hessian(self) -> bool:
        return self.method in ("gptq", "adadim", "adadim-rtn", "quik", "lnq")

    def needs_fisher(self) -> bool:
        return self.method in TABLES

    def needs_saliency(self) -> bool:
        return self.guided or self.method == "lnq"


def check_spec(spec: QuantSpec, method: str) -> None:
    """ValueError for a combination that makes no sense, saying what the method takes."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    if method in TABLES and spec.grid != "codebook":
        raise ValueError(f"method {method} fits codebooks; spec {spec} has none: write w{spec.bits}-codebook")
    if method not in TABLES and spec.grid == "codebook":
        raise ValueError(
            f"method {method} rounds to affine grids; spec {spec} asks for a codebook: use {', '.join(TABLES)}"
        )
    if spec.shared and method != "kllm":
        raise ValueError(f"method {method} fits a table a row; -shared goes with kllm")
    if spec.nested_from is not None and method != "squeezellm":
        raise ValueError(f"method {method} fits one width; -nested{spec.nested_from} goes with squeezellm")
    if spec.sparse and (method not in TABLES or spec.shared):
        raise ValueError(f"method {method} keeps no sparse entries; leave out +s{spec.sparse:g}% or use squeezellm")
    if method != "quik":
        if spec.outliers:
            raise ValueError(f"method {method} keeps no outlier columns; leave out +o{spec.outliers}, or use quik")
        if spec.semistructured:
            raise ValueError(f"method {method} makes no 2:4 pattern; leave out -2:4, or use quik")
    elif not spec.symmetric or spec.group_size is not None or spec.group_axis == "out":
        raise ValueError(
            f"method quik has one symmetric scale a row; spec {spec} asks for more: write w{spec.bits}-sym"
        )
    if method.startswith("adadim") and spec.group_axis == "out":
        raise ValueError("method adadim chooses the group axis itself; leave out -out")
    if method.startswith("adadim") and spec.two_level:
        raise ValueError(
            "method adadim may choose groups of outputs, which have no two-level scales; "
            f"leave out -twolevel, or use {'rtn' if method == 'adadim-rtn' else 'gptq'}"
        )


def default_method(spec: QuantSpec, has_hessian: bool) -> str:
    """The method that a spec and the statistics at hand ask for."""
    if spec.grid == "codebook":
        return "kllm" if spec.shared else "squeezellm"
    if spec.outliers or spec.semistructured:
        return "quik"
    return "gptq" if has_hessian else "rtn"


def quantize_array(
    kernel: jax.Array | np.ndarray,
    spec: QuantSpec | str,
    hessian: jax.Array | None = None,
    fisher: jax.Array | None = None,
    *,
    amax: jax.Array | None = None,
    inputs: HistogramStats | None = None,
    recipe: Recipe | str | None = None,
    outlier_range: float | None = None,
    path: str = "weight",
) -> Layer:
    """Quantizes one matrix W [N, K], out features first, for use with `jquant.linear`.

    hessian [K, K] = mean of x x^T over inputs x; fisher [N, K] = mean squared gradient; amax [K] = largest |x|; inputs:
    histogram of x, for activations by a table. recipe: a method's name, or all of it; None takes what the spec and the
    statistics ask for. outlier_range is SqueezeLLM's multiplier of the interquartile range; None finds the one that
    meets `spec.sparse` on this matrix alone.
    Raises ValueError for shapes that disagree, values that are not finite, or a statistic that the method lacks.
    """
    spec = QuantSpec.parse(spec) if isinstance(spec, str) else spec
    if recipe is None:
        recipe = default_method(spec, hessian is not None)
    recipe = Recipe(recipe) if isinstance(recipe, str) else recipe
    check_spec(spec, recipe.method)
    W = check_matrix(kernel, path)
    if hessian is not None:
        hessian = jnp.asarray(hessian).astype(jnp.float32)
        if hessian.shape != (W.shape[1], W.shape[1]):
            raise ValueError(
                f"{path} has {W.shape[1]} inputs; expected a square Hessian of that size, got {hessian.shape}"
            )
    if recipe.method in TABLES:
        if recipe.method == "lnq" and hessian is None:
            raise ValueError(f"{path}: method lnq needs the Hessian of the layer's inputs; give one, or use squeezellm")
        layer = table_layer(path, W, spec, recipe, fisher, outlier_range)
        if recipe.method == "lnq" and hessian is not None:
            layer = refine_table(layer, W, spec, hessian)
    elif recipe.method.startswith("adadim"):
        candidates = [quantize_siblings({path: W}, each, recipe, hessian)[path] for each in both_axes(spec)]
        layer = min(candidates, key=lambda one: one[1].objective_error)  # the first, the usual direction, where equal
    else:
        layer = quantize_siblings({path: W}, spec, recipe, hessian, amax)[path]
    return with_activation(layer, activation_of(spec.activation, inputs, path))


def quantize_siblings(
    kernels: Matrices,
    spec: QuantSpec,
    recipe: Recipe,
    hessian: jax.Array | None = None,
    amax: jax.Array | None = None,
) -> dict[str, Layer]:
    """Affine layers that multiply one and the same input: {path: W [N_i, K]} with their common statistics."""
    kernels = {path: W.astype(jnp.float32) for path, W in kernels.items()}
    if recipe.method in ("rtn", "adadim-rtn"):
        return rounded_layers(kernels, spec, recipe.clip_search, hessian)
    if hessian is None:
        paths = ", ".join(kernels)
        raise ValueError(
            f"{paths}: method {recipe.method} needs the Hessian of the layer's inputs; give one, or use rtn"
        )
    if recipe.method != "quik":
        return gptq_layers(kernels, spec, hessian, recipe.clip_search)
    if amax is None:
        # The diagonal is the inputs' mean square: it ranks columns where no range was recorded.
        amax = jnp.sqrt(jnp.maximum(jnp.diagonal(hessian), 0.0))
    return quik_layers(kernels, spec, hessian, amax, recipe.zero_outliers, recipe.act_order)


def table_layer(
    path: str,
    W: jax.Array,
    spec: QuantSpec,
    recipe: Recipe,
    fisher: jax.Array | None,
    outlier_range: float | None,
) -> Layer:
    """A layer of the methods that fit codebooks; of lnq, its start, with tables of floats."""
    if spec.shared:
        layer = kllm_layer(path, W, fisher, spec, recipe.row_scale)
    else:
        layer = squeezellm_layer(path, W, fisher, spec, outlier_range, recipe.exact)
    if not spec.int8_table or recipe.method == "lnq":
        return layer
    return snapped_layer(layer, W, spec, fisher)


def both_axes(spec: QuantSpec) -> tuple[QuantSpec, QuantSpec]:
    """The spec with groups along the input, and along the output."""
    return spec, dataclasses.replace(spec, group_axis="out")


def with_activation(layer: Layer, inputs: InputQuantizer) -> Layer:
    """The layer with quantized inputs; its stored size counts the table."""
    if inputs.activation is None:
        return layer
    quantized, report = dataclasses.replace(layer[0], activation=inputs.activation), layer[1]
    report = dataclasses.replace(
        report,
        bits_per_weight=bits_per_weight(quantized),
        size_bytes=size_bytes(quantized),
        note="; ".join(note for note in (report.note, inputs.note) if note) or None,
    )
    return quantized, report


def check_matrix(kernel: jax.Array | np.ndarray, path: str) -> jax.Array:
    """The matrix in float32; ValueError unless it is one, and finite."""
    W = jnp.asarray(kernel).astype(jnp.float32)
    if W.ndim != 2 or not W.size:
        raise ValueError(f"{path} has shape {W.shape}; expected a matrix [out features, in features]")
    if not bool(jnp.all(jnp.isfinite(W))):
        raise ValueError(f"{path} has values that are not finite; nothing sensible can be stored for them")
    return W
