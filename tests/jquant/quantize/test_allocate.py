"""Bit allocation: against every allocation there is, and against a fine dynamic programme."""

import itertools

import numpy as np
import pytest

from jquant.quantize import allocate as module
from jquant.quantize.allocate import allocate


def problem(layers, options, seed=0):
    """(losses [L, B], bits [L, B], weights [L]) with four times less error for every bit, or nearly."""
    rng = np.random.default_rng(seed)
    bits = np.sort(rng.choice([2.0, 2.25, 3.0, 3.17, 4.0, 4.25, 5.0, 6.0, 8.0], (layers, options)), axis=1)
    errors = 4.0**-bits * np.exp(0.3 * rng.normal(size=(layers, options)))
    return errors * np.exp(1.5 * rng.normal(size=(layers, 1))), bits, rng.choice([64.0, 128.0, 320.0, 1000.0], layers)


def spent(bits, weights, choice):
    return float((bits[np.arange(len(choice)), choice] * weights).sum() / weights.sum())


def lost(losses, choice):
    return float(losses[np.arange(len(choice)), choice].sum())


def reach(losses, bits, weights):
    """Bits per weight with every layer at its cheapest, and at its most accurate."""
    return spent(bits, weights, bits.argmin(axis=1)), spent(bits, weights, losses.argmin(axis=1))


def brute_force(losses, bits, weights, target):
    choices = np.asarray(list(itertools.product(range(losses.shape[1]), repeat=len(losses))))
    layers = np.arange(len(losses))
    cost = (bits[layers, choices] * weights).sum(axis=1)
    loss = losses[layers, choices].sum(axis=1)
    return loss[cost <= target * weights.sum() * (1 + 1e-12)].min()


@pytest.mark.parametrize("seed", range(6))
def test_no_allocation_is_better(seed):
    layers, options = [(6, 4), (7, 3), (9, 3), (5, 5), (8, 3), (11, 2)][seed]
    losses, bits, weights = problem(layers, options, seed)
    low, high = reach(losses, bits, weights)
    for share in (0.0, 0.03, 0.2, 0.35, 0.5, 0.66, 0.9, 1.0):
        target = low + share * (high - low)
        choice = allocate(losses, bits, weights, target)
        assert choice.dtype == np.int32 and spent(bits, weights, choice) <= target * (1 + 1e-9)
        best = brute_force(losses, bits, weights, target)
        assert lost(losses, choice) <= best * (1 + 1e-9)


def fine_programme(losses, cost, budget):
    """The least loss for costs that are small integers, by a table over every budget."""
    best = np.zeros(budget + 1)
    for layer, c in zip(losses, cost, strict=True):
        rows = []
        for loss, price in zip(layer, c, strict=True):
            row = np.full(budget + 1, np.inf)
            row[price:] = best[: budget + 1 - price] + loss
            rows.append(row)
        best = np.min(rows, axis=0)
    return best[budget]


@pytest.mark.parametrize("states", [20_000, 50])
def test_a_whole_model_is_exact_or_nearly(states, monkeypatch):
    monkeypatch.setattr(module, "STATES", states)
    rng = np.random.default_rng(1)
    bits = np.tile(np.asarray([2.0, 3.0, 4.0, 5.0, 8.0]), (210, 1))
    losses = 4.0**-bits * np.exp(0.2 * rng.normal(size=bits.shape)) * np.exp(1.5 * rng.normal(size=(210, 1)))
    weights = np.tile([3.0, 1.0, 1.0, 3.0, 8.0, 8.0, 8.0], 30)
    cost = (bits * weights[:, None]).astype(int)
    for target in (2.5, 3.25, 4.5):
        choice = allocate(losses, bits, weights, target)
        assert spent(bits, weights, choice) <= target * (1 + 1e-9)
        best = fine_programme(losses, cost, int(target * weights.sum()))
        # thinned to 50 states it is no longer exact, and still close
        assert lost(losses, choice) <= best * (1 + (1e-9 if states > 50 else 1e-3))
        uniform = lost(losses, np.full(210, int(target) - 2))
        assert lost(losses, choice) < 0.8 * uniform


def test_sensitive_layers_get_the_bits():
    bits = np.tile([2.0, 4.0, 8.0], (4, 1))
    errors = 4.0**-bits
    np.testing.assert_array_equal(
        allocate(errors * np.array([[1000], [1], [1], [1]]), bits, [1, 1, 1, 1], 3.5), [2, 0, 0, 0]
    )
    np.testing.assert_array_equal(allocate(errors, bits, [1, 1, 1, 1], 4.0), [1, 1, 1, 1])
    # a layer that matters nothing takes the cheapest
    np.testing.assert_array_equal(
        allocate(errors * np.array([[0], [1], [1], [1]]), bits, [1, 1, 1, 1], 6.5), [0, 2, 2, 2]
    )


def test_options_without_merit_are_never_chosen():
    errors = np.asarray([[0.1, 0.2, 0.01], [0.1, np.inf, 0.02]])
    bits = np.asarray([[3.0, 4.0, 5.0], [3.0, 1.0, 5.0]])
    for target in (3.0, 3.5, 4.0, 4.5, 5.0):
        choice = allocate(errors, bits, [10, 10], target)
        assert 1 not in choice.tolist()
    # the same budget as the options', in a sum that rounds
    assert (allocate(np.full((30, 1), 0.5), np.full((30, 1), 3.1), np.full(30, 0.7e9), 3.1) == 0).all()


def test_unreachable_targets_name_the_reach():
    losses, bits, weights = problem(5, 3, seed=8)
    low, high = reach(losses, bits, weights)
    for target in (low - 0.01, high + 0.01, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"{low:.4f} .* to {high:.4f}"):
            allocate(losses, bits, weights, target)


def test_bad_arguments_say_what_was_expected():
    losses, bits, weights = problem(3, 2)
    for bad, message in (
        ((losses, bits, weights[:2]), "must be"),
        ((-losses, bits, weights), "at least 0"),
        ((losses * np.nan, bits, weights), "at least 0"),
        ((losses + np.inf, bits, weights), r"layers \[0, 1, 2\]"),
        ((losses, bits * np.inf, weights), "bits must be finite"),
        ((losses, bits, 0 * weights), "no entries"),
    ):
        with pytest.raises(ValueError, match=message):
            allocate(*bad, 3.0)
