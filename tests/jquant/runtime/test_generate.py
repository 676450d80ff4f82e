"""Generation equals sampling by hand, stops where it should, and compiles once a bucket."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.models import Decoder, ModelConfig, RopeScaling
from jquant.runtime import Sampling, generate, sample_text_tokens
from jquant.runtime.generate import bucket, compiled_count

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
    windows=(None, 6),
    bos_id=1,
)
PROMPTS = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [40]]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim == 2 else leaf, Decoder(CONFIG, key=jax.random.key(0)))


def greedy_by_hand(model: Decoder, prompt: list[int], count: int) -> list[int]:
    forward = jax.jit(lambda model, tokens: jnp.argmax(model(tokens)[0], axis=-1))
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 40), np.int32)  # causal: what follows the last token does not matter
        padded[0, : len(tokens)] = tokens
        tokens.append(int(forward(model, jnp.asarray(padded))[0, len(tokens) - 1]))
    return tokens[len(prompt) :]


def test_greedy_tokens_equal_those_of_whole_forward_passes(model):
    result = generate(model, PROMPTS, max_new_tokens=14)
    assert result.tokens == [greedy_by_hand(model, prompt, 14) for prompt in PROMPTS]
    assert result.prompt_lengths == [3, 11, 1]
    assert result.stopped == [False] * 3
    assert len(set(result.tokens[0])) > 3, "the model repeats itself too much to be a test"


def test_a_batch_equals_one_prompt_at_a_time(model):
    together = generate(model, PROMPTS, max_new_tokens=14).tokens
    assert together == [generate(model, [prompt], max_new_tokens=14).tokens[0] for prompt in PROMPTS]


def test_the_first_sequence_samples_the_same_with_any_companions(model):
    sampling = Sampling(1.0, top_k=20, top_p=0.95)
    alone = generate(model, PROMPTS[:1], max_new_tokens=14, sampling=sampling, seed=4).tokens[0]
    for companions in ([[3]], [[9, 9, 9], [2] * 13]):
        batch = generate(model, [PROMPTS[0], *companions], max_new_tokens=14, sampling=sampling, seed=4)
        assert batch.tokens[0] == alone
    assert generate(model, PROMPTS[:1], max_new_tokens=14, sampling=sampling, seed=5).tokens[0] != alone


def test_equal_prompts_of_a_batch_sample_differently(model):
    rows = generate(model, [[5]] * 3, max_new_tokens=14, sampling=Sampling(1.0)).tokens
    assert len({tuple(row) for row in rows}) == 3


def test_each_sequence_stops_at_its_own_end_token(model):
    free = generate(model, PROMPTS, max_new_tokens=14).tokens
    stop = free[0][3]
    result = generate(model, PROMPTS, max_new_tokens=14, eos_ids=[stop, 52])
    for row, unstopped, stopped in zip(result.tokens, free, result.stopped, strict=True):
        ends = [unstopped.index(token) for token in (stop, 52) if token in unstopped]
        assert row == (unstopped[: min(ends) + 1] if ends else unstopped)
        assert stopped == bool(ends)
    assert result.stopped[0]


def test_the_loop_ends_when_all_are_done(model):
    first = [row[0] for row in generate(model, PROMPTS, max_new_tokens=1).tokens]
    result = generate(model, PROMPTS, max_new_tokens=14, eos_ids=first)
    assert result.tokens == [[token] for token in first]
    assert result.stopped == [True] * 3


def test_streaming_tells_the_same_tokens_in_order(model):
    told: list[list[int]] = [[], [], []]
    sampling, eos = Sampling(1.0), list(range(10))
    result = generate(
        model, PROMPTS, max_new_tokens=14, sampling=sampling, eos_ids=eos, on_token=lambda i, t: told[i].append(t)
    )
    assert told == result.tokens
    assert told == generate(model, PROMPTS, max_new_tokens=14, sampling=sampling, eos_ids=eos).tokens


def test_a_bucket_compiles_once(model):
    generate(model, PROMPTS, max_new_tokens=14)
    known = compiled_count()
    changed = jax.tree.map(lambda leaf: leaf * 0.9, model)
    requests = [
        dict(prompts=[[1], [2], [3]], max_new_tokens=2),
        dict(prompts=[[1] * 16, [2], [3]], max_new_tokens=16, seed=9),
        dict(prompts=PROMPTS, max_new_tokens=3, sampling=Sampling(0.5, 3, 0.5), eos_ids=[4, 5]),
        dict(prompts=PROMPTS, max_new_tokens=3, on_token=lambda i, t: None),
    ]
    for request in requests:
        result = generate(changed, request.pop("prompts"), **request)
        assert not result.compiled
    assert compiled_count() == known
    assert generate(model, [[1] * 17, [2], [3]], max_new_tokens=2).compiled


def test_half_precision_generates(model):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    assert len(generate(half, PROMPTS, max_new_tokens=5).tokens[1]) == 5


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([[1], []], {}, "prompt 1 is empty.*bos_id=1"),
        ([[1, 53]], {}, r"token ids \[53\] outside the vocabulary of 53"),
        ([[-1]], {}, "outside the vocabulary"),
        ([[1] * 60], dict(max_new_tokens=5), "60 tokens and 5 more would make 65.*64 positions"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens is 0"),
        ([[1]], dict(eos_ids=[53]), "eos_ids"),
        ([[1]], dict(sampling=Sampling(top_p=2.0)), "top_p is 2"),
    ],
)
def test_senseless_requests_are_refused(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **(dict(max_new_tokens=3) | options))


def test_dynamic_scaling_reaches_beyond_the_trained_positions():
    config = dataclasses.replace(CONFIG, max_positions=16, rope_scaling=RopeScaling("dynamic", factor=2.0))
    stretched = Decoder(config, key=jax.random.key(0))
    assert len(generate(stretched, [[1] * 20], max_new_tokens=12).tokens[0]) == 12
    with pytest.raises(ValueError, match="32 positions"):
        generate(stretched, [[1] * 20], max_new_tokens=13)


def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (1, 16, 17, 32, 33, 2048)] == [16, 16, 32, 32, 64, 2048]


def test_sampled_text_has_the_shape_asked_for_whatever_the_batches(model):
    text = sample_text_tokens(model, count=5, length=12, start_ids=[1, 7], seed=3, batch_size=5)
    assert text.shape == (5, 12)
    assert text.dtype == np.int32
    assert text[:, 0].tolist() == [1, 7, 1, 7, 1]
    assert ((text >= 0) & (text < 53)).all()
    np.testing.assert_array_equal(
        text, sample_text_tokens(model, count=5, length=12, start_ids=[1, 7], seed=3, batch_size=2)
    )
    assert (text != sample_text_tokens(model, count=5, length=12, start_ids=[1, 7], seed=4, batch_size=5)).any()


def test_sampling_no_text_is_refused(model):
    with pytest.raises(ValueError, match="start_ids=\\[\\]"):
        sample_text_tokens(model, count=1, length=4, start_ids=[])
