"""Calibration statistics: sums with a count, so that they can be updated, merged and resumed in any order.

    Hessian   H = 1/n sum_t x_t x_t^T                  [K, K], over the n tokens that reach a linear layer's input
    Fisher    F = 1/n sum_s (dL_s / dW)**2             [N, K], L_s the mean loss of sequence s     (SqueezeLLM eq. 3)

Both are kept as float32 sums; `finalize` divides. Adding two statistics of different data gives that of both.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HessianStats:
    """total [K, K] float32 = sum of x x^T, count = tokens seen (float32 scalar, exact to 2**24 and merged beyond)."""

    total: jax.Array
    count: jax.Array

    @classmethod
    def init(cls, features: int) -> "HessianStats":
        return cls(jnp.zeros((features, features), jnp.float32), jnp.float32(0))

    def update(self, x: jax.Array) -> "HessianStats":
        """Adds inputs x [..., K]; products in float32 at highest precision."""
        x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        return HessianStats(self.total + jnp.matmul(x.T, x, precision="highest"), self.count + x.shape[0])

    def merge(self, other: "HessianStats") -> "HessianStats":
        return HessianStats(self.total + other.total, self.count + other.count)

    def finalize(self) -> jax.Array:
        """The mean of x x^T; zeros if nothing was seen."""
        return self.total / jnp.maximum(self.count, 1)


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


Stats = HessianStats | FisherStats
