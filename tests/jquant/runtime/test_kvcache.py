"""Decoding through the cache gives the logits of reading everything at once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.models import Decoder, ModelConfig
from jquant.runtime import init_cache
from jquant.runtime.kvcache import cache_bytes

CONFIG = ModelConfig(
    family="mistral",
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    windows=(None, None, None),
)
LENGTH, PROMPT = 22, 9
TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, 53, (2, LENGTH)), jnp.int32)

# Logits are of order 1 and float32 sums may run in another order.
ROUNDING = 5e-5


def loud(windows) -> Decoder:
    config = dataclasses.replace(CONFIG, windows=windows)
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim == 2 else leaf, Decoder(config, key=jax.random.key(0)))


def programs(function: Any) -> int:
    """How many programs a jitted function has compiled."""
    return function._cache_size()


@jax.jit
def forward(model, tokens, positions=None, memory=None):
    return model(tokens, positions, memory)


def read(model, steps, pad: int = 0):
    """Logits [B, T, V] of reading TOKENS in pieces of the given lengths, the first after `pad` padding tokens."""
    memory = init_cache(model.config, 2, LENGTH + pad + 3, jnp.float32)
    logits, start = [], 0
    for count in steps:
        tokens = TOKENS[:, start : start + count]
        positions = jnp.broadcast_to(jnp.arange(start, start + count, dtype=jnp.int32), tokens.shape)
        before = pad if start == 0 else 0
        tokens = jnp.pad(tokens, ((0, 0), (before, 0)))
        positions = jnp.pad(positions, ((0, 0), (before, 0)), constant_values=-1)
        out, memory = forward(model, tokens, positions, memory)
        logits.append(out[:, before:])
        start += count
    return np.concatenate(logits, axis=1), memory


@pytest.mark.parametrize("windows", [(None, None, None), (4, 4, 4), (None, 3, 12)])
@pytest.mark.parametrize("pad", [0, 7])
def test_cached_logits_equal_full_logits(windows, pad):
    model = loud(windows)
    full, _ = forward(model, TOKENS)
    assert float(jnp.std(full)) > 0.3
    cached, _ = read(model, [PROMPT] + [1] * (LENGTH - PROMPT), pad)
    np.testing.assert_allclose(cached, full, atol=ROUNDING)


@pytest.mark.parametrize("windows", [(None, None, None), (4, 4, 4)])
def test_tokens_may_come_in_pieces_of_any_length(windows):
    model = loud(windows)
    cached, _ = read(model, [1, 8, 3, 10])
    np.testing.assert_allclose(cached, forward(model, TOKENS)[0], atol=ROUNDING)


def test_the_cursor_and_positions_tell_what_is_stored():
    _, memory = read(loud((None, None, None)), [PROMPT, 1, 1], pad=2)
    for layer in memory:
        assert int(layer.cursor) == PROMPT + 4
        assert not layer.empty
        expected = [-1, -1, *range(PROMPT + 2)]
        assert np.asarray(layer.positions)[0].tolist() == expected + [-1] * (LENGTH + 5 - len(expected))


def test_steps_share_one_compilation_and_write_in_place():
    model = loud((None, None, None))
    step = jax.jit(lambda model, tokens, positions, memory: model(tokens, positions, memory), donate_argnums=3)
    _, memory = read(model, [PROMPT])
    for index in range(PROMPT, PROMPT + 4):
        position = jnp.full((2, 1), index, jnp.int32)
        _, memory = step(model, TOKENS[:, index : index + 1], position, memory)
    assert programs(step) == 1
    lowered = step.lower(model, TOKENS[:, :1], jnp.zeros((2, 1), jnp.int32), memory).compile()
    stored = cache_bytes(model.config, 2, LENGTH + 3, jnp.float32)
    memory = lowered.memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes >= stored


def test_half_precision_caches_keep_their_type():
    model = loud((None, None, None))
    memory = init_cache(model.config, 2, 16, jnp.bfloat16)
    positions = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (2, 4))
    _, memory = forward(model, TOKENS[:, :4], positions, memory)
    logits, memory = forward(model, TOKENS[:, 4:5], jnp.full((2, 1), 4, jnp.int32), memory)
    assert memory[0].keys.dtype == jnp.bfloat16
    # keys and values keep 8 bits
    np.testing.assert_allclose(logits[:, 0], forward(model, TOKENS[:, :5])[0][:, 4], atol=0.1)


def test_an_impossible_cache_is_refused():
    with pytest.raises(ValueError, match="length=0"):
        init_cache(CONFIG, 1, 0, jnp.float32)
