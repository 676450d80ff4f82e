"""LNQ against a float64 transcription, against k-means where H is diagonal, and on unusable input."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.quantize.codebook import assign_codes, codebook_lookup, fit_codebook
from jquant.quantize.passes.lnq import lnq

undamped = partial(lnq, damping=0.0)  # the objectives below are of H as it is
N, K, BITS = 16, 40, 3


def problem(seed=0, tokens=400):
    """(W [N, K] heavy-tailed, H [K, K] of correlated inputs of unequal size, codebook, codes of a weighted k-means)."""
    rng = np.random.default_rng(seed)
    W = jnp.asarray(rng.standard_t(4, size=(N, K)), jnp.float32)
    mix = (np.eye(K) + 1.5 * rng.normal(size=(K, K)) / np.sqrt(K)) * np.exp(rng.normal(size=K))
    X = rng.normal(size=(tokens, K)) @ mix
    H = jnp.asarray(X.T @ X / tokens, jnp.float32)
    return W, H, *fit_codebook(W, jnp.broadcast_to(jnp.diagonal(H), W.shape), BITS)


def objective(W, H, codebook, codes, mask=None):
    """[N], in float64."""
    codebook = np.asarray(codebook).astype(np.float64)
    E = np.asarray(W, np.float64) - np.take_along_axis(codebook, np.asarray(codes), axis=1)
    E = E if mask is None else np.where(mask, 0, E)
    return np.einsum("nk,kj,nj->n", E, np.asarray(H, np.float64), E)


def best_table(W, H, codebook, codes, mask=None):
    """The C-step by least squares on L^T (P c - w), entries without members left alone; then sorted."""
    L = np.linalg.cholesky(np.asarray(H, np.float64))
    codebook, codes = np.asarray(codebook, np.float64).copy(), np.asarray(codes).copy()
    for n, w in enumerate(np.asarray(W, np.float64)):
        open_ = np.ones(K, bool) if mask is None else ~np.asarray(mask)[n]
        P = (codes[n][:, None] == np.arange(codebook.shape[1])) & open_[:, None]
        used = P.any(axis=0)
        codebook[n, used] = np.linalg.lstsq(L.T @ P[:, used], L.T @ np.where(open_, w, 0), rcond=None)[0]
        order = np.argsort(codebook[n], kind="stable")
        codebook[n], codes[n] = codebook[n, order], np.argsort(order)[codes[n]]
    return codebook, codes


def descend(W, H, codebook, codes, sweeps, mask=None):
    """The P-step, one weight at a time."""
    W, H, codes = np.asarray(W, np.float64), np.asarray(H, np.float64), np.asarray(codes).copy()
    for n, c in enumerate(np.asarray(codebook, np.float64)):
        for _ in range(sweeps):
            for i in range(K):
                if mask is not None and mask[n, i]:
                    continue
                e = c[codes[n]] - W[n]
                e = e if mask is None else np.where(mask[n], 0, e)
                e[i] = 0
                codes[n, i] = np.abs(c - (W[n, i] - H[i] @ e / H[i, i])).argmin()
    return codes


def plain_lnq(W, H, codebook, codes, rounds, sweeps, mask=None):
    """(codebook, codes, objectives [steps, N]) of C P C P ..., in float64."""
    trace = [objective(W, H, codebook, codes, mask)]
    for i in range(rounds + 1):
        if i:
            codes = descend(W, H, codebook, codes, sweeps, mask)
            trace.append(objective(W, H, codebook, codes, mask))
        codebook, codes = best_table(W, H, codebook, codes, mask)
        trace.append(objective(W, H, codebook, codes, mask))
    return codebook, codes, np.asarray(trace)


@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_transcription_in_float64(masked):
    W, H, codebook, codes = problem()
    mask = jnp.asarray(np.random.default_rng(1).random((N, K)) < 0.1) if masked else None
    for rounds, sweeps in ((0, 4), (1, 1), (2, 4)):
        result = undamped(W, H, codebook, codes, rounds=rounds, sweeps=sweeps, mask=mask)
        expected_table, expected_codes, trace = plain_lnq(W, H, codebook, codes, rounds, sweeps, mask)
        assert bool(result.ok) and result.codes.dtype == jnp.int32
        if mask is not None:
            expected_codes = np.where(mask, codes, expected_codes)
        same = (np.asarray(result.codes) == expected_codes).all(axis=1)
        # a weight that float32 puts on the other side of a tie takes its row to another, equally good end
        assert same.mean() >= 0.9
        np.testing.assert_allclose(np.asarray(result.codebook)[same], expected_table[same], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(result.objective_before, trace[0], rtol=1e-4)
        np.testing.assert_allclose(np.asarray(result.objective_after)[same], trace[-1][same], rtol=1e-4)
        got = objective(W, H, result.codebook, result.codes, mask)
        # float32 tables near their optimum, where the objective is flat
        np.testing.assert_allclose(got[same], trace[-1][same], rtol=1e-5)
        assert abs(got.sum() / trace[-1].sum() - 1) < 0.02
        assert (np.diff(trace, axis=0) <= 1e-9 * trace[:-1]).all()  # or the transcription is wrong


def test_no_step_raises_the_objective():
    W, H, codebook, codes = problem(seed=2)
    before = objective(W, H, codebook, codes)
    for rounds in range(4):
        result = undamped(W, H, codebook, codes, rounds=rounds, sweeps=2)
        after = objective(W, H, result.codebook, result.codes)
        assert (after <= before * (1 + 1e-5)).all()  # float32 objectives decide
        moved = descend(W, H, result.codebook, result.codes, 2)
        before = after
        assert (objective(W, H, result.codebook, moved) <= after * (1 + 1e-9)).all()
    assert before.sum() < 0.6 * objective(W, H, codebook, codes).sum()
    more = undamped(W, H, codebook, codes, rounds=2, sweeps=4)
    assert float(more.objective_after.sum()) < float(more.objective_before.sum())
    assert bool((more.objective_after <= more.objective_before).all())


@pytest.mark.parametrize("weighted", [True, False])
def test_diagonal_hessian_is_kmeans(weighted):
    W, H, _, _ = problem(seed=3)
    h = jnp.diagonal(H) if weighted else jnp.ones((K,))
    poor = jnp.broadcast_to(jnp.linspace(-2.0, 2.0, 2**BITS), (N, 2**BITS))
    result = undamped(W, jnp.diag(h), poor, assign_codes(W, poor), rounds=40, sweeps=1)
    lloyd, codes = np.asarray(poor, np.float64).copy(), np.asarray(assign_codes(W, poor))
    for _ in range(41):
        for n in range(N):
            mass = np.bincount(codes[n], np.asarray(h), 2**BITS)
            moment = np.bincount(codes[n], np.asarray(h) * np.asarray(W[n], np.float64), 2**BITS)
            lloyd[n][mass > 0] = moment[mass > 0] / mass[mass > 0]
        last, codes = codes, np.abs(np.asarray(W)[..., None] - np.sort(lloyd)[:, None]).argmin(axis=2)
        lloyd = np.sort(lloyd)
    settled = (last == codes).all(axis=1)
    assert settled.mean() > 0.8
    np.testing.assert_array_equal(np.asarray(result.codes)[settled], codes[settled])
    np.testing.assert_allclose(np.asarray(result.codebook)[settled], lloyd[settled], atol=1e-5)
    np.testing.assert_array_equal(result.codes, assign_codes(W, result.codebook))
    assert bool(jnp.all(jnp.diff(result.codebook, axis=1) >= 0))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_stored_tables_are_what_is_improved(dtype):
    W, H, codebook, codes = problem(seed=4)
    W, codebook = 0.02 * W, 0.02 * codebook
    result = undamped(W, H, codebook, codes, codebook_dtype=dtype)
    assert result.codebook.dtype == dtype
    before = objective(W, H, codebook.astype(dtype), codes)
    after = objective(W, H, result.codebook, result.codes)
    np.testing.assert_allclose(result.objective_before, before, rtol=1e-4)
    np.testing.assert_allclose(result.objective_after, after, rtol=1e-4)
    assert (after <= before * (1 + 1e-5)).all() and after.sum() < 0.7 * before.sum()
    again = undamped(W, H, result.codebook, result.codes, codebook_dtype=dtype)
    assert bool((again.objective_after <= again.objective_before).all())
    wide = result.codebook.astype(jnp.float32)
    assert bool(jnp.all(jnp.diff(wide, axis=1) >= 0))


def test_kept_entries_neither_pull_nor_change():
    W, H, codebook, codes = problem(seed=5)
    mask = np.random.default_rng(0).random((N, K)) < 0.1
    mask[3] = True
    result = undamped(W, H, codebook, codes, mask=jnp.asarray(mask))
    other = undamped(jnp.where(mask, 1e6, W), H, codebook, codes, mask=jnp.asarray(mask))
    for one, two in zip(result, other, strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(np.asarray(result.codes)[mask], np.asarray(codes)[mask])
    np.testing.assert_array_equal(result.codebook[3], codebook[3])
    before, after = (objective(W, H, *c, mask) for c in ((codebook, codes), (result.codebook, result.codes)))
    assert before[3] == after[3] == 0 == float(result.objective_after[3])
    rest = np.arange(N) != 3
    assert (after[rest] < before[rest]).all()


@pytest.mark.parametrize("bad", ["zero", "inf", "nan", "negative"])
def test_unusable_hessian_returns_the_start(bad):
    W, H, codebook, codes = problem(seed=6)
    H = {
        "zero": jnp.zeros_like(H),
        "inf": H.at[2, 3].set(jnp.inf),
        "nan": H.at[2, 2].set(jnp.nan),
        "negative": H.at[2, 2].set(-1.0),
    }[bad]
    result = undamped(W, H, codebook, codes)
    assert not bool(result.ok)
    np.testing.assert_array_equal(result.codebook, codebook)
    np.testing.assert_array_equal(result.codes, codes)
    assert not np.asarray(result.objective_before).any() and not np.asarray(result.objective_after).any()


def test_difficult_hessians_are_no_worse_and_finite():
    W, H, codebook, codes = problem(seed=7)
    singular = problem(seed=7, tokens=5)[1]
    dead = H.at[:3].set(0.0).at[:, :3].set(0.0)
    one = jnp.zeros_like(H).at[4, 4].set(2.0)
    for given in (singular, dead, one, 1e30 * H, 1e-30 * H):
        result = undamped(W, given, codebook, codes)
        assert bool(result.ok) and bool(jnp.all(jnp.isfinite(result.codebook)))
        before, after = objective(W, given, codebook, codes), objective(W, given, result.codebook, result.codes)
        # with 5 tokens for 40 columns little more than rounding is left of the objective
        assert (after <= before * (1 + 1e-5)).all() and after.sum() < 0.7 * before.sum()
    result = undamped(W, dead, codebook, codes)
    np.testing.assert_array_equal(result.codes[:, :3], assign_codes(W, result.codebook)[:, :3])


def test_repeated_and_unused_entries_stay_finite_and_sorted():
    W, H, codebook, codes = problem(seed=8)
    twice = codebook.at[:, 1::2].set(codebook[:, ::2])
    far = codebook.at[:, -1].set(50.0)  # no weight is near
    few = jnp.broadcast_to(jnp.asarray([-1.0, 0.5], jnp.float32), (N, K // 2, 2)).reshape(N, K)
    cases = [(W, twice), (W, far), (few, codebook), (jnp.zeros_like(W), codebook), (jnp.zeros_like(W), 0 * codebook)]
    for w, table in cases:
        start = assign_codes(w, table)
        result = undamped(w, H, table, start)
        assert bool(result.ok) and bool(jnp.all(jnp.isfinite(result.codebook)))
        assert bool(jnp.all(jnp.diff(result.codebook, axis=1) >= 0))
        before, after = objective(w, H, table, start), objective(w, H, result.codebook, result.codes)
        assert (after <= before * (1 + 1e-5) + 1e-12).all()
    result = undamped(few, H, codebook, assign_codes(few, codebook))
    np.testing.assert_allclose(codebook_lookup(result.codebook, result.codes), few, atol=1e-5)


def test_units_of_weights_change_nothing_but_the_unit():
    W, H, codebook, codes = problem(seed=9)
    plain = undamped(W, H, codebook, codes)
    for scale in (2.0**-70, 2.0**70):  # powers of two round alike
        result = undamped(scale * W, H, scale * codebook, codes)
        np.testing.assert_array_equal(result.codes, plain.codes)
        np.testing.assert_allclose(result.codebook / scale, plain.codebook, rtol=1e-6)


def test_damping_leads_from_the_hessian_to_its_diagonal():
    W, H, codebook, codes = problem(seed=10)
    diagonal = jnp.diag(jnp.diagonal(H))
    damped = (H + 0.25 * diagonal) / 1.25
    one, two = lnq(W, H, codebook, codes, damping=0.25), undamped(W, damped, codebook, codes)
    np.testing.assert_allclose(one.objective_before, objective(W, damped, codebook, codes), rtol=1e-4)
    assert (np.asarray(one.codes) == np.asarray(two.codes)).all(axis=1).mean() >= 0.9  # ties, as above
    kmeans, same = lnq(W, H, codebook, codes, damping=1e9), undamped(W, diagonal, codebook, codes)
    np.testing.assert_array_equal(kmeans.codes, same.codes)
    # judged by many more tokens of the same kind than it saw
    few, many = (problem(seed=10, tokens=t)[1] for t in (60, 20000))
    errors = [objective(W, many, *lnq(W, few, codebook, codes, damping=d)[:2]).sum() for d in (0.0, 0.1)]
    assert errors[1] < errors[0]


def test_block_size_changes_nothing():
    W, H, codebook, codes = problem(seed=11)
    whole = undamped(W, H, codebook, codes)
    blocks = undamped(W, H, codebook, codes, block_size=12)
    same = (np.asarray(whole.codes) == np.asarray(blocks.codes)).all(axis=1)
    assert same.mean() >= 0.9  # ties, as above
    np.testing.assert_allclose(
        np.asarray(whole.objective_after)[same], np.asarray(blocks.objective_after)[same], rtol=1e-4
    )


def test_vmap_equals_a_loop():
    batch = [jnp.stack(parts) for parts in zip(problem(seed=12), problem(seed=13), strict=True)]
    together = jax.vmap(undamped)(*batch)
    for i in range(2):
        alone = undamped(*(part[i] for part in batch))
        assert (np.asarray(together.codes[i]) == np.asarray(alone.codes)).all(axis=1).mean() >= 0.9
        np.testing.assert_allclose(together.objective_after[i].sum(), alone.objective_after.sum(), rtol=1e-2)


def test_nothing_is_factored_by_lapack():
    # two batched factorizations in flight block both threads of a small CPU's pool
    program = str(jax.make_jaxpr(undamped)(*problem()))
    assert "scan" in program and not any(name in program for name in ("cholesky", "triangular_solve"))


def test_bad_arguments_say_what_was_expected():
    W, H, codebook, codes = problem()
    with pytest.raises(ValueError, match=r"H \(39, 39\)"):
        undamped(W, H[1:, 1:], codebook, codes)
    with pytest.raises(ValueError, match="a row for each of the 16"):
        undamped(W, H, codebook[:4], codes)
    with pytest.raises(ValueError, match="codes .* must have the shape of W"):
        undamped(W, H, codebook, codes[:, 1:])
