"""GPTQ: what it must beat, what it must equal, and what it must survive."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.quantize.codebook import assign_codes, codebook_lookup, fit_codebook
from jquant.quantize.grid import dequantize_grid, fit_grid, spread_grid
from jquant.quantize.passes.gptq import (
    compensated_rounding,
    gptq,
    gptq_codebook,
    gptq_or_rtn,
    inverse_factor,
    visiting_order,
)
from jquant.quantize.passes.rtn import rtn
from jquant.quantize.two_level import fit_two_level


def problem(n=24, k=40, tokens=400, seed=0):
    """W [n, k] and the Hessian [k, k] of correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(tokens, k)) @ (np.eye(k) + 1.5 * rng.normal(size=(k, k)) / np.sqrt(k))
    X = X * np.exp(rng.normal(size=k))
    return jnp.asarray(rng.normal(size=(n, k)), jnp.float32), jnp.asarray(X.T @ X / tokens, jnp.float32)


def output_error(W, Q, H):
    D = np.asarray(W, np.float64) - np.asarray(Q, np.float64)
    return np.einsum("nk,kj,nj->", D, np.asarray(H, np.float64), D)


def plain_gptq(W, H, grid, order, damping=0.01):
    """The column loop in float64 with scales fixed beforehand: codes [N, K]."""
    scale, zero = (np.broadcast_to(np.asarray(a, np.float64), W.shape) for a in spread_grid(grid, W.shape))
    W, H = np.asarray(W, np.float64).copy(), np.asarray(H, np.float64).copy()
    W, H, scale, zero = W[:, order], H[order][:, order], scale[:, order], zero[:, order]
    H += damping * np.diag(H).mean() * np.eye(len(H))
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    codes = np.zeros(W.shape, np.int64)
    for k in range(len(H)):
        codes[:, k] = np.clip(np.round(W[:, k] / scale[:, k]) + zero[:, k], 0, 2**grid.bits - 1)
        error = (W[:, k] - scale[:, k] * (codes[:, k] - zero[:, k])) / U[k, k]
        W[:, k:] -= np.outer(error, U[k, k:])
    return codes[:, np.argsort(order)]


VARIANTS = [
    {},
    {"act_order": False},
    {"group_size": 16},
    {"group_size": 16, "symmetric": False},
    {"group_size": 12, "act_order": False, "static_groups": False},
    {"group_size": 16, "act_order": False, "static_groups": False, "symmetric": False},
    {"group_axis": "out"},
    {"group_axis": "out", "group_size": 16, "symmetric": False},
    {"clip_search": True, "group_size": 16},
    {"two_level": True, "group_size": 16},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_output_error_falls_and_weight_error_rises(options):
    W, H = problem()
    codes, grid, ok = gptq(W, H, 3, **options)
    grid_options = {k: v for k, v in options.items() if k not in ("act_order", "static_groups")}
    plain_codes, plain_grid = rtn(W, 3, **grid_options)
    assert bool(ok)
    assert codes.shape == W.shape and codes.dtype == jnp.int32 and grid.scales.shape == plain_grid.scales.shape
    assert int(codes.min()) >= 0 and int(codes.max()) <= 7
    Q, R = dequantize_grid(codes, grid), dequantize_grid(plain_codes, plain_grid)
    assert output_error(W, Q, H) < 0.8 * output_error(W, R, H)
    assert output_error(W, Q, np.eye(40)) > output_error(W, R, np.eye(40))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_identity_hessian_is_round_to_nearest(options):
    W, _ = problem()
    codes, grid, _ = gptq(W, jnp.eye(40), 3, **options)
    plain_codes, plain_grid = rtn(W, 3, **{k: v for k, v in options.items() if k not in ("act_order", "static_groups")})
    np.testing.assert_array_equal(codes, plain_codes)
    np.testing.assert_array_equal(grid.scales, plain_grid.scales)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 16])
def test_equals_the_plain_column_loop(act_order, symmetric, group_size):
    W, H = problem(seed=1)
    codes, grid, _ = gptq(W, H, 4, group_size, symmetric, act_order=act_order, block_size=8)
    order = np.asarray(visiting_order(H)) if act_order else np.arange(40)
    expected = plain_gptq(W, H, fit_grid(W, 4, group_size, symmetric), order)
    # A weight that float32 puts on the other side of a tie changes the rest of its row, and rarely more than that.
    assert (np.asarray(codes) != expected).any(axis=1).mean() <= 0.1


def test_factor_is_that_of_the_inverse():
    _, H = problem(seed=2)
    U, ok = inverse_factor(H, 0.01)
    damped = np.asarray(H, np.float64) + 0.01 * np.diag(np.asarray(H, np.float64)).mean() * np.eye(40)
    mean = np.diag(np.asarray(H, np.float64)).mean()
    assert bool(ok)
    np.testing.assert_array_equal(np.tril(U, -1), 0)
    inverse = np.linalg.inv(damped) * mean  # H is taken in units of its mean diagonal
    np.testing.assert_allclose(np.asarray(U, np.float64).T @ U, inverse, atol=1e-4 * np.abs(inverse).max())


def test_order_is_a_permutation_of_the_problem():
    W, H = problem(seed=3)
    order = visiting_order(H)
    codes, _, _ = gptq(W, H, 4)
    permuted, _, _ = gptq(W[:, order], H[order][:, order], 4, act_order=False)
    np.testing.assert_array_equal(codes[:, order], permuted)


@pytest.mark.parametrize("options", [VARIANTS[2], VARIANTS[5], VARIANTS[7]], ids=str)
def test_block_size_changes_nothing(options):
    W, H = problem(seed=4)
    results = [gptq(W, H, 3, block_size=b, **options).codes for b in (7, 128)]
    for other in results[1:]:
        # ties, as above
        assert (np.asarray(other) != np.asarray(results[0])).any(axis=1).mean() <= 0.1


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_unit_of_the_hessian_does_not_matter(factor):
    W, H = problem(seed=5)
    # a power of two would be exact; others round each entry once
    assert (gptq(W, H, 3).codes != gptq(W, H * factor, 3).codes).any(axis=1).mean() <= 0.1


@pytest.mark.parametrize("options", [{}, {"group_axis": "out"}, {"group_size": 16}], ids=str)
def test_dead_columns_are_plainly_rounded(options):
    W, H = problem(seed=6)
    dead = jnp.asarray([3, 17, 39])
    H = H.at[dead].set(0).at[:, dead].set(0)
    codes, grid, ok = gptq(W, H, 3, **options)
    plain, plain_grid = rtn(W, 3, **options)
    assert bool(ok)
    np.testing.assert_array_equal(codes[:, dead], plain[:, dead])
    alive = np.setdiff1d(np.arange(40), dead)
    Q, R = dequantize_grid(codes, grid), dequantize_grid(plain, plain_grid)
    assert output_error(W[:, alive], Q[:, alive], H[alive][:, alive]) < output_error(W, R, H)


def test_error_falls_with_bits():
    W, H = problem(seed=7)
    errors = []
    for bits in (2, 4, 8):
        codes, grid, _ = gptq(W, H, bits, 16)
        errors.append(output_error(W, dequantize_grid(codes, grid), H))
    assert all(b < a for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("options", [{}, {"act_order": False, "static_groups": False}, {"symmetric": False}], ids=str)
def test_ragged_group_tail(options):
    W, H = problem(seed=8)
    codes, grid, ok = gptq(W, H, 4, 16, **options)
    assert grid.scales.shape == (24, 3) and bool(ok)
    assert output_error(W, dequantize_grid(codes, grid), H) < output_error(W, W * 0, H) / 50


def test_few_tokens_are_rescued_by_damping():
    W, H = problem(tokens=5)
    codes, grid, report = gptq_or_rtn(W, H, 4, group_size=16)
    assert report.fallback is None and report.damping is not None
    plain, plain_grid = rtn(W, 4, 16)
    assert output_error(W, dequantize_grid(codes, grid), H) < output_error(W, dequantize_grid(plain, plain_grid), H)


def test_damping_rises_until_the_hessian_can_be_factored():
    W, H = problem(seed=9)
    H = H - 0.5 * jnp.mean(jnp.diagonal(H)) * jnp.eye(40)  # not positive definite any more
    assert not bool(gptq(W, H, 4).ok)
    codes, grid, report = gptq_or_rtn(W, H, 4)
    assert report.fallback is None and report.damping in (0.1, 1.0, 10.0)
    assert bool(jnp.all(jnp.isfinite(dequantize_grid(codes, grid))))


@pytest.mark.parametrize("kind", ["nan", "inf", "zero", "indefinite"])
def test_unusable_hessian_falls_back_and_says_why(kind):
    W, H = problem(seed=10)
    H, word = {
        "nan": (H.at[2, 3].set(jnp.nan), "not finite"),
        "inf": (H.at[2, 2].set(jnp.inf), "not finite"),
        "zero": (jnp.zeros_like(H), "zero"),
        "indefinite": (H.at[0, 1].set(1e9).at[1, 0].set(1e9), "Cholesky"),
    }[kind]
    for axis in ("in", "out"):
        codes, grid, report = gptq_or_rtn(W, H, 4, group_axis=axis, group_size=16)
        plain, plain_grid = rtn(W, 4, 16, True, axis)
        assert report.damping is None and report.fallback is not None and word in report.fallback
        np.testing.assert_array_equal(codes, plain)
        np.testing.assert_array_equal(grid.scales, plain_grid.scales)


def test_two_level_scales_are_found_before_rounding_and_outlive_a_fallback():
    W, H = problem(seed=13)
    expected = fit_two_level(W, 4, 16).scales
    for act_order in (True, False):
        grid = gptq(W, H, 4, 16, act_order=act_order, two_level=True).grid
        np.testing.assert_array_equal(grid.scales, expected)
    _, grid, report = gptq_or_rtn(W, jnp.zeros_like(H), 4, group_size=16, two_level=True)
    assert report.fallback is not None
    np.testing.assert_array_equal(grid.scales, expected)


def test_vmap_equals_a_loop_and_a_bad_member_hurts_no_other():
    problems = [problem(seed=s) for s in range(3)]
    W, H = (jnp.stack(a) for a in zip(*problems, strict=True))
    H = H.at[1, 0, 0].set(jnp.nan)
    batch = jax.vmap(lambda w, h: gptq(w, h, 3, 16))(W, H)
    np.testing.assert_array_equal(batch.ok, [True, False, True])
    for i in (0, 2):
        one = gptq(W[i], H[i], 3, 16)
        assert (np.asarray(batch.codes[i]) != np.asarray(one.codes)).any(axis=1).mean() <= 0.1
        np.testing.assert_array_equal(batch.grid.scales[i], one.grid.scales)


def test_codebook_rounding_beats_nearest_entries():
    W, H = problem(seed=11)
    codebook, nearest = fit_codebook(W, jnp.ones_like(W), 3)
    codes, ok = gptq_codebook(W, H, codebook)
    assert bool(ok) and codes.shape == W.shape
    ours, plain = (output_error(W, codebook_lookup(codebook, c), H) for c in (codes, nearest))
    assert ours < 0.8 * plain
    np.testing.assert_array_equal(gptq_codebook(W, jnp.eye(40), codebook)[0], nearest)


def test_columns_left_unquantized_absorb_the_error_of_the_others():
    W, H = problem(seed=12)
    codebook, _ = fit_codebook(W, jnp.ones_like(W), 3)
    kept = jnp.arange(40) >= 32

    def quantize_column(_, w, k):
        codes = assign_codes(w[:, None], codebook)
        return codes[:, 0], jnp.where(kept[k], w, codebook_lookup(codebook, codes)[:, 0])

    _, Q, ok = compensated_rounding(W, H, quantize_column, block_size=16)
    assert bool(ok)
    assert bool(jnp.any(Q[:, 32:] != W[:, 32:]))
    assert output_error(W, Q, H) < output_error(W, Q.at[:, 32:].set(W[:, 32:]), H)


def test_bad_arguments_say_what_was_expected():
    W, H = problem()
    with pytest.raises(ValueError, match="static_groups"):
        gptq(W, H, 4, 16, static_groups=False)
    with pytest.raises(ValueError, match="static_groups=True, or two_level=False"):
        gptq(W, H, 4, 16, act_order=False, static_groups=False, two_level=True)
    with pytest.raises(ValueError, match="groups of inputs"):
        gptq(W, H, 4, 16, group_axis="out", two_level=True)
    with pytest.raises(ValueError, match="over its columns"):
        gptq(W, H[:5, :5], 4)
    with pytest.raises(ValueError, match="one row for each"):
        gptq_codebook(W, H, jnp.zeros((3, 8)))
