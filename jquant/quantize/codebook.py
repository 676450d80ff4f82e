"""Codebooks: weighted k-means in one dimension, one table of 2**bits values for each row of a matrix.

    minimise  sum_i f_i (w_i - codebook[q_i])**2     over the codebook and the codes q     (SqueezeLLM, arXiv 2306.07629, eq. 4)

W, weights f, codes: [N, K]; codebook: [N, 2**bits] float32, ascending. Rows are independent.

In one dimension every cluster is an interval of the sorted row, so a solution is 2**bits - 1 cuts, and the cost of an
interval follows from three prefix sums (f, f w, f w**2): no distances are ever tabulated.

1. Sort the row. Centre it on its weighted mean, scale it to [-1, 1], scale f to a largest value of 1: float32 prefix sums
   then lose little to cancellation.
2. Cut the row into fine bins of equal sum of (f gap**2)**(1/3), 16 for each codebook entry. By Panter and Dite the best
   quantizer places its levels with the density of that sum, so the bins are fine exactly where cuts will be wanted.
3. Choose the cuts among the bin edges by dynamic programming, coarse to fine: each pass looks at every cut's neighbourhood
   only, centred on the pass before. The first sees the whole row for up to 8 entries, 4 entries either side beyond.
4. Lloyd's iterations to convergence on the sorted row: cut at midpoints, then move each entry to its interval's mean.
5. Means once more as direct sums over each cluster's members: exact where a prefix difference drowns in a large prefix.

`fit_codebook_exact` runs the dynamic programme over every element instead, for as many operations as 2**bits K log K.

Special rows: all weights zero (or none usable) means unweighted; entries of weight zero get their nearest code and pull
nothing; with fewer distinct values than entries the surplus entries repeat others; nothing is ever NaN for finite W.
"""

from functools import partial

import jax
import jax.numpy as jnp

ROWS_AT_ONCE = 64  # bounds every temporary: [64, K] floats and [64, 65, 65] candidate costs
BINS_PER_ENTRY = 16
BLOCK = 16  # midpoints compared in one fused pass of `assign_codes`


@partial(jax.jit, static_argnames=("bits", "iterations"))
def fit_codebook(W: jax.Array, weights: jax.Array, bits: int, iterations: int = 50) -> tuple[jax.Array, jax.Array]:
    """(codebook [N, 2**bits] float32 ascending, codes [N, K] int32) for W [N, K] and non-negative weights [N, K].

    `iterations` bounds Lloyd's steps; about five are used after the dynamic programme. Negative or non-finite weights
    count as zero. Raises ValueError for bits outside 1..8 or shapes that differ.
    """
    _check(W, weights, bits)

    def search(x: jax.Array, f: jax.Array) -> jax.Array:
        return _lloyd(x, f, _binned_cuts(x, f, 2**bits), iterations)

    return _by_chunks(lambda w, f: _fit_rows(w, f, bits, search), W, weights)


@partial(jax.jit, static_argnames=("bits",))
def fit_codebook_exact(W: jax.Array, weights: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """As `fit_codebook`, with cuts that are optimal up to float32 rounding: slower, for checks and for small layers.

    Interval costs are float32 prefix differences: trust them up to 32 entries; with more, the differences between
    neighbouring solutions approach their rounding, and `fit_codebook` is as good.
    """
    _check(W, weights, bits)

    def search(x: jax.Array, f: jax.Array) -> jax.Array:
        return _lloyd(x, f, _exact_cuts(x, f, 2**bits), 1)

    return _by_chunks(lambda w, f: _fit_rows(w, f, bits, search), W, weights)


@jax.jit
def assign_codes(W: jax.Array, codebook: jax.Array) -> jax.Array:
    """Codes [N, K] int32 of the entries of codebook [N, C] (ascending) nearest to W [N, K]; ties go to the lower entry."""
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


def _by_chunks(fit, W: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, columns = W.shape
    size = min(ROWS_AT_ONCE, rows)
    pad = ((0, -rows % size), (0, 0))
    chunks = [jnp.pad(a.astype(jnp.float32), pad).reshape(-1, size, columns) for a in (W, weights)]
    codebook, codes = jax.lax.map(lambda chunk: fit(*chunk), tuple(chunks))
    return codebook.reshape(-1, codebook.shape[-1])[:rows], codes.reshape(-1, columns)[:rows]


def _fit_rows(W: jax.Array, f: jax.Array, bits: int, search) -> tuple[jax.Array, jax.Array]:
    entries = 2**bits
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
    total = jax.vmap(partial(jax.ops.segment_sum, num_segments=entries))
    mass, moment = total(f, codes), total(f * z, codes)
    codebook = jnp.where(mass > 0, moment / jnp.where(mass > 0, mass, 1.0), codebook)
    codebook = jnp.sort((codebook * span + mean) * size, axis=1)
    return codebook, assign_codes(W, codebook)


def _sorted_rows(x: jax.Array, f: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [R, K] ascending and f in the same order.

    One integer is sorted for each entry, its high bits the value's, its low bits the column: on a CPU four times as fast
    as sorting pairs. Values that agree in the 32 - log2(K) bits kept may swap (K = 4096 keeps 11 bits of the fraction);
    this can only move a cut among near-equals, and codes and means are taken from the values themselves afterwards.
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
    """Positions [R, bins + 1] in sorted rows [R, K] that split them into bins of equal (f gap**2)**(1/3)."""
    columns = x.shape[1]
    gap = jnp.pad(x[:, 1:] - x[:, :-1], ((0, 0), (1, 1)))
    gap = 0.5 * (gap[:, 1:] + gap[:, :-1])
    share = jnp.cbrt(f * gap * gap)
    # The constant gives every element some room, so that entries of weight zero and ties are spread too.
    share = share / jnp.maximum(jnp.sum(share, axis=1, keepdims=True), 1e-30) + 0.02 / columns
    reached = _prefix(share)
    wanted = reached[:, -1:] * jnp.arange(bins + 1, dtype=jnp.float32) / bins
    edges = jax.vmap(partial(jnp.searchsorted, method="scan"))(reached, wanted).astype(jnp.int32)
    return jnp.clip(edges, 0, columns).at[:, 0].set(0).at[:, -1].set(columns)


def _binned_cuts(x: jax.Array, f: jax.Array, entries: int) -> jax.Array:
    """Starts of the clusters [R, entries + 1] (0 first, K last) by dynamic programming over bins, doubling the entries."""
    rows, columns = x.shape
    bins = min(BINS_PER_ENTRY * entries, columns)
    sums = _prefixes(x, f)
    if bins < columns:
        edges = _bin_edges(x, f, bins)
        sums = [_at(p, edges) for p in sums]
    else:
        edges = jnp.broadcast_to(jnp.arange(columns + 1, dtype=jnp.int32), (rows, columns + 1))

    count = min(entries, 8)
    ends = jnp.broadcast_to(jnp.arange(count + 1, dtype=jnp.int32) * bins // count, (rows, count + 1))
    while True:
        # A first problem this small is searched whole: 32 steps of an eighth of a cell either side.
        for stride, reach in REACH[count](bins):
            cuts = _improve_cuts(sums, ends[:, 1:-1], stride * jnp.arange(-reach, reach + 1, dtype=jnp.int32))
            ends = jnp.concatenate([ends[:, :1], cuts, ends[:, -1:]], axis=1)
        if count == entries:
            return _at(edges, ends)
        halves = (ends[:, :-1] + ends[:, 1:]) // 2
        ends = jnp.concatenate([jnp.stack([ends[:, :-1], halves], axis=2).reshape(rows, -1), ends[:, -1:]], axis=1)
        count *= 2


def _improve_cuts(sums: list[jax.Array], cuts: jax.Array, offsets: jax.Array) -> jax.Array:
    """The best cuts [R, C - 1] with each of them at one of `offsets` [P] from its place; sums: prefixes [R, bins + 1].

    best(m, b) = min over a of best(m - 1, a) + cost(position a of cut m - 1, position b of cut m)
    """
    last = sums[0].shape[1] - 1
    places = jnp.clip(cuts.T[:, :, None] + offsets, 0, last)  # [C - 1, R, P]

    def cost(a: jax.Array, b: jax.Array) -> jax.Array:  # [R, A], [R, B] -> [R, A, B]
        interval = _cost([_at(p, a)[:, :, None] for p in sums], [_at(p, b)[:, None, :] for p in sums])
        return jnp.where(a[:, :, None] <= b[:, None, :], interval, jnp.inf)

    def forward(state: tuple[jax.Array, jax.Array], place: jax.Array):
        best, before = state
        best = jnp.min(best[:, :, None] + cost(before, place), axis=1)
        return (best, place), best

    # Only minima are kept on the way forward: XLA vectorizes min but not argmin, and one column a cut is cheap to redo.
    def backward(after: jax.Array, step: tuple[jax.Array, jax.Array]):
        best, place = step
        choice = jnp.argmin(best + cost(place, after[:, None])[:, :, 0], axis=1)
        cut = _at(place, choice[:, None])[:, 0]
        return cut, cut

    start = jnp.zeros((cuts.shape[0], 1), jnp.int32)
    first = cost(start, places[0])[:, 0]
    _, more = jax.lax.scan(forward, (first, places[0]), places[1:])
    best = jnp.concatenate([first[None], more])
    _, chosen = jax.lax.scan(backward, start[:, 0] + last, (best, places), reverse=True)
    return chosen.T


def _lloyd(x: jax.Array, f: jax.Array, starts: jax.Array, iterations: int) -> jax.Array:
    """Codebook [R, C] after Lloyd's iterations from the clusters that begin at `starts` [R, C + 1] of sorted rows [R, K]."""
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
