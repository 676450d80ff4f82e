"""Choosing the next token from logits.

    p      = softmax(z / temperature), restricted to the top_k most probable tokens and renormalised,
             then to the smallest set of most probable tokens whose mass reaches top_p, and renormalised
    greedy = temperature 0: the most probable token

The order (temperature, top-k, top-p) is that of transformers; top-p is arXiv:1904.09751 section 3.1. Every number is an
array under jit, so that changing one compiles nothing. Layouts: logits [B, V] float32, keys [B], tokens [B] int32.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose: `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 restrict nothing. A pytree of three scalars."""

    temperature: float | jax.Array = 0.0
    top_k: int | jax.Array = 0
    top_p: float | jax.Array = 1.0

    def validated(self) -> "Sampling":
        """The same numbers as float32, int32, float32 scalars; ValueError if one makes no sense."""
        temperature, top_k, top_p = float(self.temperature), int(self.top_k), float(self.top_p)
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}; expected a finite number, 0 (greedy) or more")
        if top_k < 0 or top_k != self.top_k:
            raise ValueError(f"top_k is {self.top_k}; expected a whole number of tokens, or 0 for all")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; expected a mass above 0 and up to 1 (1 keeps all tokens)")
        return Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))


def sample(keys: jax.Array, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """One token for each row: keys [B] (one stream a sequence), logits [B, V] float32 -> [B] int32."""
    temperature = jnp.asarray(sampling.temperature, jnp.float32)
    top_k, top_p = jnp.asarray(sampling.top_k, jnp.int32), jnp.asarray(sampling.top_p, jnp.float32)
    restricted = (top_k > 0) | (top_p < 1)

    def greedy() -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        scaled = logits / temperature
        return jax.lax.cond(
            restricted, lambda: _draw_restricted(keys, scaled, top_k, top_p), lambda: _draw(keys, scaled)
        )

    # Sorting a vocabulary costs more than a small model's layer, so each branch pays only for what it uses.
    return jax.lax.cond(temperature > 0, draw, greedy)


def kept_count(probabilities: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """How many of the descending `probabilities` [B, V] remain under top-k then top-p: [B] int32, at least 1."""
    rank = jnp.arange(probabilities.shape[-1], dtype=jnp.int32)
    in_top_k = (rank < top_k) | (top_k <= 0)
    kept = jnp.where(in_top_k, probabilities, 0.0)
    total = jnp.cumsum(kept, axis=-1)
    before = total - kept
    # A token stays while the mass in front of it is short of p; the first has none in front of it. Rounding must not
    # drop the tail when p is 1, which asks for everything.
    in_top_p = (before < top_p * total[:, -1:]) | (top_p >= 1)
    return jnp.maximum(jnp.sum(in_top_k & in_top_p, axis=-1, dtype=jnp.int32), 1)


def _draw(keys: jax.Array, scaled: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)


def _draw_restricted(keys: jax.Array, scaled: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    order = jnp.argsort(scaled, axis=-1, descending=True)
    descending = jnp.take_along_axis(scaled, order, axis=-1)
    count = kept_count(jax.nn.softmax(descending, axis=-1), top_k, top_p)
    rank = jnp.arange(scaled.shape[-1], dtype=jnp.int32)
    chosen = _draw(keys, jnp.where(rank < count[:, None], descending, -jnp.inf))
    return jnp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)
