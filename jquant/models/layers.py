"""The parts every decoder family is made of: Linear, Embedding, RMSNorm and the gated MLP.

    Linear     y = x W^T + b            x [..., K], W [N, K] dense or quantized, b [N]
    RMSNorm    y = x / sqrt(mean(x^2) + eps) * w      computed in float32, returned in the type of x
    MLP        y = down(silu(gate(x)) * up(x))        SwiGLU, arXiv:2002.05202 eq. 6

Parameters are `nnx.Param` leaves. A weight may hold any pytree that `jquant.linear` accepts, so quantizing a model is
replacing leaves. Without a key, weights are zeros and norms are ones (a mould that a converter fills, or an abstract
module under `jax.eval_shape`); with a key, weights are normal with standard deviation 0.02.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jquant.linear import Implementation, linear

INIT_STDDEV = 0.02


def subkey(key: jax.Array | None, index: int) -> jax.Array | None:
    """The `index`-th key below `key`; None stays None (no random values wanted)."""
    return None if key is None else jax.random.fold_in(key, index)


def initial_weight(key: jax.Array | None, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Zeros without a key, else normal values with standard deviation 0.02."""
    if key is None:
        return jnp.zeros(shape, dtype)
    return (INIT_STDDEV * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


class Linear(nnx.Module):
    """y = x W^T + b through `jquant.linear`, which decides how W is multiplied.

    `weight` holds an array [N, K] or a quantized pytree of that logical shape, `bias` an array [N] or is None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        dtype: DTypeLike = jnp.float32,
        key: jax.Array | None = None,
        implementation: Implementation = None,
    ):
        self.weight = nnx.Param(initial_weight(key, (out_features, in_features), dtype))
        self.bias = nnx.Param(initial_weight(subkey(key, 1), (out_features,), dtype)) if use_bias else None
        self.implementation: Implementation = implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., K] -> [..., N] in the type of x."""
        bias = None if self.bias is None else self.bias.get_value()
        return linear(x, self.weight.get_value(), bias, implementation=self.implementation)


class Embedding(nnx.Module):
    """Token rows: `weight` [V, D]."""

    def __init__(self, num: int, features: int, *, dtype: DTypeLike = jnp.float32, key: jax.Array | None = None):
        self.weight = nnx.Param(initial_weight(key, (num, features), dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, T] int32 -> [B, T, D]; an id outside 0..V-1 gives NaN rows, never another token's row."""
        return jnp.take(self.weight.get_value(), tokens, axis=0, mode="fill", fill_value=jnp.nan)


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv:1910.07467 eq. 4); `weight` [D]."""

    def __init__(self, features: int, *, eps: float, dtype: DTypeLike = jnp.float32):
        self.weight = nnx.Param(jnp.ones((features,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D] in the type of x."""
        # Squares of half-precision activations overflow (float16) or lose the small channels (bfloat16).
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * self.weight.get_value().astype(jnp.float32)).astype(x.dtype)


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), D -> F -> D."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        use_bias: bool = False,
        dtype: DTypeLike = jnp.float32,
        key: jax.Array | None = None,
        implementation: Implementation = None,
    ):
        def make(index: int, in_features: int, out_features: int) -> Linear:
            return Linear(
                in_features,
                out_features,
                use_bias=use_bias,
                dtype=dtype,
                key=subkey(key, index),
                implementation=implementation,
            )

        self.gate_proj = make(0, features, hidden)
        self.up_proj = make(1, features, hidden)
        self.down_proj = make(2, hidden, features)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D]."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
