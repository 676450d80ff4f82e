"""Activation quantization: the kernel (interpreted) and the XLA path against IEEE arithmetic in NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.format.activations import ActivationQuant, quantize_tokens
from pallas_kernels import activation_quantize as aq
from pallas_kernels.activation_quantize import rows
from pallas_kernels.fragments import slot_order
from tests.pallas_kernels.ptx import Warp
from tests.pallas_kernels.triton import count_kernels, lower_for_gpu

# the second and third read words: K a multiple of 16, with and without padding up to 64
COLUMNS: list[tuple[int, int, str]] = [
    (200, 0, "bfloat16"),
    (208, 0, "bfloat16"),
    (128, 0, "float16"),
    (203, 11, "float32"),
    (64, 1, "float16"),
]
KINDS: list[tuple[bool, Any]] = [(True, "kernel"), (False, "kernel"), (False, "simulation")]


def _tokens(columns: int, dtype: str) -> jax.Array:
    """Ordinary tokens, tiny, huge, zero, nearly denormal, all negative, all positive, and one with a NaN, in 9 rows."""
    rng = np.random.default_rng(columns)
    sizes = np.array([1, 1e-8, 1e5, 0, 1e37, 1e-36, 1, 1, 1], np.float32)[:, None]
    x = rng.normal(size=(9, columns)).astype(np.float32) * sizes
    x[6], x[7], x[8, columns // 2] = -np.abs(x[6]), np.abs(x[7]), np.nan
    if dtype == "float16":
        x = np.clip(x, -6e4, 6e4)
    return jnp.asarray(x).astype(dtype)


def _oracle(x: np.ndarray, bits: int, symmetric: bool, mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, scales, offsets) of float32 tokens in float32 arithmetic, every operation rounded once."""
    one = np.float32
    half, steps = 2 ** (bits - 1), 2**bits - 1
    codes, scales, offsets = np.zeros(x.shape, np.int8), [], []
    for i, token in enumerate(x):
        if not np.all(np.isfinite(token)):
            scales.append(one(np.nan))
            offsets.append(one(np.nan))
            continue
        low, high = token.min(), token.max()
        if symmetric:
            scale = np.abs(token).max() / one(half - 1)
            scale = one(1) if scale == 0 else max(scale, np.finfo(np.float32).tiny)
            code, offset = np.clip(np.round(token / scale), -half, half - 1), one(0)
        elif mode == "kernel":
            scale = max((high - low) / one(steps), one(1e-6))
            code = np.clip(np.round((token - low) / scale), 0, steps) - half
            offset = low + one(half) * scale
        else:
            low, high = min(low, one(0)), max(high, one(0))
            scale = (high - low) / one(steps)
            scale = one(1) if scale == 0 else max(scale, np.finfo(np.float32).tiny)
            zero = np.clip(np.round(-low / scale), 0, steps)
            code = np.clip(np.round(token / scale) + zero, 0, steps) - half
            offset = scale * (one(half) - zero)
        codes[i] = code
        scales.append(scale)
        offsets.append(offset)
    return codes, np.array(scales, np.float32)[:, None], np.array(offsets, np.float32)[:, None]


def _in_slots(codes: np.ndarray) -> np.ndarray:
    slots = aq.num_slots(codes.shape[1], 0)
    return np.pad(codes, ((0, 0), (0, slots - codes.shape[1])))[:, slot_order(slots)]


@pytest.mark.parametrize(("columns", "kept", "dtype"), COLUMNS)
@pytest.mark.parametrize("bits", [4, 8])
def test_both_paths_give_the_codes_of_the_published_quantizers(columns: int, kept: int, dtype: str, bits: int) -> None:
    x = _tokens(columns, dtype)
    index = np.sort(np.random.default_rng(kept).choice(columns, kept, replace=False)).astype(np.int32)
    split = (aq.slot_columns(columns, index), jnp.asarray(index)) if kept else (None, None)
    base = np.delete(np.asarray(x.astype(jnp.float32)), index, axis=1)
    for symmetric, mode in KINDS:
        codes, scales, offsets = _oracle(base, bits, symmetric, mode)
        kernel = aq.quantize_rows(x, *split, bits=bits, symmetric=symmetric, mode=mode, interpret=True)
        plain = aq.quantize(x, *split, bits=bits, symmetric=symmetric, mode=mode)
        np.testing.assert_array_equal(kernel.codes, _in_slots(codes))
        # XLA on a CPU divides by multiplying with the reciprocal: a quotient within a rounding of a half may differ
        difference = np.asarray(plain.codes, np.int32) - _in_slots(codes)
        assert np.abs(difference).max() <= 1 and np.mean(difference != 0) < 0.01
        for result in (kernel, plain):
            np.testing.assert_array_equal(result.scales, scales)
            if result.offsets is not None:
                # one rounding more where the compiler does not fuse the product into the sum
                np.testing.assert_allclose(result.offsets, offsets, rtol=1e-6, atol=1e-30)
            assert (result.offsets is None) == symmetric
            assert (result.kept is None) == (kept == 0)
            if result.kept is not None:
                assert result.kept.dtype == x.dtype
                np.testing.assert_array_equal(result.kept.astype(jnp.float32), x[:, index].astype(jnp.float32))


def test_the_xla_path_is_the_format_of_the_library() -> None:
    x = _tokens(130, "bfloat16")
    for bits in (4, 8):
        for symmetric, mode in KINDS:
            tokens = quantize_tokens(x, ActivationQuant(None, None, bits, symmetric, mode))
            result = aq.quantize(x, bits=bits, symmetric=symmetric, mode=mode)
            np.testing.assert_array_equal(result.codes, _in_slots(np.asarray(tokens.codes)))
            np.testing.assert_array_equal(result.scales, tokens.scales)
            if tokens.offsets is not None:
                np.testing.assert_array_equal(result.offsets, tokens.offsets)


def test_a_range_beyond_float32_has_a_finite_scale() -> None:
    x = jnp.asarray([[-3e38, 3e38, 0.0, 1e38]], jnp.float32)
    for mode in aq.MODES:
        tokens = quantize_tokens(x, ActivationQuant(None, None, 8, False, mode))
        result = aq.quantize_rows(x, bits=8, symmetric=False, mode=mode, interpret=True)
        np.testing.assert_array_equal(result.codes, _in_slots(np.asarray(tokens.codes)))
        np.testing.assert_array_equal(result.scales, tokens.scales)
        assert bool(jnp.all(jnp.isfinite(result.scales)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 16), (3, 80), (17, 192)])
def test_words_of_columns_give_what_single_columns_give(tokens: int, columns: int, dtype: str) -> None:
    """Against the same numbers in float32, which are read one by one, also where a token is not finite."""
    x = np.random.default_rng(columns).normal(size=(tokens, columns)).astype(np.float32)
    for i, value in enumerate([np.inf, -np.inf, np.nan, -np.nan]):
        for place in (0, 1, 8, 9):  # each byte of a word
            row = 1 + 4 * i + place % 8 + place // 8 * 2
            if row < tokens:
                x[row, columns - 16 + place] = value
    narrow = jnp.asarray(x).astype(dtype)
    for symmetric, mode in KINDS:
        quantize = functools.partial(aq.quantize_rows, bits=8, symmetric=symmetric, mode=mode, interpret=True)
        words, single = quantize(narrow), quantize(narrow.astype(jnp.float32))
        jax.tree.map(np.testing.assert_array_equal, words, single)
        finite = np.isfinite(x).all(axis=1)
        assert finite.any() and np.array_equal(np.isfinite(words.scales[:, 0]), finite)
        assert np.any(np.asarray(words.codes)[finite] != 0) and not np.any(np.asarray(words.codes)[~finite])


def test_every_number_of_16_bits_is_read_from_either_half_of_a_word() -> None:
    """A token of one number beside zeros: its scale says which number was read."""
    for dtype in (jnp.bfloat16, jnp.float16):
        numbers = np.arange(2**16, dtype=np.uint16).view(dtype)
        # subnormal numbers as float32 are what a CPU may take for zeros
        with np.errstate(invalid="ignore"):
            wide = numbers.astype(np.float32)
        numbers = numbers[np.isfinite(wide) & (np.abs(wide) >= 2.0**-100)]
        x = np.zeros((len(numbers), 16), dtype)
        x[np.arange(len(numbers)), np.arange(len(numbers)) % 16] = numbers
        result = aq.quantize_rows(jnp.asarray(x), bits=8, symmetric=True, config=aq.Config(4096, 1), interpret=True)
        scales = np.abs(numbers.astype(np.float32)) / np.float32(127)
        np.testing.assert_array_equal(result.scales[:, 0], scales)
        codes = np.zeros(x.shape, np.int8)
        codes[np.arange(len(numbers)), np.arange(len(numbers)) % 16] = np.where(numbers < 0, -127, 127)
        np.testing.assert_array_equal(result.codes, _in_slots(codes))


def test_four_codes_are_packed_by_the_instructions_in_the_order_of_bytes() -> None:
    codes = np.random.default_rng(0).integers(0, 2**32, (4, 32))
    warp = Warp(np.zeros(1, np.uint8), np.zeros(1, np.uint8))
    warp.registers = {f"${i + 1}": codes[i] for i in range(4)}
    warp.run(rows._PACK)
    packed = sum((codes[i] & 255) << 8 * i for i in range(4))
    np.testing.assert_array_equal(warp.registers["$0"], packed)
    interpreted = rows._pack([jnp.asarray(code.astype(np.uint32).view(np.int32)) for code in codes], interpret=True)
    np.testing.assert_array_equal(np.asarray(interpreted).view(np.uint32), packed)


def test_slots_hold_base_columns_in_the_order_of_fragments() -> None:
    index = np.array([0, 5, 6, 99], np.int32)
    base = np.delete(np.arange(100), index)
    columns = np.asarray(aq.slot_columns(100, index))
    assert columns.shape == (128,) and aq.num_slots(100, 4) == 128
    place = slot_order(128)
    np.testing.assert_array_equal(columns[place < 96], base[place[place < 96]])
    assert set(columns[place >= 96]) == {1}  # a column that is there anyway
    with pytest.raises(ValueError, match="all 3 columns are kept"):
        aq.slot_columns(3, np.arange(3))


def test_padding_never_reads_a_kept_column() -> None:
    """140 base columns take 192 slots, and a program 256: neither end may widen the ranges."""
    x = np.random.default_rng(0).normal(size=(3, 143)).astype(np.float32)
    index = np.array([0, 1, 142], np.int32)
    x[:, index] = [[1e6, -1e6, 1e6]]
    codes, scales, _ = _oracle(np.delete(x, index, axis=1), 8, False, "kernel")
    split = (aq.slot_columns(143, index), jnp.asarray(index))
    result = aq.quantize_rows(jnp.asarray(x), *split, bits=8, symmetric=False, interpret=True)
    np.testing.assert_array_equal(result.scales, scales)
    np.testing.assert_array_equal(result.codes, _in_slots(codes))


def test_any_blocks_give_the_same_codes() -> None:
    x = _tokens(70, "float32")
    first = aq.quantize_rows(x, bits=8, symmetric=True, interpret=True)
    for block in (1, 2, 16):
        other = aq.quantize_rows(x, bits=8, symmetric=True, config=aq.Config(block, 1), interpret=True)
        jax.tree.map(np.testing.assert_array_equal, first, other)


def test_what_the_kernel_cannot_serve_is_said() -> None:
    assert aq.supported(1, 8192, 0, "bfloat16", 8) is None
    assert aq.supported(1, 32768, 256, jnp.float16, 4) is None
    for arguments, word in [
        ((1, 32769, 0, "float32", 8), "K=32769"),
        ((1, 64, 0, "int8", 8), "int8"),
        ((1, 64, 64, "float32", 8), "kept"),
        ((1, 64, 0, "float32", 9), "9 bits"),
        ((0, 64, 0, "float32", 8), "0 tokens"),
    ]:
        assert word in (aq.supported(*arguments) or "")
    x = jnp.zeros((1, 64), jnp.float32)
    with pytest.raises(ValueError, match="9 bits"):
        aq.quantize_rows(x, bits=9, symmetric=True)
    with pytest.raises(ValueError, match="is None"):
        aq.quantize_rows(x, None, jnp.zeros(1, jnp.int32), bits=8, symmetric=True)
    with pytest.raises(ValueError, match="mode"):
        aq.quantize_rows(x, bits=8, symmetric=True, mode="other")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("tokens", "columns", "kept"), [(1, 8192, 0), (2048, 11008, 256), (5, 32768, 0), (3, 70, 3)])
def test_lowers_for_a_gpu_as_one_kernel(tokens: int, columns: int, kept: int) -> None:
    x = jax.ShapeDtypeStruct((tokens, columns), jnp.bfloat16)
    split = [jax.ShapeDtypeStruct((size,), jnp.int32) for size in (aq.num_slots(columns, kept), kept)] if kept else []
    for symmetric, mode in KINDS:
        run = functools.partial(aq.quantize_rows, bits=8, symmetric=symmetric, mode=mode)
        assert count_kernels(lower_for_gpu(run, x, *split)) == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_the_kernel_on_the_device_divides_as_ieee_says() -> None:
    for columns, kept, dtype in [
        (8192, 0, "bfloat16"),
        (28688, 0, "float16"),
        (200, 0, "bfloat16"),
        (11008, 256, "bfloat16"),
        (200, 7, "bfloat16"),
    ]:
        x = _tokens(columns, dtype)
        index = np.sort(np.random.default_rng(1).choice(columns, kept, replace=False)).astype(np.int32)
        split = (aq.slot_columns(columns, index), jnp.asarray(index)) if kept else (None, None)
        base = np.delete(np.asarray(x.astype(jnp.float32)), index, axis=1)
        for bits in (4, 8):
            for symmetric, mode in KINDS:
                codes, scales, offsets = _oracle(base, bits, symmetric, mode)
                result = aq.quantize_rows(x, *split, bits=bits, symmetric=symmetric, mode=mode)
                np.testing.assert_array_equal(result.codes, _in_slots(codes))
                np.testing.assert_array_equal(result.scales, scales)
                if result.offsets is not None:
                    np.testing.assert_allclose(result.offsets, offsets, rtol=1e-6, atol=1e-30)
                if result.kept is not None:
                    np.testing.assert_array_equal(result.kept.astype(jnp.float32), x[:, index].astype(jnp.float32))
