"""The seam: y = linear(x, w), whatever w is. Nothing else chooses a kernel.

    y = decode(weight) . q(transform(x))  +  outliers  +  residual  +  bias

x [..., K]; w a dense array [N, K] or a packed pytree of `jquant.format.weights`; y [..., N] in x's type. Sums are
float32. q quantizes activations where the weight says so; kept columns and residual see transform(x) unquantized.
`implementation` None takes the best supported path, "xla" or "pallas" demands one; a demand that cannot be met is a
ValueError with the reason, never a silent fallback.

    choice.py  which path, and why      preparation.py  the layout that the device reads fastest
    xla.py     what XLA compiles        hopper.py       the Pallas kernels
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jquant.format.rotation import Transformed, rotate
from jquant.format.weights import is_quantized, shape_of
from jquant.linear import hopper, xla
from jquant.linear.choice import (
    Choice as Choice,
    Implementation as Implementation,
    as_layer,
    choose as choose,
    explain as explain,
)
from jquant.linear.preparation import prepare as prepare
from jquant.linear.xla import STREAMING_TOKENS as STREAMING_TOKENS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tap:
    """A dense weight that shows what passes: `linear(x, Tap(w, observe))` calls observe(x, y), y = x w^T without bias.

    `shift` [..., N] is added to y: its gradient is that of the layer's output. A tap lives inside one traced function,
    put there by whoever collects statistics, and never in a stored model.
    """

    weight: jax.Array
    observe: Callable[[jax.Array, jax.Array], None] = dataclasses.field(metadata={"static": True})
    shift: jax.Array | None = None


def linear(
    x: jax.Array,
    w: Any,
    bias: jax.Array | None = None,
    *,
    implementation: Implementation = None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """x [..., K] times w [N, K] transposed, plus bias [N]: [..., N] in x's type, or in `out_dtype`.

    Sums are float32, so out_dtype float32 loses nothing more (logits want it, however narrow the model).
    Raises ValueError if K differs, or if `implementation` is demanded and does not support this layer.
    """
    if isinstance(w, Transformed):
        x, w = rotate(x, w.transform), w.value
    shape = shape_of(w) if is_quantized(w) else w.weight.shape if isinstance(w, Tap) else w.shape
    if x.shape[-1] != shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features, the weight [N, K] = {list(shape)} takes {shape[1]}")
    if isinstance(w, Tap):
        y = xla.dense(x, w.weight)
        y = y if w.shift is None else y + w.shift.astype(y.dtype)
        w.observe(x, y)
    elif not is_quantized(w):
        choose(w, 1, implementation)
        y = xla.dense(x, w)
    else:
        layer, tokens = as_layer(w), x.reshape(-1, shape[1])
        last = layer.bias is None and bias is None  # what else is added is added to float32 sums
        kind = jnp.float32 if not last else out_dtype or x.dtype
        if choose(layer, tokens.shape[0], implementation, x.dtype).implementation == "pallas":
            y: Any = hopper.product(tokens, layer, kind)
        else:
            y = xla.product(tokens, layer)
        y = y.reshape(*x.shape[:-1], shape[0])
        if layer.bias is not None:
            y = y + layer.bias.astype(y.dtype)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y.astype(x.dtype if out_dtype is None else out_dtype)
