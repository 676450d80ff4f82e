"""Perplexity follows its protocol to the last target, and a comparison is what float64 makes of whole logits."""

import dataclasses
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.format import tree as trees
from jquant.format.weights import QuantizedLinear, codebook_weight, sparse_residual, with_rows
from jquant.models import Decoder, ModelConfig
from jquant.runtime import compare, cut_windows, evaluate, perplexity, reference_states

CONFIG = ModelConfig(
    family="llama",
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    windows=(None, None, 8),
)
TEXT = np.random.default_rng(0).integers(0, 53, 100)


def random_model(seed: int) -> Decoder:
    """Weights so large that the logits are far from uniform."""
    return jax.tree.map(lambda leaf: leaf * 6 if leaf.ndim == 2 else leaf, Decoder(CONFIG, key=jax.random.key(seed)))


@pytest.fixture(scope="module")
def model() -> Decoder:
    return random_model(0)


@pytest.fixture(scope="module")
def sparse_model(model) -> Decoder:
    """Codebooks with residuals of another length in every layer."""
    generator = np.random.default_rng(1)

    def pack(index: int, leaf: Any) -> QuantizedLinear:
        table = jnp.asarray(np.quantile(np.asarray(leaf), np.linspace(0.05, 0.95, 8)).astype(np.float32))
        codes = jnp.argmin(jnp.abs(leaf[..., None] - table), axis=-1).astype(jnp.uint8)
        base = codebook_weight(codes, jnp.broadcast_to(table, (leaf.shape[0], 8)), 3)
        mask = jnp.asarray(generator.random(leaf.shape) < 0.005 * index)
        return QuantizedLinear(base, residual=with_rows(sparse_residual(mask, leaf - table[codes])))

    linears = trees.select(model, lambda path, leaf: path.endswith("_proj.weight"))
    return trees.replace(model, {path: pack(index, leaf) for index, (path, leaf) in enumerate(linears.items())})


def programs(function: Any) -> int:
    """How many programs a jitted function has compiled."""
    return function._cache_size()


def logits(model: Decoder, window: np.ndarray) -> np.ndarray:
    """Of every target's position, float64 [T - 1, V]."""
    return np.asarray(_forward(model, jnp.asarray(window[None], jnp.int32)), np.float64)[0, :-1]


_forward = jax.jit(lambda model, tokens: model(tokens)[0])


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def direct(model: Decoder, windows: np.ndarray) -> float:
    """The definition in float64, from whole logits."""
    losses = []
    for window in windows:
        chosen = np.take_along_axis(log_softmax(logits(model, window)), window[1:, None], axis=-1)
        losses.append(-np.mean(chosen))
    return float(np.exp(np.mean(losses)))


@pytest.mark.parametrize(("seq_len", "windows"), [(32, 3), (50, 2), (64, 1), (2, 50)])
def test_perplexity_equals_the_definition(model, seq_len, windows):
    result = perplexity(model, TEXT, seq_len=seq_len)
    expected = direct(model, TEXT[: windows * seq_len].reshape(windows, seq_len))
    # float32 losses
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert (result.windows, result.tokens, result.seq_len) == (windows, windows * (seq_len - 1), seq_len)
    assert len(result.losses) == windows and np.exp(np.mean(result.losses)) == pytest.approx(expected, rel=1e-5)
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


def test_equal_blocks_share_a_program_and_other_texts_compile_nothing(model):
    before = programs(evaluate._run_block)
    perplexity(model, TEXT, seq_len=30)
    known = programs(evaluate._run_block)
    assert known - before == 2  # full attention, and a window of 8
    perplexity(jax.tree.map(lambda leaf: leaf * 2, model), TEXT[::-1], seq_len=30)
    assert programs(evaluate._run_block) == known


def test_residuals_of_any_length_share_a_program(sparse_model):
    before = programs(evaluate._run_block)
    # 3 tokens add the entries to the product, more of them to the decoded matrix
    for seq_len, windows in ((32, 3), (3, 2)):
        result = perplexity(sparse_model, TEXT, seq_len=seq_len, max_windows=windows)
        expected = direct(sparse_model, TEXT[: windows * seq_len].reshape(windows, seq_len))
        assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert programs(evaluate._run_block) - before == 4  # two kinds of block, two lengths


def test_comparison_equals_the_definition(model, sparse_model):
    told = []
    result = compare(sparse_model, model, TEXT, seq_len=32, progress=lambda done, all: told.append((done, all)))
    windows = TEXT[:96].reshape(3, 32)
    log_p, log_q = (log_softmax(np.stack([logits(m, window) for window in windows])) for m in (sparse_model, model))
    # float32 log-probabilities of size 10 have an error of 1e-6, which enters at every entry
    assert result.kl == pytest.approx(np.sum(np.exp(log_q) * (log_q - log_p), axis=-1).mean(), rel=1e-5)
    assert result.top1 == pytest.approx(np.mean(log_p.argmax(-1) == log_q.argmax(-1)), abs=1e-7)
    assert result.perplexity == pytest.approx(direct(sparse_model, windows), rel=1e-5)
    assert result.reference_perplexity == pytest.approx(direct(model, windows), rel=1e-5)
    assert (result.windows, result.tokens, result.seq_len, len(result.losses)) == (3, 93, 32, 3)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert 0.01 < result.kl and 0.0 < result.top1 < 1.0, "the two models differ, or nothing was tested"


def test_a_model_does_not_differ_from_itself(model):
    result = compare(model, model, TEXT, seq_len=32)
    assert abs(result.kl) <= 1e-6 and result.top1 == 1.0
    assert result.perplexity == result.reference_perplexity


def test_rows_of_every_chunk_count_once(model, monkeypatch):
    """Chunks of 256 rows are longer than the tiny model's texts; 31 rows in chunks of 7 leave 3 over."""
    other = random_model(1)
    whole, compare_window = compare(other, model, TEXT, seq_len=32, max_windows=1), evaluate._compare_window
    monkeypatch.setattr(evaluate, "CHUNK_ROWS", 7)
    # a new function, because a traced one keeps the chunk length it was traced with
    monkeypatch.setattr(evaluate, "_compare_window", jax.jit(lambda *args: inspect.unwrap(compare_window)(*args)))
    cut = compare(other, model, TEXT, seq_len=32, max_windows=1)
    # sums in another order
    assert cut.kl == pytest.approx(whole.kl, rel=1e-5) and cut.top1 == pytest.approx(whole.top1, abs=1e-7)
    assert cut.perplexity == pytest.approx(whole.perplexity, rel=1e-5)


def test_states_kept_from_a_reference_give_the_same_numbers(model, sparse_model):
    states = reference_states(model, TEXT, seq_len=32)
    for windows in (3, 2):
        kept = compare(sparse_model, states, TEXT, seq_len=32, max_windows=windows)
        live = compare(sparse_model, model, TEXT, seq_len=32, max_windows=windows)
        assert dataclasses.replace(kept, seconds=0.0) == dataclasses.replace(live, seconds=0.0)
    for text, seq_len in ((TEXT[::-1], 32), (TEXT, 16)):
        with pytest.raises(ValueError, match="the same text and options"):
            compare(sparse_model, states, text, seq_len=seq_len)


def test_broken_logits_leave_the_divergence_finite(model):
    def scaled(factor: float) -> Decoder:
        weight = trees.leaves(model)["lm_head.weight"]
        return trees.replace(model, {"lm_head.weight": weight.at[3].multiply(factor)})

    for factor in (math.inf, math.nan, 1e30):
        broken = scaled(factor)
        for pair in ((broken, model), (model, broken), (broken, broken)):
            result = compare(*pair, TEXT, seq_len=20, max_windows=1)
            assert math.isfinite(result.kl) and 0.0 <= result.top1 <= 1.0
    assert perplexity(scaled(1e30), TEXT, seq_len=20).perplexity == math.inf


def test_models_of_other_vocabularies_are_refused(model):
    smaller = Decoder(dataclasses.replace(CONFIG, vocab_size=50))
    with pytest.raises(ValueError, match="predicts 50 tokens, its reference 53"):
        compare(smaller, model, TEXT % 50, seq_len=32)


@pytest.mark.parametrize("call", [perplexity, reference_states, lambda m, *a, **k: compare(m, m, *a, **k)])
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
def test_senseless_texts_are_refused(model, call, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        call(model, tokens, **options)


def test_windows_drop_the_tail():
    np.testing.assert_array_equal(cut_windows(np.arange(7), 3), [[0, 1, 2], [3, 4, 5]])
