"""Logits equal those of transformers, for every family and every option it allows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.models import RopeScaling

pytest.importorskip("torch")
pytest.importorskip("transformers")
from tests.jquant.models.hf import TINY, config_of, decoder_of, hf_logits, tiny_hf  # noqa: E402

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LENGTH = 24
# float32 through three layers of width 32: rounding differs by some 1e-6, logits are of order 1.
TOLERANCE = 1e-4

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
    },
    "yarn-plain": {
        "rope_type": "yarn",
        "rope_theta": 50.0,
        "factor": 4.0,
        "original_max_position_embeddings": 48,
        "attention_factor": 0.8,
        "beta_fast": 8.0,
        "truncate": False,
    },
}
ARCHITECTURES = {
    "mha": dict(num_key_value_heads=4),
    "mqa": dict(num_key_value_heads=1),
    "one-head": dict(num_attention_heads=1, num_key_value_heads=1, head_dim=32),
    "wide-heads": dict(head_dim=12),
    "narrow-heads": dict(num_attention_heads=8, num_key_value_heads=4, head_dim=2),
    "tied": dict(tie_word_embeddings=True),
    "large-eps": dict(rms_norm_eps=0.1),
}
FAMILY_OPTIONS = [
    ("llama", dict(attention_bias=True)),
    ("llama", dict(mlp_bias=True)),
    ("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    ("mistral", dict(sliding_window=5)),
    ("mistral", dict(sliding_window=1)),
    ("mistral", dict(sliding_window=None)),
    ("qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    ("qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=0)),
    (
        "qwen2",
        dict(
            use_sliding_window=True,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    ("qwen3", dict(attention_bias=True)),
    ("qwen3", dict(use_sliding_window=True, sliding_window=7, max_window_layers=2)),
]


def logits_of(decoder, tokens: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    forward = jax.jit(lambda decoder, tokens, positions: decoder(tokens, positions)[0])
    logits = forward(decoder, jnp.asarray(tokens), None if positions is None else jnp.asarray(positions))
    assert logits.dtype == jnp.float32
    return np.asarray(logits)


def tokens_of(length: int = LENGTH, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(7).integers(0, TINY["vocab_size"], (batch, length), dtype=np.int32)


def assert_same_logits(model, tokens: np.ndarray) -> None:
    expected = hf_logits(model, tokens)
    assert expected.std() > 0.5, "the model is too quiet to be a test"
    np.testing.assert_allclose(logits_of(decoder_of(model), tokens), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rope_kind_equals_transformers(family: str, rope: str):
    model = tiny_hf(family, rope_parameters=dict(ROPES[rope]))
    # The dynamic kind only differs from the default one beyond the trained length of 64.
    assert_same_logits(model, tokens_of(100 if rope == "dynamic" else LENGTH))


@pytest.mark.parametrize("option", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_equals_transformers(family: str, option: str):
    if family == "qwen2" and option == "narrow-heads":
        # Qwen2 has no head_dim field of its own; hidden 32 over 8 heads is 4.
        model = tiny_hf(family, **(ARCHITECTURES[option] | {"head_dim": 4}))
    else:
        model = tiny_hf(family, **ARCHITECTURES[option])
    assert_same_logits(model, tokens_of())


@pytest.mark.parametrize(("family", "options"), FAMILY_OPTIONS, ids=lambda value: str(value)[:60])
def test_every_family_option_equals_transformers(family: str, options: dict):
    assert_same_logits(tiny_hf(family, **options), tokens_of())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_positions_with_gaps_equal_transformers(family: str):
    import torch

    model = tiny_hf(family)
    tokens = tokens_of(batch=1)
    positions = np.arange(5, 5 + 2 * LENGTH, 2, dtype=np.int32)[None]
    # The mask of ones says that the gaps do not separate packed sequences.
    inputs = dict(position_ids=torch.as_tensor(positions, dtype=torch.long), attention_mask=torch.ones(1, LENGTH))
    expected = hf_logits(model, tokens, **inputs)
    np.testing.assert_allclose(
        logits_of(decoder_of(model), tokens, positions), expected, atol=TOLERANCE, rtol=TOLERANCE
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near_transformers_float32(family: str):
    model = tiny_hf(family).bfloat16().float()
    expected = hf_logits(model, tokens_of())
    # bfloat16 keeps 8 bits: each of some twenty roundings along the stream adds up to 0.4 %.
    error = logits_of(decoder_of(model, dtype=jnp.bfloat16), tokens_of()) - expected
    assert np.sqrt(np.mean(error**2)) < 0.04 * expected.std()


def test_float16_is_near_transformers_float32():
    model = tiny_hf("llama").half().float()
    expected = hf_logits(model, tokens_of())
    error = logits_of(decoder_of(model, dtype=jnp.float16), tokens_of()) - expected
    # float16 keeps 11 bits, eight times as fine as bfloat16.
    assert np.sqrt(np.mean(error**2)) < 0.005 * expected.std()


# What the comparisons above would miss if they were blind: each change of one field must move the logits far more
# than the tolerance.
CHANGES = {
    "rope theta": ("llama", {}, dict(rope_theta=500.0)),
    "linear factor": ("llama", dict(rope_parameters=dict(ROPES["linear"])), dict(rope_scaling=RopeScaling())),
    "llama3 factor": ("llama", dict(rope_parameters=dict(ROPES["llama3"])), dict(rope_scaling=RopeScaling())),
    "yarn factor": ("llama", dict(rope_parameters=dict(ROPES["yarn"])), dict(rope_scaling=RopeScaling())),
    "yarn scale": (
        "llama",
        dict(rope_parameters=dict(ROPES["yarn"])),
        dict(rope_scaling=RopeScaling("yarn", 4.0, 16, attention_factor=1.0)),
    ),
    "yarn truncate": (
        "llama",
        dict(rope_parameters=dict(ROPES["yarn-plain"])),
        dict(rope_scaling=RopeScaling("yarn", 4.0, 48, attention_factor=0.8, beta_fast=8.0)),
    ),
    "window by one": ("mistral", dict(sliding_window=5), dict(windows=(6, 6, 6))),
    "window layer": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
        dict(windows=(4, 4, None)),
    ),
    "norm eps": ("qwen3", {}, dict(norm_eps=1e-2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_logits_are_sensitive_to(change: str):
    family, options, fields = CHANGES[change]
    model = tiny_hf(family, **options)
    right = config_of(model.config)
    logits = logits_of(decoder_of(model, right), tokens_of())
    wrong = logits_of(decoder_of(model, dataclasses.replace(right, **fields)), tokens_of())
    assert np.abs(logits - wrong).max() > 50 * TOLERANCE


def test_dynamic_frequencies_grow_beyond_the_trained_length():
    model = tiny_hf("llama", rope_parameters=dict(ROPES["dynamic"]))
    config = config_of(model.config)
    plain = dataclasses.replace(config, rope_scaling=RopeScaling())
    for length, same in ((64, True), (65, False)):
        stretched = logits_of(decoder_of(model, config), tokens_of(length))
        unstretched = logits_of(decoder_of(model, plain), tokens_of(length))
        # Below the trained length the two compute the same up to rounding.
        assert (np.abs(stretched - unstretched).max() < TOLERANCE) == same
