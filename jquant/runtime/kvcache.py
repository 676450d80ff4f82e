"""Keys and values of earlier tokens, in buffers of fixed size that generation writes into.

    slots     0 .. cursor-1 hold tokens in the order they came, cursor .. S-1 are empty
    visible   key s to a query at position p  iff  0 <= positions[s] <= p (and within the layer's window)

Layouts: keys, values [B, S, Hkv, d]; positions [B, S] int32, -1 in empty slots and at padding; cursor int32 scalar, the
same for every sequence. Because visibility goes by position and not by slot, prompts of different lengths share slots:
padding only wastes some. Sliding-window layers keep all S slots.

A cache is a pytree. Under `jax.jit`, donate it and each write happens in place.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jquant.models import Context, ModelConfig
from jquant.models.attention import attention, self_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values [B, S, Hkv, d], their positions [B, S] and the next free slot.

    `empty` says, as a static fact, that nothing was written yet: the first tokens then attend to themselves alone
    instead of to the whole buffer.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    cursor: jax.Array
    empty: bool = dataclasses.field(default=False, metadata={"static": True})

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, context: Context, window: int | None
    ) -> tuple[jax.Array, Self]:
        """Adds k, v [B, T, Hkv, d] at the cursor and attends with q [B, T, H, d]; out [B, T, H, d] and the new cache.

        The caller sees to it that T slots are free: beyond the end, the last slots would be overwritten.
        """
        start = (0, self.cursor, 0, 0)
        after = dataclasses.replace(
            self,
            keys=lax.dynamic_update_slice(self.keys, k.astype(self.keys.dtype), start),
            values=lax.dynamic_update_slice(self.values, v.astype(self.values.dtype), start),
            positions=lax.dynamic_update_slice(self.positions, context.positions, (0, self.cursor)),
            cursor=self.cursor + q.shape[1],
            empty=False,
        )
        if self.empty:
            return self_attention(q, k, v, context.positions, window), after
        keys, values = after.keys.astype(q.dtype), after.values.astype(q.dtype)
        return attention(q, keys, values, context.positions, after.positions, window), after


def init_cache(config: ModelConfig, batch: int, length: int, dtype: DTypeLike) -> tuple[LayerCache, ...]:
    """An empty cache of `length` slots for `batch` sequences, one entry a layer."""
    if batch < 1 or length < 1:
        raise ValueError(f"a cache needs at least one sequence and one slot, got batch={batch}, length={length}")
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    return tuple(
        LayerCache(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            positions=jnp.full((batch, length), -1, jnp.int32),
            cursor=jnp.int32(0),
            empty=True,
        )
        for _ in range(config.num_layers)
    )


def cache_bytes(config: ModelConfig, batch: int, length: int, dtype: DTypeLike) -> int:
    """Bytes of the keys and values of such a cache."""
    per_slot = 2 * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
    return config.num_layers * batch * length * per_slot
