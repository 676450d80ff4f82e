"""Calibration statistics: kept so that they can be updated, merged and resumed in any order.

    Hessian   H = sum_t s_t x_t x_t^T / sum_t s_t    [K, K], over the tokens t that reach a linear layer's input
    Range     a_k = max_t |x_tk|                     [K]
    Fisher    F = 1/n sum_s (dL_s / dW)**2           [N, K], L_s the mean loss of sequence s   (SqueezeLLM eq. 3)

s_t = 1 is the plain Hessian. With s_t = mean_j (dL/dy_tj)**2 over the layer's outputs y it is GuidedQuant's (arXiv
2505.07004, one group): errors count at the tokens where the loss feels them. Sums are float32; `finalize` divides.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HessianStats:
    """total [K, K] float32 = sum of s x x^T, count = sum of s (float32 scalar; exact to 2**24 tokens)."""

    total: jax.Array
    count: jax.Array

    @classmethod
    def init(cls, features: int) -> "HessianStats":
        return cls(jnp.zeros((features, features), jnp.float32), jnp.float32(0))

    def update(self, x: jax.Array, saliency: jax.Array | None = None) -> "HessianStats":
        """Adds inputs x [..., K], each token times its saliency [...] if given."""
        x = x.reshape(-1, x.shape[-1])
        if saliency is None:
            # A product of two half-precision numbers is exact in float32, so only float32 inputs need more passes.
            precision = "highest" if x.dtype == jnp.float32 else None
            square = jnp.matmul(x.T, x, precision=precision, preferred_element_type=jnp.float32)
            return HessianStats(self.total + square, self.count + x.shape[0])
        s = saliency.reshape(-1).astype(jnp.float32)
        x = x.astype(jnp.float32) * jnp.sqrt(s)[:, None]
        return HessianStats(self.total + jnp.matmul(x.T, x, precision="highest"), self.count + jnp.sum(s))

    def merge(self, other: "HessianStats") -> "HessianStats":
        return HessianStats(self.total + other.total, self.count + other.count)

    def finalize(self) -> jax.Array:
        """The weighted mean of x x^T; zeros if nothing was seen."""
        return self.total / jnp.where(self.count > 0, self.count, 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RangeStats:
    """largest [K] float32 = the largest absolute value of each input; nothing seen gives zeros."""

    largest: jax.Array

    @classmethod
    def init(cls, features: int) -> "RangeStats":
        return cls(jnp.zeros((features,), jnp.float32))

    def update(self, x: jax.Array) -> "RangeStats":
        """Adds inputs x [..., K]. A NaN counts as infinite: the column must not look harmless."""
        x = jnp.abs(x.reshape(-1, x.shape[-1]).astype(jnp.float32))
        x = jnp.where(jnp.isnan(x), jnp.inf, x)
        return RangeStats(jnp.maximum(self.largest, jnp.max(x, axis=0, initial=0.0)))

    def merge(self, other: "RangeStats") -> "RangeStats":
        return RangeStats(jnp.maximum(self.largest, other.largest))

    def finalize(self) -> jax.Array:
        """[K] float32."""
        return self.largest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FisherStats:
    """total [N, K] float32 = sum of squared gradients, count = sequences seen."""

    total: jax.Array
    count: jax.Array

    @classmethod
    def init(cls, shape: tuple[int, ...]) -> "FisherStats":
        return cls(jnp.zeros(shape, jnp.float32), jnp.float32(0))

    def update(self, gradient: jax.Array) -> "FisherStats":
        """Adds the gradient [N, K] of one sequence's loss."""
        return FisherStats(self.total + jnp.square(gradient.astype(jnp.float32)), self.count + 1)

    def merge(self, other: "FisherStats") -> "FisherStats":
        return FisherStats(self.total + other.total, self.count + other.count)

    def finalize(self) -> jax.Array:
        """The mean squared gradient; zeros if nothing was seen."""
        return self.total / jnp.maximum(self.count, 1)


InputStats = HessianStats | RangeStats
