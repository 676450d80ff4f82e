"""Perplexity follows its protocol to the last target."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.models import Decoder, ModelConfig
from jquant.runtime import cut_windows, perplexity
from jquant.runtime.evaluate import _window_loss

CONFIG = ModelConfig(
    family="llama",
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    windows=(None, None),
)
TEXT = np.random.default_rng(0).integers(0, 53, 100)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return jax.tree.map(lambda leaf: leaf * 6 if leaf.ndim == 2 else leaf, Decoder(CONFIG, key=jax.random.key(0)))


def programs(function: Any) -> int:
    """How many programs a jitted function has compiled."""
    return function._cache_size()


def direct(model: Decoder, windows: np.ndarray) -> float:
    """The definition in float64, from whole logits."""
    forward, losses = jax.jit(lambda model, tokens: model(tokens)[0]), []
    for window in windows:
        logits = np.asarray(forward(model, jnp.asarray(window[None], jnp.int32)), np.float64)[0, :-1]
        chosen = np.take_along_axis(logits, window[1:, None], axis=-1)[:, 0]
        losses.append(np.mean(np.log(np.exp(logits).sum(-1)) - chosen))
    return float(np.exp(np.mean(losses)))


@pytest.mark.parametrize(("seq_len", "windows"), [(32, 3), (50, 2), (64, 1), (2, 50)])
def test_perplexity_equals_the_definition(model, seq_len, windows):
    result = perplexity(model, TEXT, seq_len=seq_len)
    expected = direct(model, TEXT[: windows * seq_len].reshape(windows, seq_len))
    # float32 losses
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert (result.windows, result.tokens, result.seq_len) == (windows, windows * (seq_len - 1), seq_len)
    assert result.seconds > 0


def test_a_begin_token_stands_in_front_of_every_window(model):
    result = perplexity(model, TEXT, seq_len=21, bos_id=1)
    windows = np.concatenate([np.ones((5, 1), int), TEXT.reshape(5, 20)], axis=1)
    assert result.perplexity == pytest.approx(direct(model, windows), rel=1e-5)
    assert result.tokens == 5 * 20


def test_max_windows_takes_the_first_ones_and_progress_is_told(model):
    told = []
    result = perplexity(model, TEXT, seq_len=20, max_windows=2, progress=lambda done, all: told.append((done, all)))
    assert result.perplexity == pytest.approx(direct(model, TEXT[:40].reshape(2, 20)), rel=1e-5)
    assert told == [(1, 2), (2, 2)]


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    assert perplexity(Decoder(CONFIG), TEXT, seq_len=25).perplexity == pytest.approx(53, rel=1e-6)


def test_other_texts_and_weights_compile_nothing(model):
    perplexity(model, TEXT, seq_len=30)
    known = programs(_window_loss)
    perplexity(jax.tree.map(lambda leaf: leaf * 2, model), TEXT[::-1], seq_len=30)
    assert programs(_window_loss) == known


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (TEXT[:31], dict(seq_len=32), "31 tokens, less than one window of 32"),
        (TEXT, dict(seq_len=65), "seq_len is 65, but the model has 64 positions"),
        (TEXT, dict(seq_len=1), "at least 2 tokens"),
        (TEXT, dict(seq_len=32, max_windows=0), "max_windows is 0"),
        (TEXT + 1, dict(seq_len=32), "outside the vocabulary of 53"),
        (TEXT[None], dict(seq_len=32), r"shape \(1, 100\)"),
        (TEXT / 2, dict(seq_len=32), "integers"),
    ],
)
def test_senseless_texts_are_refused(model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, tokens, **options)


def test_windows_drop_the_tail():
    np.testing.assert_array_equal(cut_windows(np.arange(7), 3), [[0, 1, 2], [3, 4, 5]])
