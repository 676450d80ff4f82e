"""Bit allocation: which option (width, group size, ...) each layer gets under one budget of stored bits.

    minimise  sum_l a_l e_l(o_l)   subject to   sum_l n_l b_l(o_l) <= target * sum_l n_l     over options o_l

L layers, B options: errors e [L, B], slopes a [L], stored bits per weight b [L, B] (scales, tables, kept entries all
included), entries n [L], target in bits per weight. Two ways to fill in a and e:

- t2 with measured slopes. For weight error that is small and random, the loss rises by a_l t_l^2, where
  t_l^2 = |W - W_hat|^2 / |W|^2 and a_l belongs to the layer alone (linearity theorem, HIGGS, arXiv 2411.17525). Replace
  W by W + noise of a known t2 (`noise_like`), one layer at a time, measure the loss, fit the slope
  (`slopes_from_losses`). No calibration data is needed beyond a text to measure on. The error of GPTQ or LNQ is not
  random: it hides where inputs are quiet, and t2 rises while the loss falls. Rank their options by the t2 of plain
  rounding, or by the second way.
- A predicted rise of the loss itself, slope 1. For errors of independent entries, such as those of rounding to the
  nearest or of a codebook fitted by k-means, `fisher_error` = 1/2 sum F (w - w_hat)^2. With errors that compensate
  each other use half of the objective they were found by, with a loss-weighted Hessian: 1/2 e^T H e. Fisher values of
  sequence means are too small by the sequence length; a factor common to all layers changes no allocation.

The allocation is a multiple-choice knapsack, solved exactly: layer by layer the states (bits spent, loss) that no other
state beats in both are kept, and those that cannot lead to a better end than a known one, by the bound that a price
per bit gives (Lagrange), are dropped. Few survive; beyond STATES they are thinned, still never above the budget.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

STATES = 20_000  # kept after each layer; with hundreds of layers far fewer are ever needed
ROUNDING = 1e-12  # of the budget: sums of the same bits in another order are still the same budget
FLOOR = 0.01  # of the median slope


class Slopes(NamedTuple):
    """values [L] float64, positive; reason: why some of them are not the fitted ones, or None."""

    values: np.ndarray
    reason: str | None


def allocate(errors: ArrayLike, slopes: ArrayLike, bits: ArrayLike, weights: ArrayLike, target: float) -> np.ndarray:
    """The option of each layer, int32 [L]; errors and bits [L, B], slopes and weights [L], target in bits per weight.

    An infinite error marks an option that the layer does not have. Among allocations of equal loss a cheaper one is
    preferred. Raises ValueError for shapes or values that make no sense, and for a target outside what the options
    reach: below the cheapest of each layer, or above the sum of each layer's best.
    """
    loss, cost = _checked(errors, slopes, bits, weights)
    total = float(np.sum(np.asarray(weights, np.float64)))
    usable = np.isfinite(loss)
    least = np.where(usable, cost, np.inf).min(axis=1).sum() / total
    e = np.asarray(errors, np.float64)
    best = np.where(e == e.min(axis=1, keepdims=True), cost, np.inf).min(axis=1).sum() / total
    slack = 1 + ROUNDING
    if not least <= target * slack or target > best * slack:
        raise ValueError(
            f"a target of {target:g} bits per weight is out of reach: these options span {least:.4f} (the cheapest for "
            f"every layer) to {best:.4f} (the most accurate for every layer); choose a target between"
        )
    return _knapsack(loss, cost, target * total * slack)


def slopes_from_losses(t2: ArrayLike, losses: ArrayLike, clean: float) -> Slopes:
    """Slopes a_l of losses [L, T] = clean + a_l t2, where layer l alone carries noise of relative energy t2 [T].

    Least squares through the origin. A slope below FLOOR of the median, negative ones included, is measurement noise
    and is raised to that: no layer is ever free. Losses that are not finite are left out; a layer with no other gets
    the largest slope. With no positive slope at all, all become 1. Raises ValueError for shapes that disagree.
    """
    t, y = np.asarray(t2, np.float64), np.asarray(losses, np.float64)
    if t.ndim != 1 or y.ndim != 2 or y.shape[1:] != t.shape or not t.size or not np.all(np.isfinite(t) & (t > 0)):
        raise ValueError(f"losses {y.shape} must be [L, T] for T positive values of t2, got t2 of shape {t.shape}")
    if not np.isfinite(clean):
        raise ValueError(f"the loss without noise is {clean}; expected a finite number: check the model and the text")
    seen = np.isfinite(y)
    rise = np.where(seen, y, clean) - clean
    power = (seen * t**2).sum(axis=1)
    slope = (rise * t).sum(axis=1) / np.where(power > 0, power, 1.0)
    lost = power == 0
    positive = slope[~lost & (slope > 0)]
    if not positive.size:
        return Slopes(np.ones(len(y)), "no layer's loss rose with noise; every layer is taken to matter alike")
    floor = FLOOR * float(np.median(positive))
    low = ~lost & (slope < floor)
    slope = np.where(lost, positive.max(), np.maximum(slope, floor))
    reasons = []
    if low.any():
        reasons.append(f"{low.sum()} slopes were lost in measurement noise and raised to {FLOOR:g} of the median")
    if lost.any():
        reasons.append(f"{lost.sum()} layers had no finite loss under noise and got the largest slope")
    return Slopes(slope, "; ".join(reasons) or None)


@jax.jit
def noise_like(W: jax.Array, t2: jax.Array | float, key: jax.Array) -> jax.Array:
    """Gaussian noise of the shape and dtype of W with |noise|^2 = t2 |W|^2 up to rounding; zeros for a zero W.

    The energy is set, not expected: one source of scatter less in the losses.
    """
    noise = jax.random.normal(key, W.shape, jnp.float32)
    unit = jnp.max(jnp.abs(W)).astype(jnp.float32)
    scaled = W.astype(jnp.float32) / jnp.where(unit > 0, unit, 1.0)
    energy = jnp.sum(scaled * scaled) / jnp.maximum(jnp.sum(noise * noise), float(jnp.finfo(jnp.float32).tiny))
    return (noise * jnp.sqrt(t2 * energy) * unit).astype(W.dtype)


@jax.jit
def relative_error(W: jax.Array, W_hat: jax.Array) -> jax.Array:
    """t2 = |W - W_hat|^2 / |W|^2, float32 scalar; 0 for a zero W."""
    W, W_hat = W.astype(jnp.float32), W_hat.astype(jnp.float32)
    unit = jnp.max(jnp.abs(W))
    unit = jnp.where(unit > 0, unit, 1.0)
    whole = jnp.sum((W / unit) ** 2)
    return jnp.where(whole > 0, jnp.sum(((W - W_hat) / unit) ** 2) / jnp.where(whole > 0, whole, 1.0), 0.0)


@jax.jit
def fisher_error(fisher: jax.Array, W: jax.Array, W_hat: jax.Array) -> jax.Array:
    """Predicted rise of the loss, 1/2 sum F (w - w_hat)^2, float32 scalar; all [N, K]. Goes with slope 1.

    Negative and non-finite Fisher values count as zero.
    """
    f = fisher.astype(jnp.float32)
    f = jnp.where(jnp.isfinite(f), jnp.maximum(f, 0.0), 0.0)
    return 0.5 * jnp.sum(f * (W.astype(jnp.float32) - W_hat.astype(jnp.float32)) ** 2)


def _checked(
    errors: ArrayLike, slopes: ArrayLike, bits: ArrayLike, weights: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """(loss [L, B], stored bits [L, B]); loss is infinite for options to leave out."""
    e, b = np.asarray(errors, np.float64), np.asarray(bits, np.float64)
    a, n = np.asarray(slopes, np.float64), np.asarray(weights, np.float64)
    if e.ndim != 2 or not e.size or b.shape != e.shape or a.shape != e.shape[:1] or n.shape != e.shape[:1]:
        raise ValueError(
            f"errors {e.shape} and bits {b.shape} must be [L, B], slopes {a.shape} and weights {n.shape} [L]"
        )
    if np.isnan(e).any() or (e < 0).any():
        raise ValueError("errors must be at least 0, with infinity for an option that a layer does not have")
    for name, values in (("slopes", a), ("bits", b), ("weights", n)):
        if not np.all(np.isfinite(values) & (values >= 0)):
            raise ValueError(f"{name} must be finite and at least 0; got {values[~(values >= 0)][:3]} or infinity")
    if not n.sum() > 0:
        raise ValueError("the layers have no entries; expected the number of weights of each layer")
    if none := np.flatnonzero(~np.isfinite(e).any(axis=1)).tolist():
        raise ValueError(f"layers {none} have no option with a finite error; give each at least one")
    loss = np.full(e.shape, np.inf)
    usable = np.isfinite(e)
    loss[usable] = (a[:, None] * np.where(usable, e, 0.0))[usable]
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
