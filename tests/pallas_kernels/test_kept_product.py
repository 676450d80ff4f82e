"""Kept columns inside the affine and the codebook product: registers on NumPy, lowering, refusals; numbers on a GPU.

The end of a block runs here on arrays of 128 threads, each instruction replaced by its definition: sums are scaled,
words are read into the operand of the tensor core, whose product follows the tables of the PTX manual, and y is stored.
"""

import itertools
import math
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import affine_matmul as affine, codebook_matmul as codebook
from pallas_kernels.affine_matmul import choice, config as configs, epilogue, kept_product
from pallas_kernels.fragments import pack_fragments, slot_order
from pallas_kernels.kept_columns import KeptFragments, prepare_kept

THREAD = np.arange(128)
R0 = THREAD // 32 * 16 + THREAD % 32 // 4  # row r0 of a thread, and its first token or column
T2 = THREAD % 4 * 2


class Instructions:
    """What the instructions mean; a register is [128], an array in global memory stands for its address."""

    def __init__(self, shared: np.ndarray) -> None:
        self.shared = shared  # uint32 words

    def load_shared(self, base: Any, offset: np.ndarray, count: int) -> list[np.ndarray]:
        address = base + offset
        assert not np.any(address % (4 * count))
        return [self.shared[address // 4 + i] for i in range(count)]

    def load_float(self, base: np.ndarray, index: np.ndarray, dtype: str) -> np.ndarray:
        assert base.dtype == dtype
        return base[index].astype(np.float32)

    def address_of_float(self, base: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert base.dtype == np.float32
        return base, index

    def load_ahead(self, address: Any, index: np.ndarray, ahead: int, count: int) -> np.ndarray:
        base, first = address
        inside = index < count - ahead
        place = first + ahead
        assert np.all(place[inside] < base.size)
        return np.where(inside, base[np.minimum(place, base.size - 1)], np.float32(0))

    def multiply(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a * b

    def multiply_add(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return (a.astype(np.float64) * b + c).astype(np.float32)

    def float_constant(self, value: float) -> np.ndarray:
        return np.full(128, value, np.float32)

    def sum_of_four(self, value: np.ndarray) -> np.ndarray:
        return np.repeat(value.reshape(32, 4).sum(axis=1), 4)

    def store_output(self, base: np.ndarray, value: np.ndarray, index: Any, sizes: tuple[int, int], dtype: str) -> None:
        split, token, row = index
        inside = (token < sizes[0]) & (row < sizes[1])
        base[split, token[inside], row[inside]] = value[inside]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs the instructions over words in shared memory."""

    def install(words: np.ndarray) -> None:
        arithmetic = types.SimpleNamespace(
            addi=lambda a, b: a + b,
            addf=lambda a, b: a + b,
            muli=lambda a, b: a * b,
            andi=lambda a, b: a & b,
            shrui=lambda a, b: a >> b,
            minui=np.minimum,
        )
        for module in (epilogue, kept_product):
            monkeypatch.setattr(module, "ops", Instructions(words.reshape(-1)))
            monkeypatch.setattr(module, "arith", arithmetic)
            monkeypatch.setattr(module, "constant", lambda value: np.full(128, value))
        monkeypatch.setattr(epilogue.compat, "thread_in_warpgroup", lambda: THREAD)

    return install


def multiplied(y: list[np.ndarray], fragments: list[list[np.ndarray]], columns: np.ndarray) -> list[np.ndarray]:
    """Four m64k16 on top of y: columns [block_m, 64] is the operand in shared memory."""
    matrix = np.full((64, 64), np.nan)
    for step, registers in enumerate(fragments):
        for i, register in enumerate(registers):  # a0: (g, 2t), a1: (g + 8, 2t), a2: (g, 2t + 8), a3: (g + 8, 2t + 8)
            halves = register.astype(np.uint32).view(columns.dtype).reshape(128, 2)
            for e in range(2):
                matrix[R0 + 8 * (i % 2), 16 * step + 8 * (i // 2) + T2 + e] = halves[:, e]
    product = matrix @ columns.astype(np.float64).T
    return [  # register 4j + 2h + e: row r0 + 8h, token 8j + 2t + e
        (old + product[R0 + 8 * (i // 2 % 2), i // 4 * 8 + T2 + i % 2]).astype(np.float32) for i, old in enumerate(y)
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("tokens", "outputs", "kept"), [(16, 64, 64), (13, 100, 100), (70, 130, 256), (1, 64, 1)])
def test_scaled_sums_and_kept_columns_are_the_equation(
    tokens: int, outputs: int, kept: int, dtype: str, shared: Any
) -> None:
    random, block_m = np.random.default_rng(tokens), 16
    problem = affine.Problem(tokens, outputs, 64, 4, None, False, "int8", "float16", kept_columns=kept)
    arrays = {
        "row_scales": random.uniform(0.5, 2, outputs).astype(np.float16),
        "row_sums": random.normal(size=outputs).astype(np.float32),
        "x_scales": random.uniform(0.5, 2, tokens).astype(np.float32),
        "x_offsets": random.uniform(0.5, 2, tokens).astype(np.float32),
    }
    kinds = {name: array.dtype.name for name, array in arrays.items()}
    sums = random.normal(size=(tokens, outputs)).astype(np.float32)
    weight = jnp.asarray(random.normal(size=(outputs, kept)), dtype)
    x = np.asarray(jnp.asarray(random.normal(size=(tokens, kept)), dtype))
    words = np.asarray(prepare_kept(weight, dtype).words)
    shared(words)
    out = np.full((1, tokens, outputs), np.nan, np.float32)
    all_sums = np.pad(sums, [(0, -tokens % block_m), (0, -outputs % 64)])
    all_x = np.pad(x, [(0, -tokens % block_m), (0, -kept % 64)])
    for token, row in itertools.product(range(0, tokens, block_m), range(0, outputs, 64)):
        block = all_sums[token : token + block_m, row : row + 64]
        y = [block[i // 4 * 8 + T2 + i % 2, R0 + 8 * (i // 2 % 2)] for i in range(block_m // 2)]
        corner = epilogue._first(np.full(128, token), np.full(128, row))
        y = epilogue._scaled(problem, arrays, kinds, *corner, y, 16)
        for tile in range(words.shape[1]):
            start = 4 * words[0, 0].size * (row // 64 * words.shape[1] + tile)
            fragments = kept_product.read_kept(start, THREAD)
            y = multiplied(y, fragments, all_x[token : token + block_m, 64 * tile : 64 * tile + 64])
        epilogue._store(problem, out, "float32", 0, *corner, y)
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    expected = sums * exact["row_scales"] / 16 * exact["x_scales"][:, None]
    expected += exact["x_offsets"][:, None] * exact["row_sums"] + x.astype(np.float64) @ np.asarray(weight, float).T
    np.testing.assert_allclose(out[0], expected, rtol=1e-5, atol=1e-5)


def test_pieces_of_a_token_are_added_with_their_scales(shared: Any) -> None:
    random = np.random.default_rng(0)
    problem = affine.Problem(1, 100, 64, 4, None, False, "int8", "float32", pieces=3)
    scales = random.uniform(0.5, 2, 3).astype(np.float32)
    sums = np.pad(random.normal(size=(3, 100)).astype(np.float32), [(0, 5), (0, 28)])
    out = np.full((1, 1, 100), np.nan, np.float32)
    shared(np.zeros(1, np.uint32))
    for row in (0, 64):
        y = [sums[T2 + i % 2, row + R0 + 8 * (i // 2)] for i in range(4)]
        corner = epilogue._first(np.full(128, 0), np.full(128, row))
        y = epilogue._scaled(problem, {"x_scales": scales}, {"x_scales": "float32"}, *corner, y, 1)
        epilogue._store(problem, out, "float32", 0, *corner, y)
    np.testing.assert_allclose(out[0, 0], scales.astype(np.float64) @ sums[:3, :100], rtol=1e-5, atol=1e-6)


class Case(NamedTuple):
    """kept columns k; group_size 0 stands for a table of int8 entries a row; offsets: of 8-bit tokens."""

    tokens: int
    outputs: int
    inputs: int
    bits: int
    group_size: int | None
    x_dtype: str
    kept: int
    offsets: bool = False


CASES = [
    Case(1, 256, 1024, 4, None, "int8", 256),
    Case(3, 100, 576, 8, None, "int8", 100, True),
    Case(16, 512, 2048, 4, 128, "int8", 1),
    Case(64, 320, 1024, 8, 256, "int8", 64, True),
    Case(200, 200, 1152, 4, None, "int8", 256, True),
    Case(300, 136, 1024, 8, None, "int8", 100),
    Case(300, 200, 1024, 4, 128, "int8", 64, True),
    Case(520, 9000, 640, 4, None, "int8", 256),  # several blocks a multiprocessor, some in clusters
    Case(3, 9000, 1216, 8, None, "int8", 200, True),
    Case(1, 4096, 4096, 4, 128, "bfloat16", 100),
    Case(16, 200, 1024, 4, None, "float16", 64),
    Case(200, 256, 1152, 4, 128, "bfloat16", 256),
    Case(300, 256, 576, 8, None, "bfloat16", 1),
    Case(1, 100, 328, 4, 0, "bfloat16", 64),
    Case(16, 200, 1040, 3, 0, "int8", 100, True),
    Case(300, 256, 272, 4, 0, "int8", 256),
]


def made(case: Case) -> tuple[Any, dict[str, Any], dict[str, Any], np.ndarray]:
    """The product, its arrays and static arguments, and the float64 reference [M, N]."""
    random = np.random.default_rng(case.tokens + case.kept)
    arrays: dict[str, Any]
    shape, size = (case.outputs, case.inputs), case.group_size or case.inputs
    codes = random.integers(0, 2**case.bits, shape)
    static: dict[str, Any] = {"bits": case.bits, "outputs": case.outputs, "out_dtype": jnp.float32}
    if case.group_size == 0:
        table = random.integers(-127, 128, (case.outputs, 2**case.bits))
        scales = jnp.asarray(random.uniform(1e-3, 2e-3, case.outputs), jnp.float32)
        weight = np.take_along_axis(table, codes, axis=1) * np.asarray(scales, np.float64)[:, None]
        tables = codebook.prepare_tables(jnp.asarray(table, jnp.int8), jnp.int8)
        product, order, arrays = codebook.codebook_matmul, "rows", {"tables": tables}
    else:
        scales = jnp.asarray(random.uniform(0.01, 0.02, (-(-case.inputs // size), case.outputs)), jnp.float16)
        group = np.arange(case.inputs) // size
        weight = np.asarray(scales, np.float64)[group].T * (codes - 2 ** (case.bits - 1))
        product, order, arrays = affine.affine_matmul, "pairs", {}
        static["group_size"] = case.group_size
    arrays |= {"scales": scales, "words": pack_fragments(jnp.asarray(codes), case.bits, order)}
    if case.x_dtype == "int8":
        x = random.integers(-128, 128, (case.tokens, case.inputs)).astype(np.float64)
        padded = np.pad(x, ((0, 0), (0, -case.inputs % 64)))
        arrays["x"] = jnp.asarray(padded[:, slot_order(padded.shape[1])][:, : case.inputs], jnp.int8)
        x_scales = random.uniform(0.01, 0.02, case.tokens).astype(np.float32)
        arrays["x_scales"] = jnp.asarray(x_scales)
        expected = x @ weight.T * x_scales[:, None].astype(np.float64)
        if case.offsets:
            offsets, sums = random.uniform(0.5, 1, case.tokens).astype(np.float32), weight.sum(axis=1)
            arrays |= {"x_offsets": jnp.asarray(offsets), "row_sums": jnp.asarray(sums, jnp.float32)}
            expected += offsets[:, None].astype(np.float64) * sums
        dtype = "bfloat16"
    else:
        dtype = case.x_dtype
        arrays["x"] = jnp.asarray(random.standard_normal((case.tokens, case.inputs)), dtype)
        expected = np.asarray(arrays["x"], np.float64) @ weight.T
    kept = jnp.asarray(random.standard_normal((case.outputs, case.kept)), dtype)
    beside = jnp.asarray(random.standard_normal((case.tokens, case.kept)) * 5, dtype)
    arrays["kept"] = (beside, prepare_kept(kept, dtype))
    expected += np.asarray(beside, np.float64) @ np.asarray(kept, np.float64).T
    return product, arrays, static, expected


def problem_of(case: Case) -> affine.Problem:
    group = case.group_size or None
    facts = case.tokens, case.outputs, case.inputs, case.bits, group, False, case.x_dtype
    dtype = "bfloat16" if case.x_dtype == "int8" else case.x_dtype
    scales = "float16" if case.group_size != 0 else "float32"
    return affine.Problem(*facts, scales, kept_columns=case.kept, kept_dtype=dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lowers_for_cuda_in_every_configuration(case: Case) -> None:
    product, arrays, static, expected = made(case)
    this = problem_of(case)
    found = {c for c in choice.candidates(this) if affine.supported_config(this, c) is None}
    for config in found if case.group_size != 0 else [codebook.choose(this, 1)]:
        run = jax.jit(lambda arrays, config=config: product(**arrays, **static, config=config))
        lowered = run.trace(arrays).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()
        (out,) = jax.tree.leaves(lowered.out_info)
        assert out.shape == expected.shape and out.dtype == jnp.float32


def test_every_problem_keeps_a_configuration_with_kept_columns() -> None:
    for case, tokens, bits, kept in itertools.product(CASES, (1, 9, 64, 100, 4096), (2, 3, 4, 8), (1, 256, 4096)):
        if case.group_size != 0:
            this = problem_of(case._replace(tokens=tokens, bits=bits, kept=kept))
            assert affine.supported(this) is None and affine.supported_config(this, choice.choose(this)) is None


@pytest.mark.parametrize(
    ("kept", "block_m", "places"), [(0, 64, 0), (1, 64, 1), (100, 8, 2), (900, 64, 4), (256, 96, 3)]
)
def test_shared_memory_counts_the_ring(kept: int, block_m: int, places: int) -> None:
    this = affine.Problem(8, 256, 1024, 4, None, False, "int8", "float16", kept_columns=kept)
    config = affine.Config(block_m, 128, 2, kept_places=max(places, 1))
    assert configs.kept_places(this, config) == places
    scratch = kept_product.kept_scratch(this, config)
    bytes_ = sum(
        math.prod(s.shape) * s.dtype.itemsize for name, s in scratch.items() if name in ("kept_words", "kept_x")
    )
    without = affine.Problem(8, 256, 1024, 4, None, False, "int8", "float16")
    assert bytes_ == configs.shared_bytes(this, config) - configs.shared_bytes(without, config)
    assert bool(scratch) == (kept > 0)


def test_what_does_not_go_together_is_refused() -> None:
    product, arrays, static, _ = made(CASES[1])
    x, fragments = arrays["kept"]
    for kept, reason in (
        ((x[:2], fragments), r"shape \[2, 100\]; expected \[3, k\]"),
        ((x[:, :0], fragments), "k at least 1"),
        ((x.astype(jnp.float16), fragments), "kept columns are bfloat16 and their inputs float16"),
        ((x[:, :64], fragments), r"expected \[2, 1, 16, 128\]"),
        ((x.astype(jnp.float32), KeptFragments(fragments.words, "float32")), "kept columns are float32"),
    ):
        with pytest.raises(ValueError, match=reason):
            product(**arrays | {"kept": kept}, **static)
    pieces = affine.Problem(1, 64, 64, 4, None, False, "int8", "float32", pieces=3, kept_columns=64)
    assert "not by pieces" in (codebook.supported(pieces) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_product_equals_the_float64_reference(case: Case) -> None:
    product, arrays, static, expected = made(case)
    run = jax.jit(lambda arrays: product(**arrays, **static))
    got = np.asarray(run(arrays), np.float64)
    # weights of groups are scaled in 16 bits beside many tokens of 16 bits
    rounded = case.x_dtype != "int8" and bool(case.group_size) and case.tokens > 128
    assert np.linalg.norm(got - expected) <= (3e-3 if rounded else 2e-5) * np.linalg.norm(expected)
    np.testing.assert_array_equal(run(arrays), got)  # places of the ring are in order at the end of a launch, too


# Of four CTAs in two clusters, or of as many as there are parts of the inputs: blocks of their own and shared ones,
# several warpgroups that share a block's inputs, more tiles of kept columns than places.
SHARED = [
    (Case(3, 700, 1152, 4, None, "int8", 300), affine.Config(8, 512, 1, 4, stages=2, blocks=4, cluster=2)),
    (Case(9, 640, 2944, 4, 128, "int8", 64, True), affine.Config(16, 256, 2, 2, stages=2, blocks=4, cluster=2)),
    (Case(130, 1000, 1152, 4, None, "int8", 256), affine.Config(128, 128, 2, 1, stages=2, blocks=4, cluster=2)),
    (Case(9, 90, 512, 8, None, "int8", 64), affine.Config(16, 256, 1, 2, stages=2, blocks=4, cluster=2)),
    (Case(16, 420, 4160, 4, 128, "bfloat16", 256), affine.Config(16, 256, 1, 4, stages=2, blocks=4, cluster=2)),
    (Case(130, 300, 1152, 8, None, "int8", 320, True), affine.Config(128, 128, 2, 1, splits=2, stages=2, blocks=6)),
    (Case(16, 300, 2176, 4, None, "bfloat16", 100), affine.Config(16, 256, 2, 2, splits=4, stages=2, blocks=5)),
]


@pytest.mark.parametrize(("case", "config"), SHARED)
def test_blocks_that_are_shared_lower_for_cuda(case: Case, config: affine.Config) -> None:
    product, arrays, static, _ = made(case)
    run = jax.jit(lambda arrays: product(**arrays, **static, config=config))
    assert "mosaic_gpu" in run.trace(arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "config"), SHARED)
def test_blocks_that_are_shared_get_their_columns_once(case: Case, config: affine.Config) -> None:
    product, arrays, static, expected = made(case)
    got = np.asarray(jax.jit(lambda arrays: product(**arrays, **static, config=config))(arrays), np.float64)
    assert np.linalg.norm(got - expected) <= 2e-5 * np.linalg.norm(expected)
