"""LNQ: codebooks and codes improved in turn against the error of the layer's output rather than of each weight alone.

    minimise  (w - c[q])^T H (w - c[q])  per row over its table c and codes q,   W [N, K], H [K, K], c [N, C], q [N, K]

H is X^T X / count, or that sum weighted by the loss's sensitivity to each output (GuidedQuant); both and this method:
arXiv 2505.07004. From a start that usually `squeezellm.fit` makes, two steps alternate, C P C P C for 2 rounds:

    C   the best table for given codes: with P [K, C] the one-hot codes of a row, (P^T H P) d = -P^T H e, c += d
    P   the best code for one column at a time, others held, `sweeps` times over: nearest entry to q_i - (H e)_i / H_ii

where e = c[q] - w. Both lower the objective or leave it; in float32, and with tables rounded to a storage dtype, a step
that raised a row's objective anyway is dropped for that row, so no row ever ends worse than it started.

- G = E H [N, K] is carried along: a change of column i adds a multiple of row i of H. As in GPTQ, a block of columns is
  finished by rank-1 updates of the block alone, then applied to all of G by one matrix product, so the result does not
  depend on the block size up to rounding. Arrays are transposed inside, [K, N], so that a column is contiguous.
- P^T H P is a product with one-hot matrices: 2 N C K**2 operations in all, in chunks of rows that bound the memory.
- Solving for the shift d, not for c, keeps an unused entry where it is and puts the ridge on the shift.
- H comes from few tokens, and its off-diagonal entries are what they tell least about. They are divided by 1 + damping:
  H + damping diag(H) in units that keep the diagonal. Much damping makes it SqueezeLLM's objective; 0 is the paper's.
- Entries of `mask` are kept exactly elsewhere: no error, no pull on the table, codes returned as given.
- A column never used in calibration (H_ii = 0) pulls on nothing and gets its nearest entry in the end.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.quantize.codebook import assign_codes, codebook_lookup
from jquant.quantize.grid import round_to_storage

ONE_HOT_ENTRIES = 2**24  # of a chunk of rows [rows, K, C]: 64 MiB, and its product with H as much again
RIDGE, LEAST_PIVOT = 1e-7, 1e-6  # of a unit diagonal


class LNQResult(NamedTuple):
    """codebook [N, C] in its storage dtype, ascending; codes [N, K] int32; objectives [N] float32, one for each row.

    Objectives are (w - c[q])^T H (w - c[q]) with the damped H, of the start in storage dtype and of the result.
    ok (bool scalar): False means H or the start was unusable; then the start is returned and both objectives are 0.
    """

    codebook: jax.Array
    codes: jax.Array
    objective_before: jax.Array
    objective_after: jax.Array
    ok: jax.Array


class _State(NamedTuple):
    codebook: jax.Array  # [N, C], values that the storage dtype holds
    codes: jax.Array
    product: jax.Array  # E H [N, K]
    objective: jax.Array  # [N]


class _Problem(NamedTuple):
    """In units of each row's largest magnitude and of the mean diagonal of H."""

    W: jax.Array  # [N, K]
    H: jax.Array
    size: jax.Array  # [N, 1]
    kept: jax.Array | None  # mask
    dead: jax.Array  # [K] bool

    def evaluate(self, codebook: jax.Array, codes: jax.Array) -> _State:
        error = codebook_lookup(codebook / self.size, codes) - self.W
        if self.kept is not None:
            error = jnp.where(self.kept, 0.0, error)
        product = jnp.matmul(error, self.H, precision="highest")
        return _State(codebook, codes, product, jnp.sum(error * product, axis=1))


@partial(jax.jit, static_argnames=("codebook_dtype", "block_size"))
def lnq(
    W: jax.Array,
    H: jax.Array,
    codebook: jax.Array,
    codes: jax.Array,
    *,
    rounds: jax.Array | int = 2,
    sweeps: jax.Array | int = 4,
    mask: jax.Array | None = None,
    damping: jax.Array | float = 0.1,
    codebook_dtype: Any = jnp.float32,
    block_size: int = 128,
) -> LNQResult:
    """LNQ of W [N, K] for H [K, K] from codebook [N, C] and codes [N, K]; mask [N, K] bool: entries kept elsewhere.

    rounds=0 is a single C-step; damping is at least 0. Tables are rounded to `codebook_dtype` after every C-step, so
    codes are chosen against what will be stored. Raises ValueError for shapes that disagree.
    """
    given = round_to_storage(codebook, codebook_dtype)
    problem, first, unit, ok = _start(W, H, given, codes, mask, damping)

    def improve(index: jax.Array, state: _State) -> _State:
        # The first round comes without its P-step: the codes of the start suit the start's table.
        moved = _descend(problem, state, jnp.where(index == 0, 0, sweeps), block_size)
        state = _better(problem.evaluate(state.codebook, moved), state)
        return _better(problem.evaluate(*_move_entries(problem, state, codebook_dtype)), state)

    last = jax.lax.fori_loop(0, rounds + 1, improve, first)
    return _result(problem, W, first, last, given.astype(codebook_dtype), unit, ok)


@partial(jax.jit, static_argnames=("block_size",))
def choose_codes(
    W: jax.Array,
    H: jax.Array,
    codebook: jax.Array,
    codes: jax.Array,
    *,
    sweeps: jax.Array | int = 4,
    mask: jax.Array | None = None,
    damping: jax.Array | float = 0.1,
    block_size: int = 128,
) -> LNQResult:
    """The P-step alone, for a codebook [N, C] float32, ascending, that has to stay: arguments as those of `lnq`."""
    codebook = codebook.astype(jnp.float32)
    problem, first, unit, ok = _start(W, H, codebook, codes, mask, damping)
    moved = _descend(problem, first, jnp.asarray(sweeps, jnp.int32), block_size)
    last = _better(problem.evaluate(first.codebook, moved), first)
    return _result(problem, W, first, last, codebook, unit, ok)


def _start(
    W: jax.Array, H: jax.Array, codebook: jax.Array, codes: jax.Array, mask: jax.Array | None, damping: Any
) -> tuple[_Problem, _State, jax.Array, jax.Array]:
    """(the problem, the given tables and codes in it, the unit of H, usable)."""
    _check(W, H, codebook, codes, mask)
    W, codes = W.astype(jnp.float32), codes.astype(jnp.int32)
    # What is kept elsewhere is often the largest of its row; it must not set the unit of the rest.
    W = W if mask is None else jnp.where(mask, 0.0, W)
    H, dead, unit, ok = _in_units(H, damping)
    ok = ok & jnp.all(jnp.isfinite(W)) & jnp.all(jnp.isfinite(codebook))
    W, start = jnp.where(jnp.isfinite(W), W, 0.0), jnp.where(jnp.isfinite(codebook), codebook, 0.0)
    size = jnp.maximum(jnp.max(jnp.abs(W), axis=1, keepdims=True), jnp.max(jnp.abs(start), axis=1, keepdims=True))
    size = jnp.where(size > 0, size, 1.0)
    problem = _Problem(W / size, H, size, mask, dead)
    return problem, problem.evaluate(start, codes), unit, ok


def _result(
    problem: _Problem,
    W: jax.Array,
    first: _State,
    last: _State,
    given: jax.Array,
    unit: jax.Array,
    ok: jax.Array,
) -> LNQResult:
    """`last` in the units and the type of the given codebook; first, if the problem is unusable."""
    size = problem.size
    final = jnp.where(problem.dead, assign_codes(W, last.codebook), last.codes)
    if problem.kept is not None:
        final = jnp.where(problem.kept, first.codes, final)
    scale = jnp.where(ok, unit * size[:, 0], 0.0)

    def in_given_units(objective: jax.Array) -> jax.Array:
        return jnp.maximum(objective, 0.0) * scale * jnp.where(ok, size[:, 0], 0.0)

    return LNQResult(
        jnp.where(ok, last.codebook, given.astype(jnp.float32)).astype(given.dtype),
        jnp.where(ok, final, first.codes),
        in_given_units(first.objective),
        in_given_units(last.objective),
        ok,
    )


def _check(W: jax.Array, H: jax.Array, codebook: jax.Array, codes: jax.Array, mask: jax.Array | None) -> None:
    if W.ndim != 2 or H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(f"W {W.shape} must be [N, K] and H {H.shape} [K, K] over its columns")
    if codebook.ndim != 2 or codebook.shape[0] != W.shape[0] or codebook.shape[1] < 2:
        raise ValueError(f"codebook {codebook.shape} must be [N, C >= 2], a row for each of the {W.shape[0]} rows of W")
    for name, array in (("codes", codes), ("mask", mask)):
        if array is not None and array.shape != W.shape:
            raise ValueError(f"{name} {array.shape} must have the shape of W, {W.shape}")


def _in_units(H: jax.Array, damping: jax.Array | float) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(H [K, K] symmetric, damped, of mean diagonal 1; dead columns [K]; the unit; usable)."""
    H = H.astype(jnp.float32)
    diagonal = jnp.diagonal(H)
    live = diagonal > 0
    unit = jnp.sum(jnp.where(live, diagonal, 0.0)) / jnp.maximum(jnp.sum(live.astype(jnp.float32)), 1.0)
    scaled = H / unit
    ok = jnp.all(jnp.isfinite(scaled)) & jnp.all(diagonal >= 0)
    scaled = jnp.where(ok & live[:, None] & live[None, :], scaled, 0.0)
    scaled = 0.5 * (scaled + scaled.T) / (1 + damping * (1 - jnp.eye(H.shape[0], dtype=jnp.float32)))
    return scaled, ~live, jnp.where(ok, unit, 1.0), ok


def _better(new: _State, old: _State) -> _State:
    """Row by row, the one of the lower objective."""
    lower = new.objective < old.objective  # False for NaN, too

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(lower if a.ndim == 1 else lower[:, None], a, b)

    return jax.tree.map(choose, new, old)


def _descend(problem: _Problem, state: _State, sweeps: jax.Array, block_size: int) -> jax.Array:
    """Codes [N, K] after cyclic coordinate descent with the table held."""
    rows, columns = problem.W.shape
    block = min(block_size, columns)
    blocks = -(-columns // block)
    pad = ((0, blocks * block - columns), (0, 0))
    H = jnp.pad(problem.H, (pad[0], pad[0]))
    table = (state.codebook / problem.size).T
    midpoints = 0.5 * table[:-1] + 0.5 * table[1:]
    diagonal = jnp.diagonal(problem.H)
    inverse = jnp.where(problem.dead, 0.0, 1.0 / jnp.where(problem.dead, 1.0, diagonal))
    fixed = problem.dead[:, None] if problem.kept is None else problem.dead[:, None] | problem.kept.T

    def split(array: jax.Array, fill: Any = 0) -> jax.Array:
        return jnp.pad(array, pad, constant_values=fill).reshape(blocks, block, array.shape[1])

    H_blocks, inverse, fixed = H.reshape(blocks, block, -1), split(inverse[:, None]), split(fixed, True)
    starts = block * jnp.arange(blocks, dtype=jnp.int32)

    def finish_column(product: jax.Array, column: tuple[jax.Array, ...]):
        value, code, h, inverse, fixed, i = column
        target = value - product[i] * inverse
        # Entries ascend, so the nearest is the largest of those whose lower midpoint is passed: no gather, no argmin.
        passed = target[None, :] > midpoints
        nearest = jnp.max(jnp.where(passed, table[1:], table[:1]), axis=0)
        nearest = jnp.where(fixed, value, nearest)
        code = jnp.where(fixed, code, jnp.sum(passed.astype(jnp.int32), axis=0))
        return product + h[:, None] * (nearest - value)[None, :], (nearest, code, nearest - value)

    def finish_block(product: jax.Array, block_of: tuple[jax.Array, ...]):
        values, codes, h, inverse, fixed, start = block_of
        inner = jax.lax.dynamic_slice(h, (0, start), (block, block))
        own = jax.lax.dynamic_slice(product, (start, 0), (block, rows))
        places = jnp.arange(block, dtype=jnp.int32)
        _, (values, codes, change) = jax.lax.scan(finish_column, own, (values, codes, inner, inverse, fixed, places))
        return product + jnp.matmul(h.T, change, precision="highest"), (values, codes)

    def sweep(_: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        product, values, codes = carry
        product, (values, codes) = jax.lax.scan(
            finish_block, product, (values, codes, H_blocks, inverse, fixed, starts)
        )
        return product, values, codes

    values = codebook_lookup(table.T, state.codes).T
    carry = (jnp.pad(state.product.T, pad), split(values), split(state.codes.T))
    _, _, codes = jax.lax.fori_loop(0, sweeps, sweep, carry)
    return codes.reshape(-1, rows)[:columns].T


def _move_entries(problem: _Problem, state: _State, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(codebook [N, C] that is best for the codes, as `dtype` holds it, ascending; codes renamed to match)."""
    rows, columns = problem.W.shape
    entries = state.codebook.shape[1]

    def shift(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        codes, product = row
        P = jax.nn.one_hot(codes, entries, dtype=jnp.float32)  # a code of -1 gives a row of zeros
        A = jnp.matmul(P.T, jnp.matmul(problem.H, P, precision="highest"), precision="highest")
        b = -jnp.matmul(P.T, product, precision="highest")
        # A unit diagonal makes the ridge the same for an entry used once as for one used by half of the row.
        used = jnp.diagonal(A) > 0
        scale = jnp.where(used, jax.lax.rsqrt(jnp.where(used, jnp.diagonal(A), 1.0)), 0.0)
        return _solve(A * scale[:, None] * scale[None, :], b * scale) * scale

    codes = state.codes if problem.kept is None else jnp.where(problem.kept, -1, state.codes)
    chunk = max(1, min(rows, ONE_HOT_ENTRIES // (columns * entries)))
    chunk = chunk if chunk == rows else 2 ** (chunk.bit_length() - 1)  # most often without a remainder
    moved = state.codebook / problem.size + jax.lax.map(shift, (codes, state.product), batch_size=chunk)
    moved = round_to_storage(moved * problem.size, dtype)
    order = jnp.argsort(moved, axis=1)
    rank = jnp.argsort(order, axis=1).astype(jnp.int32)
    return jnp.take_along_axis(moved, order, axis=1), jnp.take_along_axis(rank, state.codes, axis=1)


def _solve(A: jax.Array, b: jax.Array) -> jax.Array:
    """x [C] of A x = b for symmetric A [C, C] >= 0 of unit diagonal; 0 for variables that depend on earlier ones.

    Gauss-Jordan without exchanges, which positive matrices do not need. Not LAPACK: jaxlib 0.10 blocks a thread of the
    CPU's pool for every batched factorization in flight, and two at a time stop a machine of two cores for good.
    """
    size = b.shape[0]
    place = jnp.arange(size, dtype=jnp.int32)

    def eliminate(i: jax.Array, rows: jax.Array) -> jax.Array:
        pivot = rows[i, i]
        own = rows[i] * jnp.where(pivot > LEAST_PIVOT, 1.0 / jnp.maximum(pivot, LEAST_PIVOT), 0.0)
        return jnp.where((place == i)[:, None], own, rows - rows[:, i, None] * own)

    rows = jnp.concatenate([A + RIDGE * jnp.eye(size, dtype=jnp.float32), b[:, None]], axis=1)
    return jax.lax.fori_loop(0, size, eliminate, rows)[:, -1]
