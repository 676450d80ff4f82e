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
        # Below the maximum first: a small temperature then gives -inf, never inf - inf.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
        return jax.lax.cond(
            restricted, lambda: _draw_restricted(keys, scaled, top_k, top_p), lambda: _draw(keys, scaled)
        )

    # A restriction costs as much as some layers of a small model, so each branch pays only for what it uses.
    return jax.lax.cond(temperature > 0, draw, greedy)


def kept_tokens(scaled: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Which tokens remain under top-k then top-p: scaled logits [B, V] -> bool [B, V], at least one a row.

    Of equally probable tokens those with lower ids come first.
    """
    size = scaled.shape[-1]
    order = _sortable(scaled)
    limit = jnp.where(top_k > 0, jnp.minimum(top_k, size), size).astype(jnp.float32)
    in_top_k = _heaviest(order, jnp.ones_like(scaled), jnp.broadcast_to(limit, scaled.shape[:1]))
    mass = jnp.where(in_top_k, jax.nn.softmax(scaled, axis=-1), 0.0)
    in_top_p = _heaviest(order, mass, top_p * jnp.sum(mass, axis=-1))
    # Rounding must not drop the tail when p is 1, which asks for everything.
    return in_top_k & (in_top_p | (top_p >= 1))


def _heaviest(order: jax.Array, mass: jax.Array, target: jax.Array) -> jax.Array:
    """The smallest set of leading tokens whose mass reaches `target` [B]; order uint32, mass float32: [B, V] -> bool.

    The last token's place in the order is found bit by bit, 32 sums over the vocabulary instead of a sort, which on a
    CPU takes as long as the layers of a small model.
    """

    def decide_bit(index: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        reached = jnp.sum(jnp.where(order >= candidate[:, None], mass, 0.0), axis=-1) >= target
        return jnp.where(reached, candidate, threshold)

    # The largest threshold that still reaches the target: without the tokens that lie on it, the mass falls short.
    threshold = jax.lax.fori_loop(0, 32, decide_bit, jnp.zeros(order.shape[:1], jnp.uint32))[:, None]
    above, level = order > threshold, order == threshold
    missing = target - jnp.sum(jnp.where(above, mass, 0.0), axis=-1)
    on_level = jnp.where(level, mass, 0.0)
    return above | (level & (jnp.cumsum(on_level, axis=-1) - on_level < missing[:, None]))


def _sortable(x: jax.Array) -> jax.Array:
    """float32 -> uint32 in the same order: the sign bit is flipped, and of negative numbers all bits."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 0, bits | jnp.uint32(0x80000000), ~bits)


def _draw(keys: jax.Array, scaled: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)


def _draw_restricted(keys: jax.Array, scaled: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    return _draw(keys, jnp.where(kept_tokens(scaled, top_k, top_p), scaled, -jnp.inf))
