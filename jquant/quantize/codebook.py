"""Codebooks: weighted k-means in one dimension, one table of 2**bits values for each row of a matrix.

    minimise  sum_i f_i (w_i - codebook[q_i])**2  over codebook and codes q     (SqueezeLLM, arXiv 2306.07629, eq. 4)

W, weights f, codes: [N, K]; codebook: [N, 2**bits] float32, ascending. Rows are independent.

In one dimension every cluster is an interval of the sorted row, so a solution is 2**bits - 1 cuts, and the cost of an
interval follows from three prefix sums (f, f w, f w**2): no distances are ever tabulated.

1. Sort the row. Centre it on its weighted mean, scale it to [-1, 1], scale f to a largest value of 1: float32 prefix
   sums then lose little to cancellation.
2. Cut the row into fine bins of equal sum of (f gap**2)**(1/3). By Panter and Dite the best quantizer places its levels
   with the density of that sum, so the bins are fine exactly where cuts will be wanted.
3. Up to 32 entries: the best cuts among 128 or 192 bin edges, by dynamic programming. Above: 8 bins an entry (at most
   every element its own), then the two neighbours that cost least to join are joined until 2**bits clusters are left.
4. Lloyd's iterations to convergence: cut at midpoints, then move each entry to its interval's mean.
5. Means once more as direct sums over each cluster's members: exact where a prefix difference drowns in a large prefix.

`fit_codebook_exact` runs the dynamic programme over every element instead, for as many operations as 2**bits K log K.

Special rows: all weights zero (or none usable) means unweighted; entries of weight zero get their nearest code and pull
nothing; with fewer distinct values than entries the surplus entries repeat others; nothing is ever NaN for finite W.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Search = Callable[[jax.Array, jax.Array], Any]  # sorted rows and weights [R, K] -> codebook [R, C]

# Rows at once bound every temporary: [R, K] floats and [R, 193, 193] interval costs; 64 stay near a CPU's caches.
ROWS_ON_CPU, ROWS_ON_ACCELERATOR = 64, 1024
DYNAMIC_LIMIT = 32  # entries up to which bins are cut by dynamic programming
BINS = {2: 128, 4: 128, 8: 128, 16: 128, 32: 192}  # edges offered to the dynamic programme
BINS_PER_ENTRY = 8  # for joining
BLOCK = 16  # midpoints compared in one fused pass of `assign_codes`


@partial(jax.jit, static_argnames=("bits", "iterations"))
def fit_codebook(W: jax.Array, weights: jax.Array, bits: int, iterations: int = 50) -> tuple[jax.Array, jax.Array]:
    """(codebook [N, 2**bits] float32 ascending, codes [N, K] int32) for W [N, K] and non-negative weights [N, K].

    `iterations` bounds Lloyd's steps; about ten are used after this start. Negative or non-finite weights count as
    zero. Raises ValueError for bits outside 1..8 or shapes that differ.
    """
    _check(W, weights, bits)

    def search(x: jax.Array, f: jax.Array) -> jax.Array:
        return _search(x, f, 2**bits, iterations)

    return _by_chunks(lambda w, f: _fit_rows(w, f, search), W, weights)


@partial(jax.jit, static_argnames=("bits",))
def fit_codebook_exact(W: jax.Array, weights: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """As `fit_codebook`, with cuts that are optimal up to float32 rounding: slower, for checks and for small layers.

    Interval costs are float32 prefix differences: trust them up to 32 entries; with more, the differences between
    neighbouring solutions approach their rounding, and `fit_codebook` is as good.
    """
    _check(W, weights, bits)

    def search(x: jax.Array, f: jax.Array) -> jax.Array:
        return _lloyd(x, f, _exact_cuts(x, f, 2**bits), 1)

    return _by_chunks(lambda w, f: _fit_rows(w, f, search), W, weights)


@jax.jit
def assign_codes(W: jax.Array, codebook: jax.Array) -> jax.Array:
    """Codes [N, K] int32 of the entries of codebook [N, C] (ascending) nearest to W [N, K]; ties to the lower entry."""
    # Compares in blocks: XLA fuses 16 at a time without writing [N, K, C], and beats gathers by ten to one on a CPU.
    midpoints = 0.5 * codebook[:, :-1].astype(jnp.float32) + 0.5 * codebook[:, 1:].astype(jnp.float32)
    blocks = -(-midpoints.shape[1] // BLOCK)
    midpoints = jnp.pad(midpoints, ((0, 0), (0, blocks * BLOCK - midpoints.shape[1])), constant_values=jnp.inf)
    W = W.astype(jnp.float32)

    def count(block: jax.Array, codes: jax.Array) -> jax.Array:
        limits = jax.lax.dynamic_slice_in_dim(midpoints, block * BLOCK, BLOCK, axis=1)
        for i in range(BLOCK):
            codes = codes + (W > limits[:, i, None]).astype(jnp.int32)
        return codes

    return jax.lax.fori_loop(0, blocks, count, jnp.zeros(W.shape, jnp.int32))


def codebook_lookup(codebook: jax.Array, codes: jax.Array) -> jax.Array:
    """codebook [N, C] at codes [N, K] -> float32 [N, K]."""
    return jnp.take_along_axis(codebook.astype(jnp.float32), codes.astype(jnp.int32), axis=1)


def _check(W: jax.Array, weights: jax.Array, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} gives a codebook of {2**bits if bits > 0 else 0} entries; expected 1 to 8 bits")
    if W.ndim != 2 or W.shape != weights.shape:
        raise ValueError(f"W {W.shape} and weights {weights.shape} must be matrices [N, K] of one shape")
    if W.shape[1] > 65536:
        raise ValueError(f"W has {W.shape[1]} columns; the sort keeps 16 bits for the column, so at most 65536")


def _by_chunks(fit: Search, W: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, columns = W.shape
    size = min(ROWS_ON_CPU if jax.default_backend() == "cpu" else ROWS_ON_ACCELERATOR, rows)
    pad = ((0, -rows % size), (0, 0))
    chunks = [jnp.pad(a.astype(jnp.float32), pad).reshape(-1, size, columns) for a in (W, weights)]
    codebook, codes = jax.lax.map(lambda chunk: fit(*chunk), tuple(chunks))
    return codebook.reshape(-1, codebook.shape[-1])[:rows], codes.reshape(-1, columns)[:rows]


def _fit_rows(W: jax.Array, f: jax.Array, search: Search) -> tuple[jax.Array, jax.Array]:
    f = jnp.where(jnp.isfinite(f), jnp.maximum(f, 0.0), 0.0)
    largest = jnp.max(f, axis=1, keepdims=True)
    # Below the normal range a quotient is unreliable, and such a row carries no preference worth keeping.
    usable = largest >= float(jnp.finfo(jnp.float32).tiny)
    f = jnp.where(usable, f / jnp.where(usable, largest, 1.0), 1.0)
    # The range comes first, so that neither centring nor squares leave float32 for huge or tiny rows.
    size = jnp.max(jnp.abs(W), axis=1, keepdims=True)
    size = jnp.where(size > 0, size, 1.0)
    z = W / size
    mean = jnp.sum(f * z, axis=1, keepdims=True) / jnp.sum(f, axis=1, keepdims=True)
    z = z - mean
    span = jnp.max(jnp.abs(z), axis=1, keepdims=True)
    span = jnp.where(span > 0, span, 1.0)
    z = z / span

    codebook = search(*_sorted_rows(z, f))
    codes = assign_codes(z, codebook)
    # From the weights themselves: centring costs an entry near 0 its last digits where the row's mean is far from 0.
    _, codebook = _clusters(W / size, f, codes, codebook * span + mean)
    codebook = jnp.sort(codebook * size, axis=1)
    return codebook, assign_codes(W, codebook)


def _sorted_rows(x: jax.Array, f: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [R, K] ascending and f in the same order.

    One integer is sorted for each entry, its high bits the value's, its low bits the column: on a CPU four times as
    fast as sorting pairs. Values that agree in the 32 - log2(K) bits kept may swap (K = 4096 keeps 11 bits of the
    fraction); that moves a cut among near-equals at most, and final codes and means come from the values themselves.
    """
    low = max((x.shape[1] - 1).bit_length(), 1)
    word = jax.lax.bitcast_convert_type(x, jnp.int32)
    key = jnp.where(word < 0, word ^ 0x7FFFFFFF, word)  # orders like the float, as an integer
    column = jnp.arange(x.shape[1], dtype=jnp.int32)
    order = jax.lax.sort((key >> low << low) | column, is_stable=False) & ((1 << low) - 1)
    return jnp.take_along_axis(x, order, axis=1), jnp.take_along_axis(f, order, axis=1)


def _prefix(values: jax.Array) -> jax.Array:
    """Sums of the first 0, 1, ... K entries: [R, K] -> [R, K + 1]."""
    return jnp.pad(jnp.cumsum(values, axis=1), ((0, 0), (1, 0)))


def _prefixes(x: jax.Array, f: jax.Array) -> list[jax.Array]:
    return [_prefix(v) for v in (f, f * x, f * x * x)]


def _at(table: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table, index, axis=1)


def _cost(start: list[jax.Array], end: list[jax.Array]) -> jax.Array:
    """Weighted squared deviation from the mean of intervals, from prefix sums at both ends (broadcast together)."""
    mass, moment, square = (b - a for a, b in zip(start, end, strict=True))
    return jnp.maximum(square - moment * moment / jnp.maximum(mass, 1e-30), 0.0)


def _bin_edges(x: jax.Array, f: jax.Array, bins: int) -> jax.Array:
    """Positions [R, B + 1] that split sorted rows [R, K] into B = min(bins, K) bins of equal (f gap**2)**(1/3)."""
    columns = x.shape[1]
    if bins >= columns:
        return jnp.broadcast_to(jnp.arange(columns + 1, dtype=jnp.int32), (x.shape[0], columns + 1))
    gap = jnp.pad(x[:, 1:] - x[:, :-1], ((0, 0), (1, 1)))
    gap = 0.5 * (gap[:, 1:] + gap[:, :-1])
    share = jnp.cbrt(f * gap * gap)
    # The constant gives every element some room, so that entries of weight zero and ties are spread too.
    share = share / jnp.maximum(jnp.sum(share, axis=1, keepdims=True), 1e-30) + 0.02 / columns
    reached = _prefix(share)
    wanted = reached[:, -1:] * jnp.arange(bins + 1, dtype=jnp.float32) / bins
    edges = jax.vmap(partial(jnp.searchsorted, method="scan"))(reached, wanted).astype(jnp.int32)
    return jnp.clip(edges, 0, columns).at[:, 0].set(0).at[:, -1].set(columns)


def _search(x: jax.Array, f: jax.Array, entries: int, iterations: int) -> jax.Array:
    """Codebook [R, entries] of sorted rows [R, K]."""
    if entries <= DYNAMIC_LIMIT:
        edges = _bin_edges(x, f, BINS[entries])
        cuts = _best_cuts([_at(p, edges) for p in _prefixes(x, f)], entries)
        return _lloyd(x, f, _at(edges, cuts), iterations)
    columns = x.shape[1]
    if columns <= entries:
        return jnp.pad(x, ((0, 0), (0, entries - columns)), mode="edge")
    bins = min(BINS_PER_ENTRY * entries, columns)
    mass, mean = f, x
    if bins < columns:
        # The number of edges at or before a position is its bin; repeated edges leave bins empty.
        edges = _bin_edges(x, f, bins)
        row = jnp.arange(x.shape[0])[:, None]
        owner = jnp.cumsum(jnp.zeros((x.shape[0], columns + 1), jnp.int32).at[row, edges[:, 1:]].add(1), axis=1)[:, :-1]
        mass, mean = _clusters(x, f, owner, _at(x, jnp.minimum(edges[:, :-1], columns - 1)))
    return _direct_lloyd(x, f, _join_neighbours(mass, mean, entries), iterations)


def _best_cuts(sums: list[jax.Array], entries: int) -> jax.Array:
    """Optimal cuts [R, entries + 1] among bins: best(m, j) = min over i of best(m - 1, i) + cost(i, j)."""
    rows, ends = sums[0].shape
    cost = _cost([p[:, :, None] for p in sums], [p[:, None, :] for p in sums])
    place = jnp.arange(ends, dtype=jnp.int32)
    cost = jnp.where(place[:, None] <= place[None, :], cost, jnp.inf)

    # Only minima are kept on the way forward: XLA vectorizes min but not argmin, and one column a cut is cheap to redo.
    def forward(best: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return jnp.min(best[:, :, None] + cost, axis=1), best

    def backward(end: jax.Array, best: jax.Array) -> tuple[jax.Array, jax.Array]:
        column = jnp.take_along_axis(cost, end[:, None, None], axis=2)[:, :, 0]
        start = jnp.argmin(best + column, axis=1).astype(jnp.int32)
        return start, start

    _, best = jax.lax.scan(forward, cost[:, 0], None, length=entries - 1)
    last = jnp.full((rows,), ends - 1, jnp.int32)
    _, cuts = jax.lax.scan(backward, last, best, reverse=True)
    return jnp.concatenate([jnp.zeros_like(cuts[:1]), cuts, last[None]]).T


def _clusters(x: jax.Array, f: jax.Array, codes: jax.Array, old: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mass, mean) [R, C] of each cluster from direct sums; the mean is `old` [R, C] where the mass is 0."""
    total = jax.vmap(partial(jax.ops.segment_sum, num_segments=old.shape[1]))
    mass, moment = total(f, codes), total(f * x, codes)
    return mass, jnp.where(mass > 0, moment / jnp.where(mass > 0, mass, 1.0), old)


def _join_neighbours(mass: jax.Array, mean: jax.Array, entries: int) -> jax.Array:
    """Means [R, entries] that are left of clusters [R, B], ascending, after joining the cheapest neighbours one by one.

    Joining a and b costs m_a m_b / (m_a + m_b) (mean_a - mean_b)**2. Nothing is subtracted but two means, so this keeps
    its precision where most of the weight sits in clusters of one and prefix sums would drown the rest.
    """
    rows, size = mass.shape
    row = jnp.arange(rows, dtype=jnp.int32)

    def price(mass_a: jax.Array, mean_a: jax.Array, mass_b: jax.Array, mean_b: jax.Array) -> jax.Array:
        return mass_a * (mass_b / jnp.maximum(mass_a + mass_b, 1e-37)) * (mean_a - mean_b) ** 2

    def join(_: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        prices, mass, mean, before, after = state  # prices[i]: of joining cluster i to the one before
        gone = jnp.argmin(prices, axis=1).astype(jnp.int32)
        left, right = before[row, gone], after[row, gone]
        one, two = mass[row, left], mass[row, gone]
        share = jnp.where(one + two > 0, two / jnp.maximum(one + two, 1e-37), 0.5)
        mean = mean.at[row, left].add(share * (mean[row, gone] - mean[row, left]))
        mass = mass.at[row, left].set(one + two)
        prices = prices.at[row, gone].set(jnp.inf)
        after, before = after.at[row, left].set(right), before.at[row, right].set(left)
        for a, b in ((before[row, left], left), (left, right)):
            new = price(mass[row, a], mean[row, a], mass[row, b], mean[row, b])
            prices = prices.at[row, b].set(jnp.where((b > 0) & (b < size), new, jnp.inf))
        return prices, mass, mean, before, after

    place = jnp.broadcast_to(jnp.arange(size + 1, dtype=jnp.int32), (rows, size + 1))  # one sentinel at the end
    mass, mean = jnp.pad(mass, ((0, 0), (0, 1))), jnp.pad(mean, ((0, 0), (0, 1)))
    prices = jnp.pad(price(mass[:, :-1], mean[:, :-1], mass[:, 1:], mean[:, 1:])[:, : size - 1], ((0, 0), (1, 1)))
    prices = jnp.where((place > 0) & (place < size), prices, jnp.inf)
    state = (prices, mass, mean, jnp.maximum(place - 1, 0), jnp.minimum(place + 1, size))
    prices, _, mean, _, _ = jax.lax.fori_loop(0, size - entries, join, state)
    kept = jnp.isfinite(prices) | (place == 0)
    return _at(mean, jnp.sort(jnp.where(kept, place, size), axis=1)[:, :entries])


def _direct_lloyd(x: jax.Array, f: jax.Array, codebook: jax.Array, iterations: int) -> jax.Array:
    """Lloyd's iterations from `codebook` [R, C] with direct sums: dearer than `_lloyd`, precise for light clusters."""

    def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        codebook, codes, count, _ = state
        _, codebook = _clusters(x, f, codes, codebook)
        moved = assign_codes(x, codebook)
        return codebook, moved, count + 1, jnp.any(moved != codes)

    state = (codebook, assign_codes(x, codebook), jnp.int32(0), jnp.bool_(True))
    return jax.lax.while_loop(lambda s: (s[2] < iterations) & s[3], step, state)[0]


def _lloyd(x: jax.Array, f: jax.Array, starts: jax.Array, iterations: int) -> jax.Array:
    """Codebook [R, C] after Lloyd's iterations from clusters beginning at `starts` [R, C + 1] of sorted rows [R, K]."""
    columns = x.shape[1]
    mass, moment = _prefix(f), _prefix(f * x)

    def means(starts: jax.Array, old: jax.Array) -> jax.Array:
        first, end = starts[:, :-1], starts[:, 1:]
        weight = _at(mass, end) - _at(mass, first)
        mean = (_at(moment, end) - _at(moment, first)) / jnp.where(weight > 0, weight, 1.0)
        # A small difference of large prefixes may be mostly rounding; a mean never leaves its members' range.
        mean = jnp.clip(mean, _at(x, jnp.minimum(first, columns - 1)), _at(x, jnp.maximum(end - 1, 0)))
        return jnp.where((end > first) & (weight > 0), mean, old)

    def cut(codebook: jax.Array) -> jax.Array:
        midpoints = 0.5 * codebook[:, :-1] + 0.5 * codebook[:, 1:]
        found = jax.vmap(partial(jnp.searchsorted, side="right", method="scan"))(x, midpoints).astype(jnp.int32)
        return jnp.pad(jnp.pad(found, ((0, 0), (1, 0))), ((0, 0), (0, 1)), constant_values=columns)

    def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        codebook, starts, count, _ = state
        codebook = means(starts, codebook)
        moved = cut(codebook)
        return codebook, moved, count + 1, jnp.any(moved != starts)

    middle = jnp.minimum((starts[:, :-1] + starts[:, 1:]) // 2, columns - 1)
    state = (_at(x, middle), starts, jnp.int32(0), jnp.bool_(True))
    return jax.lax.while_loop(lambda s: (s[2] < iterations) & s[3], step, state)[0]


def _exact_cuts(x: jax.Array, f: jax.Array, entries: int) -> jax.Array:
    """Optimal starts [R, entries + 1]: divide and conquer on the monotone argmin of the dynamic programme.

    best(j) = min over i <= j of before(i) + cost(i, j); its argmin never decreases with j. Level by level the middle of
    every pair of known columns is solved, searching only between their argmins; the searches of one level hold
    at most K + 1 + (number of middles) candidates together, laid out one after another in one array.
    """
    sums = _prefixes(x, f)
    rows, ends = sums[0].shape  # ends = K + 1 possible cut positions
    depth = ends.bit_length()

    def layer(before: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        # Position j + 1 of `arg` holds the argmin of column j; 0 and beyond-the-end are sentinels.
        arg = jnp.full((rows, 2**depth + 1), ends - 1, jnp.int32).at[:, 0].set(0)
        best = jnp.full((rows, 2**depth + 1), jnp.inf)
        for level in range(depth):
            step = 2 ** (depth - 1 - level)
            columns = step * jnp.arange(1, 2 ** (level + 1), 2, dtype=jnp.int32)
            low, high = arg[:, columns - step], jnp.minimum(arg[:, columns + step], columns - 1)
            size = jnp.where(columns <= ends, jnp.maximum(high - low + 1, 1), 0)
            stop = jnp.cumsum(size, axis=1)
            slot = jnp.arange(min(ends + columns.shape[0], 2 * ends), dtype=jnp.int32)
            owner = jax.vmap(lambda s, slot=slot: jnp.searchsorted(s, slot, side="right", method="scan"))(stop)
            owner = jnp.minimum(owner.astype(jnp.int32), columns.shape[0] - 1)
            i = jnp.clip(_at(low, owner) + slot - (_at(stop, owner) - _at(size, owner)), 0, ends - 1)
            j = jnp.minimum(columns[owner] - 1, ends - 1)
            value = _at(before, i) + _cost([_at(p, i) for p in sums], [_at(p, j) for p in sums])
            value = jnp.where((slot < stop[:, -1:]) & (i <= j), value, jnp.inf)
            segment = jax.vmap(partial(jax.ops.segment_min, num_segments=columns.shape[0], indices_are_sorted=True))
            least = segment(value, owner)
            winner = segment(jnp.where(value == _at(least, owner), i, ends - 1), owner)
            best, arg = best.at[:, columns].set(least), arg.at[:, columns].set(winner)
        return best[:, 1 : ends + 1], (arg[:, 1 : ends + 1], before)

    first = _cost([p[:, :1] for p in sums], sums)
    _, (arg, _) = jax.lax.scan(layer, first, None, length=entries - 1)

    def backward(end: jax.Array, arg: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = _at(arg, end[:, None])[:, 0]
        return start, start

    last = jnp.full((rows,), ends - 1, jnp.int32)
    _, starts = jax.lax.scan(backward, last, arg, reverse=True)
    return jnp.pad(jnp.pad(starts.T, ((0, 0), (1, 0))), ((0, 0), (0, 1)), constant_values=ends - 1)
