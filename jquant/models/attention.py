"""Causal attention by positions, with grouped key/value heads and sliding windows.

    out[t, h] = sum_s softmax_s(q[t, h] . k[s, h // G] / sqrt(d)) v[s, h // G],    G = H / Hkv query heads a kv head
    s visible to t  iff  0 <= key_position[s] <= query_position[t]  and  query_position[t] - key_position[s] < window

Layouts: q [B, T, H, d]; k, v [B, S, Hkv, d]; positions [B, T] and [B, S] int32, negative at padding; out [B, T, H, d]
in the type of q. Scores, softmax and sums are float32. A query that sees nothing (padding) gets a finite average.

Memory is linear in T: queries are cut into spans, a Python loop over static slices of queries and of the keys they can
see; a span holds one chunk of CHUNK_QUERIES queries, or maps over several. No more than MAX_SPANS chunks of scores
exist at a time, and differentiating computes them again. The G heads that share a kv head are rows of one matrix
product, so K and V are never repeated. On a CPU MAX_SPANS spans skip nearly half of the scores; elsewhere there is one
span, because each is products of a shape of its own, which a GPU's compiler tunes for seconds, and scores are cheap.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

CHUNK_QUERIES = 256
MAX_SPANS = 8
MASKED_SCORE = -1e30


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Attention of q [B, T, H, d] to any k, v [B, S, Hkv, d] whose keys may lie in any order; out [B, T, H, d]."""
    # One span: as every query may see every key, there is nothing to cut away.
    return _attend_spans(q, k, v, query_positions, key_positions, window, [(0, q.shape[1], 0, k.shape[1])])


def self_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, window: int | None = None
) -> jax.Array:
    """Attention of a sequence to itself; skips the keys that no query of a span can see (on a CPU).

    q [B, T, H, d]; k, v [B, T, Hkv, d]; positions [B, T] must increase along T except at padding, which may stand
    anywhere. Then a key behind its query in the array lies in its future, and a key `window` places before it lies
    outside its window, so with spans half of the scores (all but a band, with a window) are never computed.
    """
    length = q.shape[1]
    chunks = -(-length // CHUNK_QUERIES)
    size = -(-chunks // (MAX_SPANS if jax.default_backend() == "cpu" else 1)) * CHUNK_QUERIES
    spans = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        spans.append((start, stop, 0 if window is None else max(0, start - window + 1), stop))
    return _attend_spans(q, k, v, positions, positions, window, spans)


def _attend_spans(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    window: int | None,
    spans: list[tuple[int, int, int, int]],
) -> jax.Array:
    """Attention of each query span [start, stop) to its key span [first_key, last_key)."""
    batch, length, heads, d = q.shape
    kv_heads = k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key/value heads evenly; expected a multiple")
    group = heads // kv_heads
    # Rows (t, g) of a kv head are neighbours, so a span of queries is one contiguous slice of the row axis.
    rows = (q * jnp.asarray(1.0 / math.sqrt(d), q.dtype)).reshape(batch, length, kv_heads, group, d)
    rows = rows.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, length * group, d)
    row_positions = jnp.repeat(query_positions, group, axis=1)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    parts = []
    for start, stop, first_key, last_key in spans:
        query_rows, keys = slice(start * group, stop * group), slice(first_key, last_key)
        part = (rows[:, :, query_rows], row_positions[:, query_rows], k[:, :, keys], v[:, :, keys])
        parts.append(_attend_span(*part, key_positions[:, keys], window, CHUNK_QUERIES * group))
    out = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
    out = out.reshape(batch, kv_heads, length, group, d).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, length, heads, d)


def _attend_span(
    rows: jax.Array,
    row_positions: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_positions: jax.Array,
    window: int | None,
    chunk: int,
) -> jax.Array:
    """Attention of rows [B, Hkv, R, d] to k, v [B, Hkv, S, d], `chunk` rows at a time."""
    batch, kv_heads, count, d = rows.shape
    if count <= chunk:
        return _attend_rows(rows, k, v, visible_keys(row_positions, key_positions, window))
    chunks = -(-count // chunk)
    padding = chunks * chunk - count
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, padding), (0, 0))).reshape(batch, kv_heads, chunks, chunk, d)
    row_positions = jnp.pad(row_positions, ((0, 0), (0, padding)), constant_values=-1).reshape(batch, chunks, chunk)

    def attend_chunk(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        some_rows, some_positions = part
        return _attend_rows(some_rows, k, v, visible_keys(some_positions, key_positions, window))

    out = lax.map(attend_chunk, (jnp.moveaxis(rows, 2, 0), jnp.moveaxis(row_positions, 1, 0)))
    return jnp.moveaxis(out, 0, 2).reshape(batch, kv_heads, chunks * chunk, d)[:, :, :count]


def visible_keys(query_positions: jax.Array, key_positions: jax.Array, window: int | None) -> jax.Array:
    """Which keys each query sees: positions [B, T] and [B, S] int32 -> bool [B, T, S]."""
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    visible = (key >= 0) & (key <= query)
    return visible if window is None else visible & (query - key < window)


@jax.checkpoint
def _attend_rows(rows: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax attention of rows [B, Hkv, R, d] to k, v [B, Hkv, S, d] where visible [B, R, S]; [B, Hkv, R, d]."""
    scores = lax.dot_general(rows, k, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None], scores, jnp.float32(MASKED_SCORE))
    # Dividing the [R, d] result instead of the [R, S] weights saves a pass over the scores; the shift by the maximum
    # cancels in the quotient, so no gradient flows through it.
    weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = lax.dot_general(
        weights.astype(v.dtype), v, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    )
    return (mixed / total).astype(rows.dtype)
