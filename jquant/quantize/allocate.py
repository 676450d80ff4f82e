"""Bit allocation: which option (a width, say) each layer gets under one budget of stored bits.

    minimise  sum_l loss_l(o_l)   subject to   sum_l n_l b_l(o_l) <= target * sum_l n_l     over options o_l

L layers, B options: predicted losses [L, B], stored bits per weight b [L, B] (scales, tables, kept entries all
included), entries n [L], target in bits per weight.

It is a multiple-choice knapsack, solved exactly: layer by layer the states (bits spent, loss) that no other
state beats in both are kept, and those that cannot lead to a better end than a known one, by the bound that a price
per bit gives (Lagrange), are dropped. Few survive; beyond STATES they are thinned, still never above the budget.
"""

import numpy as np
from numpy.typing import ArrayLike

STATES = 20_000  # kept after each layer; with hundreds of layers far fewer are ever needed
ROUNDING = 1e-12  # of the budget: sums of the same bits in another order are still the same budget


def allocate(losses: ArrayLike, bits: ArrayLike, weights: ArrayLike, target: float) -> np.ndarray:
    """The option of each layer, int32 [L]; losses and bits [L, B], weights [L], target in bits per weight.

    An infinite loss marks an option that the layer does not have. Among allocations of equal loss a cheaper one is
    preferred. Raises ValueError for shapes or values that make no sense, and for a target outside what the options
    reach: below the cheapest of each layer, or above the sum of each layer's best.
    """
    loss, cost = _checked(losses, bits, weights)
    total = float(np.sum(np.asarray(weights, np.float64)))
    least = np.where(np.isfinite(loss), cost, np.inf).min(axis=1).sum() / total
    best = np.where(loss == loss.min(axis=1, keepdims=True), cost, np.inf).min(axis=1).sum() / total
    slack = 1 + ROUNDING
    if not least <= target * slack or target > best * slack:
        raise ValueError(
            f"a target of {target:g} bits per weight is out of reach: these options span {least:.4f} (the cheapest for "
            f"every layer) to {best:.4f} (the most accurate for every layer); choose a target between"
        )
    return _knapsack(loss, cost, target * total * slack)


def _checked(losses: ArrayLike, bits: ArrayLike, weights: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(loss [L, B], stored bits [L, B]); loss is infinite for options to leave out."""
    loss, b, n = (np.asarray(each, np.float64) for each in (losses, bits, weights))
    if loss.ndim != 2 or not loss.size or b.shape != loss.shape or n.shape != loss.shape[:1]:
        raise ValueError(f"losses {loss.shape} and bits {b.shape} must be [L, B], weights {n.shape} [L]")
    if np.isnan(loss).any() or (loss < 0).any():
        raise ValueError("losses must be at least 0, with infinity for an option that a layer does not have")
    for name, values in (("bits", b), ("weights", n)):
        if not np.all(np.isfinite(values) & (values >= 0)):
            raise ValueError(f"{name} must be finite and at least 0; got {values[~(values >= 0)][:3]} or infinity")
    if not n.sum() > 0:
        raise ValueError("the layers have no entries; expected the number of weights of each layer")
    if none := np.flatnonzero(~np.isfinite(loss).any(axis=1)).tolist():
        raise ValueError(f"layers {none} have no option with a finite loss; give each at least one")
    return loss, n[:, None] * b


def _price(loss: np.ndarray, cost: np.ndarray, budget: float) -> tuple[float, np.ndarray]:
    """(price per bit, allocation [L] within budget): the cheapest price whose minimisers of loss + price cost fit."""
    layers = np.arange(len(loss))

    def choose(price: float) -> np.ndarray:
        value = loss + price * cost
        ties = value <= value.min(axis=1, keepdims=True)
        return np.where(ties, cost, np.inf).argmin(axis=1)

    def fits(choice: np.ndarray) -> bool:
        return bool(cost[layers, choice].sum() <= budget)

    cheapest = np.where(np.isfinite(loss), cost, np.inf)
    cheapest = np.where(cheapest == cheapest.min(axis=1, keepdims=True), loss, np.inf).argmin(axis=1)
    if fits(choose(0.0)):
        return 0.0, choose(0.0)
    spread = np.where(np.isfinite(loss), loss, 0.0).max() or 1.0
    low, high = 0.0, spread / max(float(cost.max()), 1e-300)
    for _ in range(200):
        if fits(choose(high)):
            break
        low, high = high, 4 * high
    else:
        return low, cheapest
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if fits(choose(middle)) else (middle, high)
    return high, choose(high)


def _knapsack(loss: np.ndarray, cost: np.ndarray, budget: float) -> np.ndarray:
    layers = np.arange(len(loss))
    price, known = _price(loss, cost, budget)
    known = _spend_rest(loss, cost, budget, known)
    limit = loss[layers, known].sum()
    # The rest of the layers cannot do better than this, less the price of the bits still unspent.
    rest = (loss + price * cost).min(axis=1)
    rest = np.concatenate([np.cumsum(rest[::-1])[::-1][1:], [0.0]])
    least = np.where(np.isfinite(loss), cost, np.inf).min(axis=1)
    least = np.concatenate([np.cumsum(least[::-1])[::-1][1:], [0.0]])

    spent, lost = np.zeros(1), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for layer in layers:
        options = np.flatnonzero(np.isfinite(loss[layer]))
        new_spent = (spent[:, None] + cost[layer, options]).ravel()
        new_lost = (lost[:, None] + loss[layer, options]).ravel()
        bound = new_lost + rest[layer] - price * (budget - new_spent)
        # Sums in different orders differ in their last digits; the known allocation itself must survive them.
        hopeful = (new_spent + least[layer] <= budget * (1 + ROUNDING)) & (bound <= limit * (1 + 1e-9))
        place = np.flatnonzero(hopeful)
        place = place[np.lexsort((new_lost[place], new_spent[place]))]
        # Ascending in bits spent: a state stands if it loses less than every cheaper one.
        before = np.concatenate([[np.inf], np.minimum.accumulate(new_lost[place])[:-1]])
        place = place[new_lost[place] < before]
        if len(place) > STATES:
            bucket = (new_spent[place] - new_spent[place[0]]) * (STATES / np.ptp(new_spent[place]))
            place = place[np.append(np.diff(np.floor(bucket)) > 0, True)]  # the best of each bucket is its last
        history.append((place // len(options), options[place % len(options)]))
        spent, lost = new_spent[place], new_lost[place]
        if not len(place):
            return known.astype(np.int32)
    found, state = np.zeros(len(loss), np.int32), int(np.argmin(lost))
    for layer in layers[::-1]:
        parent, option = history[layer]
        found[layer], state = option[state], parent[state]
    better = loss[layers, found].sum() <= limit and cost[layers, found].sum() <= budget
    return found if better else known.astype(np.int32)


def _spend_rest(loss: np.ndarray, cost: np.ndarray, budget: float, choice: np.ndarray) -> np.ndarray:
    """The allocation with single changes that still fit, the greatest fall of the loss first."""
    layers, choice = np.arange(len(loss)), choice.copy()
    while True:
        free = budget - cost[layers, choice].sum()
        fall = np.where(cost - cost[layers, choice][:, None] <= free, loss[layers, choice][:, None] - loss, 0.0)
        layer, option = np.unravel_index(int(fall.argmax()), fall.shape)
        if not fall[layer, option] > 0:
            return choice
        choice[layer] = option
