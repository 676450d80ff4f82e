"""Which path a layer takes, and why: a pure function of shapes, types and the device."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jquant.format import tree as trees
from jquant.format.weights import QuantizedLinear, bits_per_weight, is_quantized, size_bytes
from jquant.linear import hopper, xla

Implementation = Literal["xla", "pallas"] | None


class Choice(NamedTuple):
    """The path that `linear` takes, and why."""

    implementation: str
    reason: str


def choose(w: Any, tokens: int, implementation: Implementation = None, dtype: DTypeLike = jnp.bfloat16) -> Choice:
    """Which path serves this weight with so many tokens of such a type. ValueError if the one demanded does not."""
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"implementation is {implementation!r}; expected None, 'xla' or 'pallas'")
    if not is_quantized(w):
        if implementation == "pallas":
            raise ValueError("implementation='pallas' cannot serve this layer: the weight is dense; use None or 'xla'")
        return Choice("xla dense", "not quantized")
    layer = as_layer(w)
    reason = None if implementation == "xla" else hopper.no_kernel(layer, tokens, dtype)
    if implementation == "pallas" and reason is not None:
        raise ValueError(f"implementation='pallas' cannot serve this layer: {reason}; use None or 'xla'")
    if implementation != "xla" and reason is None:
        return Choice("pallas", hopper.describe(layer, tokens, dtype))
    name, why = xla.path_of(layer, tokens)
    return Choice(name, why or reason or "demanded")


def as_layer(w: Any) -> QuantizedLinear:
    return w if isinstance(w, QuantizedLinear) else QuantizedLinear(w)


def running_dtype(tree: Any) -> DTypeLike:
    """The type of a model's activations: that of its largest dense array of floats (its embedding), else bfloat16."""
    leaves = jax.tree.leaves(tree, is_leaf=is_quantized)
    dense = [leaf for leaf in leaves if not is_quantized(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)]
    return max(dense, key=lambda leaf: leaf.size).dtype if dense else jnp.bfloat16


def explain(model: Any, tokens: int) -> str:
    """A table, a row a packed layer: path, bits a weight, bytes, what `linear` takes for so many tokens, the reason.

    Activations are taken to have the type of `running_dtype`.
    """
    rows: list[tuple[str, ...]] = [("path", "bits/weight", "bytes", "implementation", "reason")]
    dtype = running_dtype(model)
    for path, leaf in trees.leaves(model).items():
        if is_quantized(leaf):
            choice = choose(leaf, tokens, dtype=dtype)
            rows.append((path, f"{bits_per_weight(leaf):.3f}", str(size_bytes(leaf)), *choice))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
