"""Blocks of the affine kernel that CTAs share, blocks that leave in tiles, and which blocks a problem gets."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import affine_matmul as affine
from tests.pallas_kernels.affine import arguments

# M, N, K, ..; block_m, block_k, row and k warpgroups. Of four CTAs in two clusters: blocks of their own, one or more
# that are shared, some by a cluster that has none left; inputs whose second half is shorter.
CLUSTERED = [
    ((3, 700, 1152, 4, 128, False, "bfloat16", "float16"), (8, 256, 1, 4)),
    ((16, 420, 4160, 3, None, False, "float16", "float16"), (16, 512, 1, 4)),
    ((9, 640, 2944, 4, 128, True, "int8", "float16"), (16, 256, 2, 2)),
    ((130, 1000, 1152, 4, 128, False, "int8", "bfloat16"), (128, 128, 2, 1)),
    ((40, 90, 320, 8, None, False, "int8", "float32"), (64, 128, 1, 1)),
    ((130, 300, 1152, 4, 128, False, "int8", "uint8"), (128, 128, 2, 1)),
]


# of five CTAs by stream-K: blocks of their own, whole ones and pieces, blocks that most of them share, ragged inputs
SHARED = [
    ((3, 700, 1152, 4, 128, False, "bfloat16", "float16"), (8, 256, 1, 4)),
    ((16, 64, 4160, 3, None, False, "float16", "float16"), (16, 512, 1, 4)),
    ((9, 640, 2944, 4, 128, True, "int8", "float16"), (16, 256, 2, 2)),
    ((300, 1000, 1152, 4, 128, False, "int8", "bfloat16"), (128, 128, 2, 1)),
    ((300, 300, 1008, 8, None, False, "int8", "float32"), (256, 128, 2, 1)),
    ((300, 1000, 1152, 4, 64, False, "int8", "uint8"), (256, 128, 2, 1)),
    ((300, 200, 576, 4, None, False, "bfloat16", "float32"), (256, 64, 2, 1)),
]
DISTRIBUTED = [(*case, {"blocks": 4, "cluster": 2}) for case in CLUSTERED]
DISTRIBUTED += [(*case, {"blocks": 5, "stream_k": True}) for case in SHARED]


@pytest.mark.parametrize(("shape", "blocks", "how"), DISTRIBUTED)
def test_blocks_shared_by_ctas_lower_for_cuda(
    shape: tuple[Any, ...], blocks: tuple[int, int, int, int], how: dict[str, Any]
) -> None:
    arrays, static, _ = arguments(shape)
    config = affine.Config(*blocks, stages=2, **how)

    def run(arrays: dict[str, Any]) -> jax.Array:
        return affine.affine_matmul(**arrays, **static, config=config)

    assert "mosaic_gpu" in jax.jit(run).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "blocks", "how"), DISTRIBUTED)
def test_blocks_shared_by_ctas_are_right(
    shape: tuple[Any, ...], blocks: tuple[int, int, int, int], how: dict[str, Any]
) -> None:
    arrays, static, expected = arguments(shape)
    config = affine.Config(*blocks, stages=2, **how)
    run = jax.jit(lambda arrays: affine.affine_matmul(**arrays, **static, config=config))
    for _ in range(3):  # what one call leaves in memory, the next one must not take for its own
        assert np.linalg.norm(np.asarray(run(arrays)) - expected) <= 2e-5 * np.linalg.norm(expected)


def batched() -> tuple[Any, jax.Array, np.ndarray]:
    """A function of a batch of tokens by stream-K, three times the same tokens, and what becomes of them."""
    shape, blocks = SHARED[-1]
    arrays, static, expected = arguments(shape)
    config = affine.Config(*blocks, stages=2, blocks=5, stream_k=True)

    def run(x: jax.Array) -> jax.Array:
        return affine.affine_matmul(**(arrays | {"x": x}), **static, config=config)

    return jax.jit(jax.vmap(run)), jnp.stack([arrays["x"]] * 3), expected


def test_a_batch_of_products_lowers_for_cuda() -> None:
    run, x, _ = batched()
    assert "mosaic_gpu" in run.trace(x).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
def test_a_batch_of_products_shares_no_semaphores() -> None:
    run, x, expected = batched()
    for each in np.asarray(run(x)):
        assert np.linalg.norm(each - expected) <= 2e-5 * np.linalg.norm(expected)


# outputs of 16 bits, a multiple of 64 of them: they leave in tiles, whose last tokens may not exist
TILED = [
    ((300, 320, 1152, 4, 128, False, "bfloat16", "bfloat16"), {}),
    ((77, 192, 576, 3, 64, False, "float16", "float16"), {}),
    ((65, 128, 1024, 4, None, False, "int8", "float32"), {}),
    ((261, 256, 1024, 8, None, False, "int8", "float32"), {"blocks": 5, "stream_k": True}),
    ((389, 192, 1152, 4, 128, False, "int8", "bfloat16"), {"blocks": 4, "cluster": 2}),
    ((300, 320, 1152, 3, 128, False, "int8", "uint8"), {}),
]


def tiled(shape: tuple[Any, ...], how: dict[str, Any]) -> tuple[Any, dict[str, Any], np.ndarray]:
    arrays, static, expected = arguments(shape)
    static["out_dtype"] = jnp.float16 if shape[6] == "float16" else jnp.bfloat16
    if how:
        static["config"] = affine.Config(128, 128, 2, stages=2, **how)
    return jax.jit(lambda arrays: affine.affine_matmul(**arrays, **static)), arrays, expected


@pytest.mark.parametrize(("shape", "how"), TILED)
def test_outputs_in_tiles_lower_for_cuda(shape: tuple[Any, ...], how: dict[str, Any]) -> None:
    run, arrays, _ = tiled(shape, how)
    assert "mosaic_gpu" in run.trace(arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "how"), TILED)
def test_outputs_in_tiles_are_right(shape: tuple[Any, ...], how: dict[str, Any]) -> None:
    run, arrays, expected = tiled(shape, how)
    got = np.asarray(run(arrays)).astype(np.float32)
    # of every token by itself, so that one of them at the edge counts; outputs and weights rounded to 8 bits or 11
    error = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.max(error) <= (1e-3 if shape[6] == "float16" else 6e-3)


def test_a_cluster_that_cannot_be_is_refused() -> None:
    arrays, static, _ = arguments(CLUSTERED[0][0])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"blocks": 3, "cluster": 2}, "3 blocks do not come in clusters of 2"),
        ({"blocks": 8, "cluster": 4}, "expected 1, or 2 and an even number"),
        ({"blocks": 4, "cluster": 2, "splits": 2}, "sums would be added in several ways"),
        ({"blocks": 4, "splits": 2, "stream_k": True}, "sums would be added in several ways"),
        ({"block_k": 2048, "blocks": 4, "cluster": 2}, "there is only one"),
        ({"blocks": 99, "stream_k": True}, "99 CTAs for 55 stages; expected one for each at least"),
    ]
    for changes, reason in cases:
        given: dict[str, Any] = {"block_m": 8, "block_k": 256, "row_warpgroups": 1, "k_warpgroups": 4} | changes
        config = affine.Config(**given)
        with pytest.raises(ValueError, match=reason):
            affine.affine_matmul(**arrays, **static, config=config)


def test_small_products_keep_exact_weights() -> None:
    # making tokens float16 is a launch of its own, which a small product does not earn back
    small = affine.Problem(128, 4096, 4096, 4, 128, False, "bfloat16", "float16")
    large = dataclasses.replace(small, tokens=2048, outputs=28672, inputs=8192)
    assert not affine.rounds_weights(small) and affine.rounds_weights(large)


def test_every_supported_problem_has_a_configuration() -> None:
    """Also where zero points of 64 outputs are less than a copy and no more are asked for: N = 4096, long groups."""
    sizes = itertools.product((208, 576, 4096, 28672), (64, 576, 4096, 28672))
    kinds = list(itertools.product((2, 4, 8), (64, 128, 512, None), (False, True)))
    beside = [("bfloat16", 1, ""), ("int8", 1, ""), ("int8", 1, "bfloat16"), ("int8", 3, "bfloat16")]
    scales = ("bfloat16", "uint8")
    found = 0
    for (inputs, outputs), (bits, group, zeros), (dtype, pieces, own) in itertools.product(sizes, kinds, beside):
        for tokens, scale in itertools.product((1,) if own else (1, 17, 64, 300), scales):
            size = 1 << 15 if zeros and group is None else group
            facts = tokens, outputs, inputs, bits, size, zeros, dtype, scale
            problem = affine.Problem(*facts, pieces=pieces, token_dtype=own)
            if affine.supported(problem) is None:
                assert affine.supported_config(problem, affine.choose(problem)) is None
                found += 1
    assert found > 4000
