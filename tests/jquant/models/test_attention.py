"""Attention against a float64 loop over heads and positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.models.attention import CHUNK_QUERIES, MAX_SPANS, attention as eager_attention, self_attention as eager_self

attention = jax.jit(eager_attention, static_argnums=5)
self_attention = jax.jit(eager_self, static_argnums=4)


def oracle(q, k, v, query_positions, key_positions, window):
    """The definition, one query head at a time, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    query, key = np.asarray(query_positions)[:, :, None], np.asarray(key_positions)[:, None, :]
    visible = (key >= 0) & (key <= query)
    if window is not None:
        visible &= query - key < window
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for head in range(q.shape[2]):
        scores = np.einsum("btd,bsd->bts", q[:, :, head], k[:, :, head // group]) / np.sqrt(q.shape[-1])
        scores = np.where(visible, scores, -1e30)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, :, head] = (weights / weights.sum(-1, keepdims=True)) @ v[:, :, head // group]
    return out


def inputs(length, keys, heads, kv_heads, d=8, batch=2, dtype=jnp.float32):
    rng = np.random.default_rng(length + 10 * heads + kv_heads)
    shapes = ((batch, length, heads, d), (batch, keys, kv_heads, d), (batch, keys, kv_heads, d))
    return tuple(jnp.asarray(2 * rng.standard_normal(shape), dtype) for shape in shapes)


def row(length, batch=2):
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


@pytest.mark.parametrize("window", [None, 1, 7, 300, 10_000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_self_attention_equals_the_definition_across_chunks(heads, kv_heads, window):
    length = 2 * CHUNK_QUERIES + 37
    q, k, v = inputs(length, length, heads, kv_heads, batch=1)
    positions = row(length, batch=1)
    out = self_attention(q, k, v, positions, window)
    # float32 sums over up to 549 keys
    np.testing.assert_allclose(out, oracle(q, k, v, positions, positions, window), atol=2e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_attention_reads_keys_in_any_order(window):
    q, k, v = inputs(5, 40, 6, 2)
    rng = np.random.default_rng(0)
    key_positions = jnp.asarray(np.stack([rng.permutation(40) for _ in range(2)]) - 10, jnp.int32)
    query_positions = jnp.asarray([[0, 29, 13, 7, 20], [3, 4, 5, 6, 28]], jnp.int32)
    out = attention(q, k, v, query_positions, key_positions, window)
    np.testing.assert_allclose(out, oracle(q, k, v, query_positions, key_positions, window), atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [None, 5])
def test_padding_is_never_attended_to_and_stays_finite(side, window):
    length, pad = 300, 29
    q, k, v = inputs(length + pad, length + pad, 4, 2, batch=1)
    real = slice(pad, None) if side == "left" else slice(0, length)
    positions = np.full((1, length + pad), -1, np.int32)
    positions[:, real] = np.arange(length)
    padded = self_attention(q, k, v, jnp.asarray(positions), window)
    alone = self_attention(q[:, real], k[:, real], v[:, real], row(length, 1), window)
    np.testing.assert_allclose(padded[:, real], alone, atol=1e-5)
    assert np.isfinite(np.asarray(padded)).all()


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_equal_those_of_plain_softmax(window):
    length = 20
    q, k, v = inputs(length, length, 4, 2)
    positions = row(length)
    query, key = positions[:, :, None], positions[:, None, :]
    visible = (key <= query) & (query - key < (window or length))

    def plain(q, k, v):
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.float32(np.sqrt(q.shape[-1]))
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
        return jnp.sum(jnp.sin(jnp.einsum("bhts,bshd->bthd", weights, v)))

    def ours(q, k, v):
        return jnp.sum(jnp.sin(self_attention(q, k, v, positions, window)))

    gradients = [jax.jit(jax.grad(function, argnums=(0, 1, 2)))(q, k, v) for function in (ours, plain)]
    for mine, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(dtype):
    length = 400
    q, k, v = inputs(length, length, 4, 2, batch=1, dtype=dtype)
    out = self_attention(q, k, v, row(length, 1))
    assert out.dtype == dtype
    error = np.asarray(out, np.float64) - oracle(q, k, v, row(length, 1), row(length, 1), None)
    # Inputs are exact; q/sqrt(d), weights and output are each rounded once to `dtype`.
    assert np.sqrt(np.mean(error**2)) < 4 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("window", [None, 300])
def test_long_sequences_map_over_chunks_within_spans(window):
    length = (MAX_SPANS + 1) * CHUNK_QUERIES + 37
    q, k, v = inputs(length, length, 2, 1, d=4, batch=1)
    positions = row(length, batch=1)
    out = self_attention(q, k, v, positions, window)
    np.testing.assert_allclose(out, oracle(q, k, v, positions, positions, window), atol=2e-5)


@pytest.mark.parametrize("differentiate", [False, True])
def test_memory_is_linear_in_the_length(differentiate):
    def temporary(length: int) -> int:
        q = jnp.zeros((1, length, 4, 8))
        function = lambda q: jnp.sum(self_attention(q, q, q, row(length, 1)))  # noqa: E731
        compiled = jax.jit(jax.grad(function) if differentiate else function).lower(q).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    # All scores at once would take four times the memory for twice the length.
    assert temporary(8 * MAX_SPANS * CHUNK_QUERIES) < 2.5 * temporary(4 * MAX_SPANS * CHUNK_QUERIES)


def test_uneven_head_groups_are_refused():
    q, k, v = inputs(4, 4, 3, 2)
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        self_attention(q, k, v, row(4))
