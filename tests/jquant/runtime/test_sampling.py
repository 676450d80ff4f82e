"""Sampling draws from the distribution it promises."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.runtime import Sampling, sample as eager_sample
from jquant.runtime.sampling import kept_tokens

sample = jax.jit(eager_sample)
jitted_kept = jax.jit(kept_tokens)

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
LOGITS = jnp.asarray(np.log(PROBABILITIES) + 3.0, jnp.float32)
DRAWS = 4000


def draw(sampling: Sampling, logits: jax.Array = LOGITS, seed: int = 0) -> np.ndarray:
    """Frequencies [V] of many independent draws."""
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    tokens = sample(keys, jnp.broadcast_to(logits, (DRAWS, len(logits))), sampling)
    assert tokens.dtype == jnp.int32
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / DRAWS


def kept(probabilities, *, top_k: int = 0, top_p: float = 1.0) -> list[int]:
    """Ids of the tokens that remain, the most probable first."""
    logits = jnp.log(jnp.asarray(probabilities, jnp.float32))
    mask = np.asarray(jitted_kept(logits[None], jnp.int32(top_k), jnp.float32(top_p)))[0]
    return [int(i) for i in np.argsort(-np.asarray(probabilities), kind="stable") if mask[i]]


# Five standard deviations of a frequency near 1/2 over 4000 draws.
NOISE = 5 * np.sqrt(0.25 / DRAWS)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_softmax(temperature):
    expected = PROBABILITIES ** (1 / temperature)
    np.testing.assert_allclose(draw(Sampling(temperature)), expected / expected.sum(), atol=NOISE)


def test_top_k_keeps_the_k_best_and_renormalises():
    expected = np.where(PROBABILITIES >= 0.2, PROBABILITIES, 0)
    np.testing.assert_allclose(draw(Sampling(1.0, top_k=3)), expected / expected.sum(), atol=NOISE)
    assert (draw(Sampling(1.0, top_k=3))[[0, 2]] == 0).all()


def test_top_k_beyond_the_vocabulary_keeps_everything():
    np.testing.assert_allclose(draw(Sampling(1.0, top_k=99)), PROBABILITIES, atol=NOISE)


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    expected = np.where(PROBABILITIES >= 0.2, PROBABILITIES, 0)  # 0.4 + 0.25 < 0.7 <= 0.4 + 0.25 + 0.2
    np.testing.assert_allclose(draw(Sampling(1.0, top_p=0.7)), expected / expected.sum(), atol=NOISE)


def test_top_p_counts_the_mass_that_top_k_left():
    # Of the renormalised top 3 (0.47, 0.29, 0.24) the first two hold 0.76.
    assert kept(PROBABILITIES, top_k=3, top_p=0.75) == [1, 3]
    assert kept(PROBABILITIES, top_p=0.75) == [1, 3, 4]


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.3, 0.55, 0.9, 0.999, 1.0])
def test_the_kept_set_is_the_smallest(top_p):
    rng = np.random.default_rng(5)
    for size in (1, 2, 40):
        probabilities = rng.dirichlet(np.full(size, 0.3))
        order = np.argsort(-probabilities)
        chosen = kept(probabilities, top_p=top_p)
        count, descending = len(chosen), probabilities[order]
        assert count >= 1
        assert chosen == order[:count].tolist()
        # 1e-5: the running sum is float32
        assert descending[:count].sum() >= top_p - 1e-5
        assert count == 1 or descending[: count - 1].sum() < top_p + 1e-5


def test_full_mass_keeps_the_whole_tail():
    assert len(kept(np.r_[1.0 - 1e-9, np.full(100, 1e-11)])) == 101


@pytest.mark.parametrize("restriction", [dict(top_k=1), dict(top_p=1e-6)])
def test_the_narrowest_restriction_is_greedy(restriction):
    assert draw(Sampling(1.0, **restriction))[1] == 1.0


def test_zero_temperature_is_greedy_and_the_limit_of_small_ones():
    assert draw(Sampling(0.0))[1] == 1.0
    assert draw(Sampling(0.01))[1] == 1.0
    assert draw(Sampling(1e-37, top_p=0.9))[1] == 1.0
    assert draw(Sampling(0.0, top_k=3, top_p=0.5))[1] == 1.0


def test_ties_widen_neither_top_k_nor_top_p():
    assert kept([0.25] * 4, top_k=2) == [0, 1]
    assert kept([0.25] * 4, top_p=0.6) == [0, 1, 2]
    assert kept([0.1, 0.1, 0.6, 0.1, 0.1], top_k=3) == [2, 0, 1]
    assert kept([0.1, 0.1, 0.6, 0.1, 0.1], top_k=4, top_p=0.7) == [2, 0]


@pytest.mark.parametrize("top_k", [1, 3, 50, 400, 500])
def test_top_k_equals_sorting(top_k):
    logits = np.random.default_rng(top_k).standard_normal(400).astype(np.float32) * 30
    logits[::7] = logits[5]
    logits[:3] = -np.inf
    mask = jitted_kept(jnp.asarray(logits)[None], jnp.int32(top_k), jnp.float32(1))[0]
    expected = np.zeros(400, bool)
    expected[np.argsort(-logits, kind="stable")[:top_k]] = True
    np.testing.assert_array_equal(mask, expected)


def test_a_row_draws_by_its_own_key():
    keys = jax.random.split(jax.random.key(1), 6)
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((6, 50)), jnp.float32)
    for sampling in (Sampling(1.0), Sampling(0.7, 20, 0.9)):
        together = sample(keys, logits, sampling)
        alone = [int(sample(keys[i : i + 1], logits[i : i + 1], sampling)[0]) for i in range(6)]
        assert together.tolist() == alone


def test_other_numbers_compile_nothing():
    compiled: Any = jax.jit(lambda keys, logits, sampling: eager_sample(keys, logits, sampling))
    keys = jax.random.split(jax.random.key(0), 2)
    for sampling in (Sampling(), Sampling(1, 5, 0.5), Sampling(0.3, 0, 1)):
        compiled(keys, jnp.broadcast_to(LOGITS, (2, 5)), sampling.validated())
    assert compiled._cache_size() == 1


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(-1.0), "temperature is -1"),
        (Sampling(float("nan")), "temperature is nan"),
        (Sampling(1.0, top_k=-2), "top_k is -2"),
        (Sampling(1.0, top_p=0.0), "top_p is 0"),
        (Sampling(1.0, top_p=1.5), "top_p is 1.5"),
    ],
)
def test_senseless_numbers_are_refused(sampling, message):
    with pytest.raises(ValueError, match=message):
        sampling.validated()
