"""QUIK: its column loop transcribed in float64, what it must equal at both ends, 2:4, and what it must survive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.format.semistructured import dequantize_semistructured, pack_semistructured
from jquant.format.weights import base_columns
from jquant.quantize.passes.gptq import compensated_rounding, gptq
from jquant.quantize.passes.quik import (
    fraction_count,
    outlier_columns,
    outlier_count,
    quik,
    quik_or_rtn,
    row_grid,
    scaled_count,
)
from jquant.quantize.passes.rtn import rtn
from jquant.quantize.passes.sparsegpt import sparse_rounding

N, K, KEPT = 24, 40, 4


def problem(seed=0, tokens=400):
    """W [N, K], H [K, K] and amax [K] of correlated inputs, a few of which are much larger than the others."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(tokens, K)) @ (np.eye(K) + 1.5 * rng.normal(size=(K, K)) / np.sqrt(K))
    X = X * np.exp(0.5 * rng.normal(size=K))
    X[:, rng.choice(K, KEPT, replace=False)] *= 20
    W = jnp.asarray(rng.normal(size=(N, K)), jnp.float32)
    return W, jnp.asarray(X.T @ X / tokens, jnp.float32), jnp.asarray(np.abs(X).max(axis=0), jnp.float32)


def dense(result, index):
    """The matrix [N, K] in float64 that a result stands for."""
    zeros = 2**3 if result.zeros is None else np.asarray(result.zeros)
    full = np.zeros((N, K))
    steps = np.asarray(result.codes) - zeros
    full[:, np.setdiff1d(np.arange(K), index)] = np.asarray(result.scales, np.float64) * steps
    full[:, index] = result.weight
    return full


def output_error(W, Q, H):
    D = np.asarray(W, np.float64) - np.asarray(Q, np.float64)
    return np.einsum("nk,kj,nj->", D, np.asarray(H, np.float64), D)


def published(W, H, amax, index, *, clip, order, sparse=False, damping=0.01):
    """The released algorithm in float64, 4 bits: codes -8 .. 7 of all columns, scales, the compensated matrix, mask."""
    W, H, amax = (np.asarray(a, np.float64) for a in (W, H, amax))
    base = np.setdiff1d(np.arange(K), index)
    key = amax if order == "ascending" else -np.diag(H)
    perm = np.concatenate([base[np.argsort(key[base], kind="stable")], index])
    scales = np.abs(W[:, base]).max(axis=1) / 7
    if clip:
        best, first = np.full(N, np.inf), scales
        for p in [1 - i / 100 for i in range(80)]:
            s = (p * first)[:, None]
            error = (np.abs(np.clip(np.round(W[:, base] / s), -8, 7) * s - W[:, base]) ** 2.4).sum(axis=1)
            scales, best = np.where(error < best, p * first, scales), np.minimum(error, best)
    W, H = W[:, perm].copy(), H[perm][:, perm]
    H = H + damping * np.diag(H).mean() * np.eye(K)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    codes, mask = np.zeros((N, K), np.int64), np.ones((N, K), bool)
    for k in range(len(base)):
        if sparse and k % 4 == 0:
            score = W[:, k : k + 4] ** 2 / np.diag(U)[k : k + 4] ** 2
            np.put_along_axis(mask, k + np.argsort(score, axis=1)[:, :2], False, axis=1)
        codes[:, k] = np.where(mask[:, k], np.clip(np.round(W[:, k] / scales), -8, 7), 0)
        error = (W[:, k] - scales * codes[:, k]) / U[k, k]
        W[:, k] = scales * codes[:, k]
        W[:, k + 1 :] -= np.outer(error, U[k, k + 1 :])
    back = np.argsort(perm)
    return codes[:, back], scales, W[:, back], mask[:, back]


@pytest.mark.parametrize(
    ("clip", "order", "sparsity"),
    [
        (True, "ascending", None),
        (False, "act_order", None),
        (True, "ascending", (2, 4)),
        (False, "act_order", (2, 4)),
    ],
)
def test_equals_the_published_column_loop(clip, order, sparsity):
    W, H, amax = problem(seed=1)
    index = outlier_columns(amax, KEPT)
    base = np.setdiff1d(np.arange(K), index)
    options = {"clip_search": clip, "order": order, "sparsity": sparsity, "scale_dtype": jnp.float32}
    result = quik(W, H, amax, 4, index, block_size=10, **options)
    codes, scales, full, mask = published(W, H, amax, index, clip=clip, order=order, sparse=sparsity is not None)
    assert bool(result.ok) and result.codes.dtype == jnp.int32 and result.weight.dtype == jnp.float32
    # scales are three float32 operations from the absolute maximum
    np.testing.assert_allclose(result.scales[:, 0], scales, rtol=1e-6)
    # A weight that float32 puts on the other side of a tie changes the rest of its row, and rarely more than that.
    same = (np.asarray(result.codes) - 8 == codes[:, base]).all(axis=1)
    assert same.mean() >= 0.9
    # kept columns have been through 36 float32 updates of order one
    np.testing.assert_allclose(np.asarray(result.weight)[same], full[same][:, index], atol=1e-3)
    if sparsity is not None:
        np.testing.assert_array_equal(np.asarray(result.mask)[same], mask[same][:, base])


def test_without_kept_columns_it_is_gptq():
    W, H, amax = problem(seed=2)
    none = jnp.zeros((0,), jnp.int32)
    ours = quik(W, H, amax, 4, none, order="act_order")
    theirs = gptq(W, H, 4, act_order=True, clip_search=True)
    np.testing.assert_array_equal(ours.codes, theirs.codes)
    np.testing.assert_array_equal(ours.scales, theirs.grid.scales)
    assert ours.weight.shape == (N, 0)
    order = jnp.argsort(amax)
    ours = quik(W, H, amax, 4, none)
    theirs = gptq(W[:, order], H[order][:, order], 4, act_order=False, clip_search=True)
    np.testing.assert_array_equal(ours.order, order)
    np.testing.assert_array_equal(ours.codes[:, order], theirs.codes)


def test_with_every_column_kept_it_is_exact():
    W, H, amax = problem(seed=2)
    for result in (
        quik(W, H, amax, 4, jnp.arange(K), sparsity=(2, 4)),
        quik_or_rtn(W, jnp.full_like(H, jnp.nan), amax, 4, jnp.arange(K))[0],
    ):
        np.testing.assert_array_equal(result.weight, W)
        assert result.codes.shape == (N, 0) and result.scales.shape == (N, 1) and bool(result.ok)


def test_kept_columns_last_beat_kept_columns_first():
    W, H, amax = problem(seed=3)
    index = outlier_columns(amax, KEPT)
    base = base_columns(index, K - KEPT)
    grid = row_grid(W[:, base], 3)
    kept = jnp.zeros((K,), bool).at[index].set(True)

    def quantize_column(_, w, k):
        half, scale = 4.0, grid.scales[:, 0].astype(jnp.float32)
        return None, jnp.where(kept[k], w, scale * (jnp.clip(jnp.round(w / scale) + half, 0, 7) - half))

    visit = base[jnp.argsort(amax[base])]
    errors = []
    for order in (jnp.concatenate([visit, index]), jnp.concatenate([index, visit])):
        _, decoded, _ = compensated_rounding(W, H, quantize_column, order=order)
        errors.append(output_error(W, decoded, H))
    assert errors[0] < errors[1]
    _, decoded, _ = compensated_rounding(W, H, quantize_column, order=jnp.concatenate([visit, index]))
    result = quik(W, H, amax, 3, index)
    # the same loop, so the same kept columns
    np.testing.assert_allclose(result.weight, decoded[:, index], atol=1e-5)
    assert bool(jnp.any(result.weight != W[:, index]))


def test_keeping_large_inputs_pays_and_every_order_beats_rounding():
    W, H, amax = problem(seed=4)
    index = np.asarray(outlier_columns(amax, KEPT))
    smallest = jnp.sort(jnp.argsort(amax)[:KEPT])
    codes, grid = rtn(W, 4, clip_search=True)
    nearest = output_error(W, np.asarray(grid.scales, np.float64) * (np.asarray(codes) - 8), H)
    kept = {
        order: output_error(W, dense(quik(W, H, amax, 4, index, order=order), index), H)
        for order in ("ascending", "act_order")
    }
    others = output_error(W, dense(quik(W, H, amax, 4, smallest), np.asarray(smallest)), H)
    assert max(kept.values()) < others < nearest
    asymmetric = quik(W, H, amax, 4, index, symmetric=False)
    assert asymmetric.zeros is not None and asymmetric.zeros.shape == (N, 1)
    assert output_error(W, dense(asymmetric, index), H) < others


def test_scales_are_the_textbook_ones_or_one_of_eighty_shrunk_ones():
    W, _, _ = problem(seed=5)
    W = W.at[3].set(0.0)
    peak = np.abs(np.asarray(W, np.float64)).max(axis=1)
    plain = np.asarray(row_grid(W, 4, clip_search=False, scale_dtype=jnp.float32).scales)[:, 0]
    np.testing.assert_allclose(np.delete(plain, 3), np.delete(peak / 7, 3), rtol=1e-6)
    assert plain[3] == 1.0
    shrunk = np.delete(np.asarray(row_grid(W, 4, scale_dtype=jnp.float32).scales)[:, 0] / (peak / 7 + (peak == 0)), 3)
    np.testing.assert_allclose(shrunk * 100, np.round(shrunk * 100), atol=1e-3)  # p is a whole percentage
    assert shrunk.min() >= 0.2099 and shrunk.max() <= 1.0001 and len(np.unique(np.round(shrunk, 2))) > 3


def test_pattern_holds_in_the_stored_order_and_survives_packing():
    W, H, amax = problem(seed=6)
    index = outlier_columns(amax, KEPT)
    result = quik(W, H, amax, 4, index, sparsity=(2, 4))
    mask = np.asarray(result.mask)
    fours = mask[:, result.order].reshape(N, -1, 4)
    assert (fours.sum(axis=-1) == 2).all()
    assert (np.asarray(result.codes)[~mask] == 8).all()
    assert not (mask.reshape(N, -1, 4).sum(axis=-1) == 2).all()  # it would be lost in the original order
    packed = pack_semistructured(result.codes, result.mask, result.scales, 4, result.order)
    expected = np.asarray(result.scales, np.float32) * (np.asarray(result.codes) - 8).astype(np.float32)
    np.testing.assert_array_equal(dequantize_semistructured(packed), expected)
    plain, _ = quik_or_rtn(W, jnp.zeros_like(H), amax, 4, index, sparsity=(2, 4))
    assert output_error(W, dense(result, index), H) < 0.8 * output_error(W, dense(plain, index), H)


def test_identity_hessian_prunes_the_smallest_and_rounds_the_rest():
    W, _, amax = problem(seed=7)
    index = outlier_columns(amax, KEPT)
    result = quik(W, jnp.eye(K), amax, 4, index, sparsity=(2, 4))
    plain, report = quik_or_rtn(W, jnp.zeros((K, K)), amax, 4, index, sparsity=(2, 4))
    assert report.fallback is not None
    for ours, theirs in zip(result[:-1], plain[:-1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_pruning_alone_is_sparsegpt_whatever_the_block():
    W, H, _ = problem(seed=8)
    order = jnp.arange(K, dtype=jnp.int32)
    results = [
        sparse_rounding(W, H, lambda _, w, k: (None, w), (2, 4), order=order, prunable=36, block_size=block)
        for block in (6, 128)
    ]
    for _, decoded, mask, ok in results:
        assert bool(ok) and (np.asarray(mask)[:, :36].reshape(N, 9, 4).sum(axis=-1) == 2).all()
        assert np.asarray(mask)[:, 36:].all() and not np.asarray(decoded)[~np.asarray(mask)].any()
    same = (np.asarray(results[0][2]) == np.asarray(results[1][2])).all(axis=1)
    assert same.mean() >= 0.9  # near-equal scores may swap
    magnitude = np.abs(W)[:, :36].reshape(N, 9, 4)
    largest = np.argsort(np.argsort(magnitude, axis=-1), axis=-1) >= 2
    pruned = np.concatenate([np.where(largest, W[:, :36].reshape(N, 9, 4), 0).reshape(N, 36), W[:, 36:]], axis=1)
    assert output_error(W, results[1][1], H) < 0.5 * output_error(W, pruned, H)


def test_dead_inputs_are_counted_and_are_the_first_to_be_pruned():
    W, H, amax = problem(seed=9)
    index = outlier_columns(amax, KEPT)
    base = np.setdiff1d(np.arange(K), index)
    dead = base[np.argsort(np.asarray(amax)[base])[:2]]  # in the first four visited
    H = H.at[dead].set(0).at[:, dead].set(0)
    result, report = quik_or_rtn(W, H, amax, 4, index)
    assert report.dead_columns == 2 and report.fallback is None
    nearest = np.clip(np.round(W[:, dead] / result.scales.astype(jnp.float32)) + 8, 0, 15)
    np.testing.assert_array_equal(np.asarray(result.codes)[:, np.searchsorted(base, dead)], nearest)
    sparse = quik(W, H, amax, 4, index, sparsity=(2, 4))
    assert bool(sparse.ok) and not np.asarray(sparse.mask)[:, np.searchsorted(base, dead)].any()


@pytest.mark.parametrize("sparsity", [None, (2, 4)])
def test_unusable_hessian_keeps_columns_and_rounds_the_rest(sparsity):
    W, H, amax = problem(seed=10)
    index = outlier_columns(amax, KEPT)
    base = W[:, base_columns(index, K - KEPT)]
    indefinite = H.at[0, 1].set(1e9).at[1, 0].set(1e9)
    for bad, word in ((H.at[2, 2].set(jnp.inf), "not finite"), (jnp.zeros_like(H), "zero"), (indefinite, "Cholesky")):
        result, report = quik_or_rtn(W, bad, amax, 4, index, sparsity=sparsity)
        codes, grid = rtn(base, 4, clip_search=True)
        assert report.damping is None and report.fallback is not None and word in report.fallback
        np.testing.assert_array_equal(result.scales, grid.scales)
        np.testing.assert_array_equal(result.weight, W[:, index])
        np.testing.assert_array_equal(result.codes, codes if result.mask is None else np.where(result.mask, codes, 8))


def test_damping_rises_and_scales_take_the_type_they_need():
    W, H, amax = problem(seed=11)
    index = outlier_columns(amax, KEPT)
    indefinite = H - 0.5 * jnp.mean(jnp.diagonal(H)) * jnp.eye(K)
    result, report = quik_or_rtn(W, indefinite, amax, 4, index)
    assert report.fallback is None and report.damping in (0.1, 1.0, 10.0) and result.scales.dtype == jnp.float16
    tiny, _ = quik_or_rtn(W * 1e-6, H, amax, 4, index)
    assert tiny.scales.dtype == jnp.float32 and bool(jnp.all(jnp.isfinite(tiny.weight)))


def test_vmap_equals_a_loop_and_a_bad_member_hurts_no_other():
    W, H, amax = (jnp.stack(a) for a in zip(*(problem(seed) for seed in range(3)), strict=True))
    index = jnp.stack([outlier_columns(a, KEPT) for a in amax])
    H = H.at[1, 0, 0].set(jnp.nan)
    batch = jax.vmap(lambda w, h, a, i: quik(w, h, a, 4, i, sparsity=(2, 4)))(W, H, amax, index)
    np.testing.assert_array_equal(batch.ok, [True, False, True])
    for i in (0, 2):
        one = quik(W[i], H[i], amax[i], 4, index[i], sparsity=(2, 4))
        assert (np.asarray(batch.codes[i]) != np.asarray(one.codes)).any(axis=1).mean() <= 0.1  # ties
        np.testing.assert_array_equal(batch.scales[i], one.scales)


def test_outliers_are_the_largest_inputs_and_the_rules_count_them():
    amax = jnp.asarray([1.0, 5.0, 2.0, 5.0, jnp.nan, 0.0, 5.0])
    assert outlier_columns(amax, 3).tolist() == [1, 3, 4]  # the NaN, then the first of the equal ones
    assert outlier_columns(amax, 0).tolist() == [] and outlier_columns(amax, 7).tolist() == list(range(7))
    assert outlier_columns(amax, 3).dtype == jnp.int32
    finite = amax[:4]
    assert outlier_count(finite, 4, 256, threshold=5.0) == 0 and outlier_count(finite, 4, 256, threshold=4.9) == 256
    assert outlier_count(jnp.zeros(4), 4, 256) == 0 and outlier_count(amax, 7, 256, threshold=1e9) == 256
    # LLaMA-2-70B's and 7B's down projections, Falcon-7B's, and a layer narrower than the model
    assert [scaled_count(256, k, h) for k, h in ((28672, 8192), (11008, 4096), (18176, 4544), (512, 1024))] == [
        768,
        512,
        1024,
        256,
    ]
    assert fraction_count(1 / 32, 28672, 256) == 896 and fraction_count(1 / 32, 8192, 256) == 256


def test_bad_arguments_say_what_was_expected():
    W, H, amax = problem()
    index = outlier_columns(amax, KEPT)
    with pytest.raises(ValueError, match="expected 0 to 40"):
        outlier_columns(amax, 41)
    with pytest.raises(ValueError, match="each of 7 inputs"):
        outlier_count(amax, 7, 1)
    with pytest.raises(ValueError, match="over its columns"):
        quik(W, H[:5, :5], amax, 4, index)
    with pytest.raises(ValueError, match="expected 'ascending'"):
        quik(W, H, amax, 4, index, order="random")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="keep 1 more of them as outliers"):
        quik(W, H, amax, 4, index[:3], sparsity=(2, 4))
    with pytest.raises(ValueError, match="symmetric=True"):
        quik(W, H, amax, 4, index, sparsity=(2, 4), symmetric=False)
    with pytest.raises(ValueError, match="no packed form"):
        quik(W, H, amax, 4, index, sparsity=(1, 4))
    with pytest.raises(ValueError, match="prunes nothing or everything"):
        sparse_rounding(W, H, lambda _, w, k: (None, w), (4, 4), order=jnp.arange(K), prunable=K)
    with pytest.raises(ValueError, match="2 to 8"):
        quik(W, H, amax, 9, index)
    with pytest.raises(ValueError, match="ascending columns"):
        quik_or_rtn(W, H, amax, 4, index[::-1])
