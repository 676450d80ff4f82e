"""Bit allocation: against every allocation there is, against a fine dynamic programme, and its estimates of slopes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.quantize import allocate as module
from jquant.quantize.allocate import allocate, fisher_error, noise_like, relative_error, slopes_from_losses


def problem(layers, options, seed=0):
    """(errors [L, B], slopes [L], bits [L, B], weights [L]) with four times less error for every bit, or nearly."""
    rng = np.random.default_rng(seed)
    bits = np.sort(rng.choice([2.0, 2.25, 3.0, 3.17, 4.0, 4.25, 5.0, 6.0, 8.0], (layers, options)), axis=1)
    errors = 4.0**-bits * np.exp(0.3 * rng.normal(size=(layers, options)))
    return errors, np.exp(1.5 * rng.normal(size=layers)), bits, rng.choice([64.0, 128.0, 320.0, 1000.0], layers)


def spent(bits, weights, choice):
    return float((bits[np.arange(len(choice)), choice] * weights).sum() / weights.sum())


def lost(errors, slopes, choice):
    return float((errors[np.arange(len(choice)), choice] * slopes).sum())


def reach(errors, bits, weights):
    """Bits per weight with every layer at its cheapest, and at its most accurate."""
    return spent(bits, weights, bits.argmin(axis=1)), spent(bits, weights, errors.argmin(axis=1))


def brute_force(errors, slopes, bits, weights, target):
    choices = np.asarray(list(itertools.product(range(errors.shape[1]), repeat=len(errors))))
    layers = np.arange(len(errors))
    cost = (bits[layers, choices] * weights).sum(axis=1)
    loss = (errors[layers, choices] * slopes).sum(axis=1)
    return loss[cost <= target * weights.sum() * (1 + 1e-12)].min()


@pytest.mark.parametrize("seed", range(6))
def test_no_allocation_is_better(seed):
    layers, options = [(6, 4), (7, 3), (9, 3), (5, 5), (8, 3), (11, 2)][seed]
    errors, slopes, bits, weights = problem(layers, options, seed)
    low, high = reach(errors, bits, weights)
    for share in (0.0, 0.03, 0.2, 0.35, 0.5, 0.66, 0.9, 1.0):
        target = low + share * (high - low)
        choice = allocate(errors, slopes, bits, weights, target)
        assert choice.dtype == np.int32 and spent(bits, weights, choice) <= target * (1 + 1e-9)
        best = brute_force(errors, slopes, bits, weights, target)
        assert lost(errors, slopes, choice) <= best * (1 + 1e-9)


def fine_programme(errors, slopes, cost, budget):
    """The least loss for costs that are small integers, by a table over every budget."""
    best = np.zeros(budget + 1)
    for e, a, c in zip(errors, slopes, cost, strict=True):
        rows = []
        for error, price in zip(e, c, strict=True):
            row = np.full(budget + 1, np.inf)
            row[price:] = best[: budget + 1 - price] + a * error
            rows.append(row)
        best = np.min(rows, axis=0)
    return best[budget]


@pytest.mark.parametrize("states", [20_000, 50])
def test_a_whole_model_is_exact_or_nearly(states, monkeypatch):
    monkeypatch.setattr(module, "STATES", states)
    rng = np.random.default_rng(1)
    bits = np.tile(np.asarray([2.0, 3.0, 4.0, 5.0, 8.0]), (210, 1))
    errors = 4.0**-bits * np.exp(0.2 * rng.normal(size=bits.shape))
    slopes, weights = np.exp(1.5 * rng.normal(size=210)), np.tile([3.0, 1.0, 1.0, 3.0, 8.0, 8.0, 8.0], 30)
    cost = (bits * weights[:, None]).astype(int)
    for target in (2.5, 3.25, 4.5):
        choice = allocate(errors, slopes, bits, weights, target)
        assert spent(bits, weights, choice) <= target * (1 + 1e-9)
        best = fine_programme(errors, slopes, cost, int(target * weights.sum()))
        # thinned to 50 states it is no longer exact, and still close
        assert lost(errors, slopes, choice) <= best * (1 + (1e-9 if states > 50 else 1e-3))
        uniform = lost(errors, slopes, np.full(210, int(target) - 2))
        assert lost(errors, slopes, choice) < 0.8 * uniform


def test_sensitive_layers_get_the_bits():
    bits = np.tile([2.0, 4.0, 8.0], (4, 1))
    errors = 4.0**-bits
    np.testing.assert_array_equal(allocate(errors, [1000, 1, 1, 1], bits, [1, 1, 1, 1], 3.5), [2, 0, 0, 0])
    np.testing.assert_array_equal(allocate(errors, [1, 1, 1, 1], bits, [1, 1, 1, 1], 4.0), [1, 1, 1, 1])
    # a layer that matters nothing takes the cheapest
    np.testing.assert_array_equal(allocate(errors, [0, 1, 1, 1], bits, [1, 1, 1, 1], 6.5), [0, 2, 2, 2])


def test_options_without_merit_are_never_chosen():
    errors = np.asarray([[0.1, 0.2, 0.01], [0.1, np.inf, 0.02]])
    bits = np.asarray([[3.0, 4.0, 5.0], [3.0, 1.0, 5.0]])
    for target in (3.0, 3.5, 4.0, 4.5, 5.0):
        choice = allocate(errors, [1.0, 1.0], bits, [10, 10], target)
        assert 1 not in choice.tolist()
    # the same budget as the options', in a sum that rounds
    assert (allocate(np.full((30, 1), 0.5), np.ones(30), np.full((30, 1), 3.1), np.full(30, 0.7e9), 3.1) == 0).all()


def test_unreachable_targets_name_the_reach():
    errors, slopes, bits, weights = problem(5, 3, seed=8)
    low, high = reach(errors, bits, weights)
    for target in (low - 0.01, high + 0.01, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"{low:.4f} .* to {high:.4f}"):
            allocate(errors, slopes, bits, weights, target)


def test_bad_arguments_say_what_was_expected():
    errors, slopes, bits, weights = problem(3, 2)
    for bad, message in (
        ((errors, slopes[:2], bits, weights), "must be"),
        ((-errors, slopes, bits, weights), "at least 0"),
        ((errors * np.nan, slopes, bits, weights), "at least 0"),
        ((errors + np.inf, slopes, bits, weights), r"layers \[0, 1, 2\]"),
        ((errors, -slopes, bits, weights), "slopes must be finite"),
        ((errors, slopes, bits * np.inf, weights), "bits must be finite"),
        ((errors, slopes, bits, 0 * weights), "no entries"),
    ):
        with pytest.raises(ValueError, match=message):
            allocate(*bad, 3.0)
    with pytest.raises(ValueError, match="positive values of t2"):
        slopes_from_losses([0.0, 0.1], np.ones((3, 2)), 1.0)
    with pytest.raises(ValueError, match="without noise"):
        slopes_from_losses([0.1], np.ones((3, 1)), np.nan)


def test_slopes_are_recovered_from_noisy_losses():
    rng = np.random.default_rng(0)
    true, t2 = np.exp(rng.normal(size=40)), np.asarray([0.005, 0.01, 0.02])
    exact = slopes_from_losses(t2, 2.0 + true[:, None] * t2, 2.0)
    np.testing.assert_allclose(exact.values, true, rtol=1e-9)
    assert exact.reason is None
    noisy = slopes_from_losses(t2, 2.0 + true[:, None] * t2 + 1e-4 * rng.normal(size=(40, 3)), 2.0)
    # the scatter of a fit through the origin: sigma / |t2|
    np.testing.assert_allclose(noisy.values, true, atol=4 * 1e-4 / float(np.linalg.norm(t2)))


def test_useless_losses_get_a_defined_slope_and_a_reason():
    t2 = np.asarray([0.01, 0.02])
    losses = 2.0 + np.asarray([1.0, 2.0, 3.0, -1.0, 0.0])[:, None] * t2
    found = slopes_from_losses(t2, losses, 2.0)
    np.testing.assert_allclose(found.values, [1, 2, 3, 0.02, 0.02], rtol=1e-9)
    assert found.reason is not None and "2 slopes were lost" in found.reason
    losses[1, 1], losses[2] = np.nan, np.inf
    found = slopes_from_losses(t2, losses, 2.0)
    np.testing.assert_allclose(found.values[:3], [1, 2, 2], rtol=1e-9)
    assert found.reason is not None and "1 layers had no finite loss" in found.reason
    flat = slopes_from_losses(t2, np.full((3, 2), 2.0), 2.0)
    np.testing.assert_array_equal(flat.values, 1.0)
    assert flat.reason is not None and "no layer's loss rose" in flat.reason


def test_noise_has_the_energy_asked_for(key):
    W = 0.02 * jax.random.normal(key, (48, 64))
    for scale in (1.0, 1e-20, 1e20):
        noise = noise_like(scale * W, 0.01, jax.random.key(1))
        np.testing.assert_allclose(relative_error(scale * W, scale * W + noise), 0.01, rtol=1e-3)
    assert abs(float(jnp.mean(noise)) / float(jnp.std(noise))) < 0.1
    assert noise_like(W.astype(jnp.bfloat16), 0.01, key).dtype == jnp.bfloat16
    np.testing.assert_array_equal(noise_like(jnp.zeros((48, 64)), 0.01, key), 0)
    assert float(relative_error(jnp.zeros((48, 64)), W)) == 0


def test_loss_of_a_quadratic_rises_as_predicted(key):
    """Where the loss is a quadratic, 1/2 sum F d^2 is its rise, and slopes of injected noise give the same total."""
    keys = jax.random.split(key, 3)
    W, F = jax.random.normal(keys[0], (48, 64)), jnp.exp(jax.random.normal(keys[1], (48, 64)))
    W_hat = jnp.round(2 * W) / 2
    rise = 0.5 * np.sum(np.asarray(F, np.float64) * np.asarray(W - W_hat, np.float64) ** 2)
    np.testing.assert_allclose(fisher_error(F, W, W_hat), rise, rtol=1e-5)
    np.testing.assert_allclose(fisher_error(F.at[0, 0].set(jnp.nan).at[1, 1].set(-5), W, W_hat), rise, rtol=1e-2)
    t2 = [0.005, 0.01]
    losses = [[3.0 + float(fisher_error(F, W, W + noise_like(W, t, keys[2]))) for t in t2]]
    slope = slopes_from_losses(t2, losses, 3.0).values[0]
    # the error of rounding is as good as random here; 3072 entries average its weights
    np.testing.assert_allclose(slope * float(relative_error(W, W_hat)), rise, rtol=0.1)
