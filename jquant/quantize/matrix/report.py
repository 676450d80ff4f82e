"""What happened to one layer, and the two errors that every report gives."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jquant.format.spec import QuantSpec
from jquant.format.weights import QuantizedLinear, bits_per_weight, dequantize, size_bytes


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What happened to one layer. Errors are relative: |W - Q|^2 / |W|^2, plain and in the method's own measure.

    float_table_error: where tables were snapped to int8, what objective_error was before.
    """

    path: str
    spec: str
    method: str
    bits_per_weight: float
    size_bytes: int
    weight_error: float
    objective_error: float
    kept: int = 0
    damping: float | None = None
    note: str | None = None
    float_table_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


Layer = tuple[QuantizedLinear, LayerReport]


def describe_layer(
    path: str,
    spec: QuantSpec,
    method: str,
    W: jax.Array,
    quantized: QuantizedLinear,
    *,
    hessian: jax.Array | None = None,
    fisher: jax.Array | None = None,
    exact: jax.Array | None = None,
    kept: int = 0,
    damping: float | None = None,
    notes: tuple[str | None, ...] = (),
    float_table_error: float | None = None,
) -> Layer:
    """The layer with its report. hessian [K, K] or fisher [N, K]: what the error is weighted with; exact: bool [N, K],
    entries that the residual makes exact."""
    # Without the residual, whose size differs from layer to layer: each would be compiled for itself.
    base = QuantizedLinear(quantized.weight, quantized.outliers)
    plain, objective = _errors(W, base, exact, hessian, fisher)
    report = LayerReport(
        path=path,
        spec=str(spec),
        method=method,
        bits_per_weight=bits_per_weight(quantized),
        size_bytes=size_bytes(quantized),
        weight_error=float(plain),
        objective_error=float(objective),
        kept=kept,
        damping=damping,
        note="; ".join(note for note in notes if note) or None,
        float_table_error=float_table_error,
    )
    return quantized, report


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.0), 0.0)


@jax.jit
def _errors(
    W: jax.Array,
    quantized: QuantizedLinear,
    exact: jax.Array | None,
    hessian: jax.Array | None,
    fisher: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    W = W.astype(jnp.float32)
    E = W - dequantize(quantized)
    E = E if exact is None else jnp.where(exact, 0.0, E)
    size = jnp.max(jnp.abs(W))
    size = jnp.where(size > 0, size, 1.0)  # keeps the squares of huge and tiny weights inside float32
    E, W = E / size, W / size
    plain = _ratio(jnp.sum(E * E), jnp.sum(W * W))
    if hessian is not None:
        H = _in_units(hessian)
        part, whole = (jnp.sum(jnp.matmul(A, H, precision="highest") * A) for A in (E, W))
        return plain, _ratio(part, whole)
    if fisher is not None:
        f = _in_units(fisher)
        return plain, _ratio(jnp.sum(f * E * E), jnp.sum(f * W * W))
    return plain, plain


def _in_units(statistic: jax.Array) -> jax.Array:
    """Finite, and at most 1."""
    statistic = jnp.where(jnp.isfinite(statistic), statistic, 0.0).astype(jnp.float32)
    return statistic / jnp.maximum(jnp.max(jnp.abs(statistic)), float(jnp.finfo(jnp.float32).tiny))
