"""GPTQ: round the columns one after another, and let the columns still open make up for each error.

    minimise  trace((W - Q) H (W - Q)^T),     H = X^T X / count = mean of x x^T over tokens    [K, K],   W [N, K]

With U the upper triangular factor of the inverse, H^-1 = U^T U, and columns in order (arXiv 2210.17323, algorithm 1):

    q_k = round(w_k);   e_k = (w_k - q_k) / U_kk;   w_j -= e_k U_kj  for j > k

The result does not depend on the factor of H: damping is relative, H += damping * mean(diag H) * I.

- act_order visits the columns by falling diag H, the most heard first, while there is most freedom left.
- static_groups takes the scales from the original W, looked up through the visiting order, so that a group stays
  contiguous in memory. Otherwise each group's range is taken when its first column is reached (only without act_order).
- group_axis "out" needs neither: each column gets fresh ranges over its own compensated values (arXiv 2309.15531).
- A column never used in calibration (H_kk = 0) is decoupled: plainly rounded, nothing passed on. Zeroing it, as the
  original code does, would lose it for inputs that do use it.
- The last rows' updates are delayed: a block of columns is finished by rank-1 updates, then applied to the rest by one
  matrix product. The result is the same for every block size, up to float32 rounding.

W is kept transposed inside, [K, N], so that the column being rounded is contiguous. U comes from one Cholesky factor
of H read backwards, H = R R^T with R upper, U = R^-1: no explicit inverse of H.

`gptq` and `gptq_codebook` are jittable and go under `vmap` for equal shapes; where H is unusable they say ok = False.
`gptq_or_rtn` looks at that flag, raises the damping, falls back to `rtn` in the end, and says what it did.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.quantize.codebook import assign_codes, codebook_lookup
from jquant.quantize.grid import Grid, GroupAxis, check_grid, dequantize_grid, fit_grid, quantize_to_grid
from jquant.quantize.passes.rtn import rtn
from jquant.quantize.two_level import fit_two_level

# (state, column values [N], column index) -> (anything to record, the values [N] it decodes to)
QuantizeColumn = Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array]]

DAMPING_LIMIT = 10.0


class GPTQResult(NamedTuple):
    """codes [N, K] int32, their grid, and ok (bool scalar): False means H was unusable, and so are the codes."""

    codes: jax.Array
    grid: Grid
    ok: jax.Array


class GPTQReport(NamedTuple):
    """What `gptq_or_rtn` did with one matrix."""

    damping: float | None  # the one that worked; None after falling back
    dead_columns: int  # inputs never seen in calibration
    fallback: str | None  # why the result is plain rounding, or None


def inverse_factor(H: jax.Array, damping: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """(U [K, K] upper with H^-1 = U^T U for the damped H [K, K], ok). Identity, and ok False, where there is none.

    Dead columns (zero diagonal) get the mean of the others as their diagonal and no coupling.
    """
    H = H.astype(jnp.float32)
    diagonal = jnp.diagonal(H)
    dead = diagonal == 0
    live = jnp.maximum(jnp.sum((~dead).astype(jnp.float32)), 1.0)
    mean = jnp.sum(diagonal) / live
    mean = jnp.where(mean == 0, 1.0, mean)
    # In units of the mean: a Hessian of tiny or huge inputs would otherwise meet float32's limits inside the solve.
    H = jnp.where(dead[:, None] | dead[None, :], 0.0, H / mean) + jnp.diag(dead.astype(jnp.float32) + damping)
    eye = jnp.eye(H.shape[0], dtype=jnp.float32)
    R = jnp.linalg.cholesky(H[::-1, ::-1], symmetrize_input=True)[::-1, ::-1]
    U = jax.lax.linalg.triangular_solve(R, eye, left_side=True, lower=False)
    ok = jnp.all(jnp.isfinite(U)) & jnp.all(jnp.diagonal(U) > 0)
    return jnp.where(ok, U, eye), ok


def compensated_rounding(
    W: jax.Array,
    H: jax.Array,
    quantize_column: QuantizeColumn,
    *,
    order: jax.Array | None = None,
    damping: jax.Array | float = 0.01,
    block_size: int = 128,
    start_block: Callable[[Any, jax.Array, jax.Array], Any] | None = None,
    start_window: Callable[[Any, jax.Array, jax.Array, jax.Array], Any] | None = None,
    window: int = 1,
    state: Any = None,
) -> tuple[Any, jax.Array, jax.Array]:
    """The column loop for any quantizer: (recorded, decoded W [N, K], ok), both in the original column order.

    quantize_column(state, w [N], k) sees the compensated values of column k (original order); what it records is
    stacked along a new leading axis K. Returning w itself as decoded keeps a column unquantized. order [K] int32 is
    the visiting order (default 0 .. K - 1). start_block(state, W_t [K', N], position) may replace the state before each
    block; it sees every column as compensated so far, in visiting order.
    start_window(state, w [window, N], factor [window], position) may do so before each `window` columns inside a block;
    it sees those columns as compensated so far and their entries of diag U. Columns past the end are zeros there.
    """
    rows, columns = W.shape
    order = jnp.arange(columns, dtype=jnp.int32) if order is None else order.astype(jnp.int32)
    U, ok = inverse_factor(H[order][:, order], damping)
    block = -(-min(block_size, columns) // window) * window  # windows never straddle blocks
    blocks = -(-columns // block)
    pad = blocks * block - columns
    # Padding columns have a unit diagonal and no coupling, so whatever they decode to stays with them.
    U = jnp.pad(U, ((0, pad), (0, pad))) + jnp.diag((jnp.arange(columns + pad) >= columns).astype(jnp.float32))
    visit = jnp.pad(order, (0, pad))
    Wt = jnp.pad(W.astype(jnp.float32).T[order], ((0, pad), (0, 0)))

    def keep_state(state: Any, *_: jax.Array) -> Any:
        return state

    def finish_block(carry: tuple[jax.Array, Any], start: jax.Array):
        Wt, state = carry
        if start_block is not None:
            state = start_block(state, Wt, start)
        U_block = jax.lax.dynamic_slice(U, (start, 0), (block, U.shape[1]))
        U_inner = jax.lax.dynamic_slice(U_block, (0, start), (block, block))
        factor = jnp.diagonal(U_inner)

        def finish_column(carry: tuple[jax.Array, Any], i: jax.Array):
            inner, state = carry
            if start_window is not None:
                coming = (jax.lax.dynamic_slice_in_dim(a, i, window) for a in (inner, factor))
                state = jax.lax.cond(i % window == 0, start_window, keep_state, state, *coming, start + i)
            w = inner[i]
            recorded, decoded = quantize_column(state, w, visit[start + i])
            error = (w - decoded) / factor[i]
            # Row i of U is zero before i, so finished columns are untouched; column i is not read again.
            return (inner - U_inner[i][:, None] * error[None, :], state), (recorded, decoded, error)

        inner = jax.lax.dynamic_slice(Wt, (start, 0), (block, rows))
        places = jnp.arange(block, dtype=jnp.int32)
        (_, state), (recorded, decoded, errors) = jax.lax.scan(finish_column, (inner, state), places)
        Wt = Wt - jnp.matmul(U_block.T, errors, precision="highest")
        return (Wt, state), (recorded, decoded)

    starts = block * jnp.arange(blocks, dtype=jnp.int32)
    _, results = jax.lax.scan(finish_block, (Wt, state), starts)
    back = jnp.argsort(order)
    recorded, decoded = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:columns][back], results)
    return recorded, decoded.T, ok & jnp.all(jnp.isfinite(decoded))


@partial(
    jax.jit,
    static_argnames=(
        "bits",
        "group_size",
        "symmetric",
        "group_axis",
        "act_order",
        "static_groups",
        "block_size",
        "clip_search",
        "scale_dtype",
        "two_level",
    ),
)
def gptq(
    W: jax.Array,
    H: jax.Array,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    group_axis: GroupAxis = "in",
    act_order: bool = True,
    static_groups: bool = True,
    damping: jax.Array | float = 0.01,
    block_size: int = 128,
    clip_search: bool = False,
    scale_dtype: Any = jnp.float16,
    two_level: bool = False,
) -> GPTQResult:
    """GPTQ of W [N, K] with the Hessian H [K, K]; grid arguments and their errors as in `fit_grid`.

    two_level: the grid of `fit_two_level`, found before any rounding.
    Raises ValueError for shapes that do not fit, and for act_order or two_level with groups that are not static.
    """
    group_size = check_grid(bits, group_size, group_axis)
    _check(W, H)
    columns = W.shape[1]
    if group_axis == "in" and group_size is not None and act_order and not static_groups:
        raise ValueError("act_order scatters a group's columns; use static_groups=True, or act_order=False")
    if two_level and not static_groups:
        raise ValueError(
            "two-level scales are multiples of a row's step, which groups that take their range one after another "
            "cannot agree on; use static_groups=True, or two_level=False"
        )
    fit = fit_two_level if two_level else fit_grid
    fit = partial(fit, bits=bits, symmetric=symmetric, clip_search=clip_search, scale_dtype=scale_dtype)
    order = visiting_order(H) if act_order else None
    run = partial(compensated_rounding, W, H, order=order, damping=damping)
    if group_axis == "out":
        (codes, each), _, ok = run(_fresh_ranges(fit, group_size), block_size=block_size)
        grid = Grid(each.scales.T, None if symmetric else each.zeros.T, bits, group_size, "out")
    elif static_groups or group_size is None:
        grid = fit(W, group_size=group_size)
        codes, _, ok = run(_fixed_ranges(grid, group_size or columns), block_size=block_size)
    else:
        # Blocks end where groups do, so that a group's columns are fully compensated when its range is taken.
        block_size = math.gcd(group_size, block_size)
        start_block = partial(_ranges_at_group_start, fit, group_size, columns)
        state = fit(W[:, :group_size])
        (codes, each), _, ok = run(_current_ranges, block_size=block_size, start_block=start_block, state=state)
        each = jax.tree.map(lambda a: a[::group_size], each)
        grid = Grid(each.scales.T, None if symmetric else each.zeros.T, bits, group_size, "in")
    return GPTQResult(codes.T, grid, ok)


def _fixed_ranges(grid: Grid, size: int) -> QuantizeColumn:
    def quantize_column(_: Any, w: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        column = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, k // size, 1, axis=1), grid)
        codes = quantize_to_grid(w[:, None], column)
        return codes[:, 0], dequantize_grid(codes, column)[:, 0]

    return quantize_column


def _fresh_ranges(fit: Callable[..., Grid], group_size: int | None) -> QuantizeColumn:
    def quantize_column(_: Any, w: jax.Array, k: jax.Array) -> tuple[Any, jax.Array]:
        return _current_ranges(fit(w[:, None], group_size=group_size, group_axis="out"), w, k)

    return quantize_column


def _current_ranges(grid: Grid, w: jax.Array, k: jax.Array) -> tuple[Any, jax.Array]:
    codes = quantize_to_grid(w[:, None], grid)
    return (codes[:, 0], jax.tree.map(lambda a: a[:, 0], grid)), dequantize_grid(codes, grid)[:, 0]


def _ranges_at_group_start(
    fit: Callable[..., Grid], group_size: int, columns: int, grid: Grid, Wt: jax.Array, start: jax.Array
) -> Grid:
    # Zeros beyond a ragged end change no range and add no error.
    group = start + jnp.arange(group_size)
    fresh = fit(jnp.where(group < columns, Wt[jnp.minimum(group, columns - 1)].T, 0.0))
    return jax.tree.map(lambda new, old: jnp.where(start % group_size == 0, new, old), fresh, grid)


@partial(jax.jit, static_argnames=("act_order", "block_size"))
def gptq_codebook(
    W: jax.Array,
    H: jax.Array,
    codebook: jax.Array,
    act_order: bool = True,
    damping: jax.Array | float = 0.01,
    block_size: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """(codes [N, K] int32, ok): GPTQ onto given row tables, codebook [N, C] ascending. ok as in `GPTQResult`."""
    _check(W, H)
    if codebook.shape[0] != W.shape[0]:
        raise ValueError(f"codebook {codebook.shape} must have one row for each of the {W.shape[0]} rows of W")

    def quantize_column(_: Any, w: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = assign_codes(w[:, None], codebook)
        return codes[:, 0], codebook_lookup(codebook, codes)[:, 0]

    order = visiting_order(H) if act_order else None
    codes, _, ok = compensated_rounding(W, H, quantize_column, order=order, damping=damping, block_size=block_size)
    return codes.T, ok


def visiting_order(H: jax.Array) -> jax.Array:
    """Column order [K] int32 by falling diag H [K, K]; equal ones keep their order."""
    return jnp.argsort(-jnp.diagonal(H), stable=True).astype(jnp.int32)


def gptq_or_rtn(
    W: jax.Array, H: jax.Array, bits: int, *, damping: float = 0.01, **options: Any
) -> tuple[jax.Array, Grid, GPTQReport]:
    """(codes, grid, report) of `gptq` with ten times the damping after each failure, up to 10, then of `rtn`.

    For one concrete W [N, K] and H [K, K], outside jit; `options` are the others of `gptq`.
    """
    result, report = raise_damping(lambda amount: gptq(W, H, bits, damping=amount, **options), H, damping)
    if result is not None:
        return result.codes, result.grid, report
    grid_options = ("group_size", "symmetric", "group_axis", "clip_search", "scale_dtype", "two_level")
    codes, grid = rtn(W, bits, **{name: options[name] for name in grid_options if name in options})
    return codes, grid, report


def raise_damping(attempt: Callable[[jax.Array], Any], H: jax.Array, damping: float) -> tuple[Any, GPTQReport]:
    """(attempt(damping), report) with the first damping whose result is ok: ten times as much each time, up to 10.

    (None, report with the reason) for a Hessian [K, K] that no damping makes usable. For concrete arrays.
    """
    dead = int(jnp.sum((jnp.diagonal(H) == 0).astype(jnp.int32)))
    if not bool(jnp.all(jnp.isfinite(H))):
        return None, GPTQReport(None, dead, "the Hessian has values that are not finite")
    if dead == H.shape[0]:
        return None, GPTQReport(None, dead, "the Hessian is zero: no calibration input reached this layer")
    while True:
        result = attempt(jnp.float32(damping))
        if bool(result.ok):
            return result, GPTQReport(damping, dead, None)
        if damping * 10 > DAMPING_LIMIT * 1.001:
            reason = f"the Hessian has no Cholesky factor even with damping {damping:g}"
            return None, GPTQReport(None, dead, reason)
        damping = max(damping * 10, 1e-4)


def _check(W: jax.Array, H: jax.Array) -> None:
    if W.ndim != 2 or H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(f"W {W.shape} must be [N, K] and H {H.shape} [K, K] over its columns")
