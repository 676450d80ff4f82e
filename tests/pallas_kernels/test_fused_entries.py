"""Sparse entries inside the affine and the codebook product: they lower, refusals give reasons, GPUs are right."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import affine_matmul as affine, codebook_matmul as codebook
from pallas_kernels.fragments import pack_fragments
from pallas_kernels.sparse_matmul import EntryTiles, prepare_tiles


class Case(NamedTuple):
    """group_size 0 stands for a table a row."""

    m: int
    n: int
    k: int
    bits: int
    group_size: int | None
    zeros: bool
    x: str
    share: float


CASES = [
    Case(1, 64, 128, 4, 128, False, "bfloat16", 0.01),
    Case(5, 100, 584, 4, 64, True, "float16", 0.005),
    Case(16, 136, 1024, 3, 128, True, "bfloat16", 0.05),
    Case(64, 320, 1032, 2, 64, False, "bfloat16", 0.005),
    Case(77, 256, 1024, 3, None, False, "float16", 0.02),
    Case(130, 200, 1152, 4, 128, True, "bfloat16", 0.005),
    Case(300, 256, 1024, 8, 256, False, "bfloat16", 0.02),
    Case(300, 256, 1024, 4, None, True, "bfloat16", 0.005),
    Case(1, 64, 64, 3, 0, False, "bfloat16", 0.02),
    Case(9, 200, 328, 2, 0, False, "float16", 0.005),
    Case(70, 192, 2056, 4, 0, False, "bfloat16", 0.01),
    Case(300, 264, 264, 3, 0, False, "bfloat16", 0.005),
]


def _made(case: Case) -> tuple[dict[str, Any], np.ndarray]:
    """Arguments of the product, and the decoded weight with its entries, float64."""
    rng = np.random.default_rng(case.m + case.n)
    shape = case.n, case.k
    codes = rng.integers(0, 2**case.bits, shape)
    there = rng.random(shape) < case.share
    there[case.n // 2] = True  # sixteen rounds of entries
    there[:64, :64] |= case.share > 0.01  # and a tile that is full
    row, column = np.nonzero(there)
    pointer = np.searchsorted(row, np.arange(case.n + 1))
    if case.group_size == 0:
        table = jnp.asarray(rng.normal(size=(case.n, 2**case.bits)), case.x)
        scales = jnp.asarray(rng.uniform(0.5, 2, case.n), jnp.float32)
        weight = np.take_along_axis(np.asarray(table, np.float64), codes, axis=1)
        scale = np.asarray(scales, np.float64)[:, None]
        order, more = "rows", {"tables": codebook.prepare_tables(table, case.x), "scales": scales}
    else:
        size = case.group_size or case.k
        grid = (-(-case.k // size), case.n)
        scales = jnp.asarray(rng.uniform(0.01, 0.02, grid), jnp.float16)
        zeros = rng.integers(0, 2**case.bits, grid) if case.zeros else np.full(grid, 2 ** (case.bits - 1))
        group = np.arange(case.k) // size
        weight, scale = codes - zeros[group].T, np.asarray(scales, np.float64)[group].T
        order, more = "pairs", {"scales": scales, "group_size": case.group_size}
        if case.zeros:
            more["zeros"] = jnp.asarray(zeros, jnp.uint8)
    scale = np.broadcast_to(scale, shape)
    # some hundred times the step of the grid, or the typical entry of a table
    values = (rng.normal(size=row.size) * 10).astype(np.float16)
    entries = prepare_tiles(values / scale[row, column].astype(np.float32), column, pointer, case.k, case.x)
    arguments: dict[str, Any] = {
        "x": jnp.asarray(rng.standard_normal((case.m, case.k)), case.x),
        "words": pack_fragments(jnp.asarray(codes), case.bits, order),
        "bits": case.bits,
        "outputs": case.n,
        "entries": entries,
        "out_dtype": jnp.float32,
        **more,
    }
    weight = weight * scale
    weight[row, column] += values.astype(np.float64)
    return arguments, weight


def _product(case: Case, arguments: dict[str, Any], config: affine.Config) -> Any:
    function = codebook.codebook_matmul if case.group_size == 0 else affine.affine_matmul
    static = {name: arguments[name] for name in ("bits", "outputs", "out_dtype", "group_size") if name in arguments}
    arrays = {name: value for name, value in arguments.items() if name not in static}
    return jax.jit(lambda arrays: function(**arrays, **static, config=config)), arrays


def _configs(case: Case, arguments: dict[str, Any]) -> list[affine.Config]:
    """The chosen one, and others that part the inputs."""
    scale = "float32" if case.group_size == 0 else "float16"
    size = case.group_size or None
    if size is None and case.zeros:
        size = 2**20
    words = arguments["entries"].slots.shape[2]
    this = affine.Problem(case.m, case.n, case.k, case.bits, size, case.zeros, case.x, scale, words)
    chosen = (codebook.choose if case.group_size == 0 else affine.choose)(this)
    others = [
        dataclasses.replace(chosen, block_m=min(chosen.block_m, 64), **changes)
        for changes in (
            {"block_k": 256, "row_warpgroups": 1, "k_warpgroups": 2, "stages": 2, "scale": "sum"},
            {"block_k": 128, "row_warpgroups": 2, "k_warpgroups": 1, "stages": 2, "splits": 2, "scale": "operand"},
        )
    ]
    return [chosen, *(config for config in others if affine.supported_config(this, config) is None)]


@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[8], CASES[9]], ids=str)
def test_products_with_entries_lower_for_cuda(case: Case) -> None:
    arguments, _ = _made(case)
    configs = _configs(case, arguments)
    assert len(configs) > 1
    for config in configs:
        run, arrays = _product(case, arguments, config)
        assert "mosaic_gpu" in run.trace(arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_product_is_that_of_the_weight_with_its_entries(case: Case) -> None:
    arguments, weight = _made(case)
    expected = np.asarray(arguments["x"], np.float64) @ weight.T
    # An entry is rounded to 16 bits, its sum with the weight too, and a scaled operand and its scale once each: four
    # times up to half a unit in the last of 8 or 11 bits, 2**-8 or 2**-11. Every output is judged by itself: an entry
    # that is missing, or added twice, is an error of order one there.
    tolerance = 4 * (2**-8 if case.x == "bfloat16" else 2**-11)
    size = np.linalg.norm(weight, axis=1) * np.sqrt(np.mean(np.asarray(arguments["x"], np.float64) ** 2, axis=0)).max()
    for config in _configs(case, arguments):
        run, arrays = _product(case, arguments, config)
        error = np.sqrt(np.mean((np.asarray(run(arrays)) - expected) ** 2, axis=0)) / size
        assert np.max(error) <= tolerance, (config, int(np.argmax(error)), float(np.max(error)))


def test_every_problem_with_entries_has_a_configuration() -> None:
    for tokens in (1, 9, 64, 100, 4096):
        for bits in (2, 3, 4, 8):
            for size in (0, None, 64, 128, 192, 512):
                for outputs, inputs in ((64, 64), (4096, 11008)):
                    for words in (32, 256):
                        this = affine.Problem(
                            tokens, outputs, inputs, bits, size or None, False, "bfloat16", "float16", words
                        )
                        family = codebook if size == 0 else affine
                        if family.supported(this) is None:
                            assert affine.supported_config(this, family.choose(this)) is None
                        else:
                            assert size == 192 or (size == 0 and bits == 8)


def test_entries_that_cannot_be_added_say_why() -> None:
    case = CASES[0]
    arguments, _ = _made(case)
    this = affine.Problem(4, 64, 128, 4, 128, False, "int8", "float16", 32)
    for family in (affine, codebook):
        assert "activations are int8" in (family.supported(this) or "")
    this = dataclasses.replace(this, group_size=192, x_dtype="bfloat16")
    assert "group_size=192" in (affine.supported(this) or "")
    halves = affine.Config(8, 128, 1, k_warpgroups=2)
    assert "64 inputs a warpgroup" in (
        affine.supported_config(dataclasses.replace(this, group_size=None), halves) or ""
    )
    arguments.pop("entries")
    other = EntryTiles(jnp.zeros((2, 1, 32), jnp.uint32), jnp.zeros(1, jnp.uint32), "bfloat16")
    with pytest.raises(ValueError, match=r"slots of entries have shape \[2, 1, 32\]; expected \[1, 1, 'words'\]"):
        affine.affine_matmul(**arguments, entries=other)
    other = EntryTiles(other.slots[:1], other.overflow, "float16")
    with pytest.raises(ValueError, match="entries are float16 and x is bfloat16"):
        affine.affine_matmul(**arguments, entries=other)
