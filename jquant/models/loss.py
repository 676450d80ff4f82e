"""Next-token cross-entropy from the last hidden states, without ever holding the logits of a whole sequence.

    loss[b] = 1/(T-1) sum_{t < T-1}  logsumexp(z[b, t]) - z[b, t, tokens[b, t+1]],      z = head(x) float32

The head is applied to CHUNK_ROWS tokens at a time, and applied again when differentiated, so memory is bounded by
[CHUNK_ROWS, V] logits however long the text is.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

CHUNK_ROWS = 256


class Head(Protocol):
    """Anything that turns hidden states x [B, T, D] into logits [B, T, V]."""

    def head(self, x: jax.Array) -> jax.Array: ...


def token_losses(model: Head, x: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy in nats of each target: x [B, T, D], targets [B, T] int32 -> [B, T] float32."""
    batch, length, features = x.shape
    count = batch * length
    rows = min(CHUNK_ROWS, count)
    chunks = -(-count // rows)
    padding = chunks * rows - count
    x = jnp.pad(x.reshape(count, features), ((0, padding), (0, 0))).reshape(chunks, rows, features)
    wanted = jnp.pad(targets.reshape(count), (0, padding)).reshape(chunks, rows)

    @jax.checkpoint
    def chunk_losses(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        states, ids = chunk
        logits = model.head(states[None])[0].astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    return jax.lax.map(chunk_losses, (x, wanted)).reshape(-1)[:count].reshape(batch, length)


def head_loss(model: Head, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of the T-1 next tokens of each sequence: x [B, T, D], tokens [B, T] -> [B] float32 nats."""
    if tokens.shape[1] < 2:
        raise ValueError(f"a next-token loss needs sequences of at least 2 tokens, got {tokens.shape[1]}")
    return jnp.mean(token_losses(model, x[:, :-1], tokens[:, 1:]), axis=1)
