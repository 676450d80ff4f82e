"""The stream law, in Python's own integers; worked words from other people's files; the inverse; the window."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.packing import num_words, pack_codes, stream_window, unpack_codes

WIDTHS = range(1, 9)


def _codes(bits: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(bits).integers(0, 2**bits, shape, dtype=np.uint8)


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_are_the_little_endian_bit_stream(bits: int) -> None:
    codes = _codes(bits, 45)
    stream = sum(int(code) << (i * bits) for i, code in enumerate(codes))  # the definition
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(num_words(45, bits))]
    assert num_words(45, bits) == (45 * bits + 31) // 32
    assert np.asarray(pack_codes(jnp.asarray(codes), bits)).tolist() == words


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(2, 3, 33), (4, 1)])
def test_unpack_is_the_inverse_of_pack(bits: int, shape: tuple[int, ...]) -> None:
    codes = jnp.asarray(_codes(bits, *shape))
    words = pack_codes(codes, bits)
    assert words.dtype == jnp.uint32 and words.shape == (*shape[:-1], num_words(shape[-1], bits))
    back = unpack_codes(words, bits, shape[-1])
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize(
    ("bits", "codes", "word"),
    [
        (4, [8, 5, 9, 10, 6, 11, 8, 5], 0x58B6A958),  # GPTQ, 4 bits
        (3, [3, 4, 3, 3, 3, 3, 3, 3, 2, 7, 0], 0x3A6DB6E3),  # GPTQ, 3 bits: code 10 straddles
    ],
)
def test_gptq_words_are_the_same_stream(bits: int, codes: list[int], word: int) -> None:
    assert int(pack_codes(jnp.asarray(codes, jnp.uint8), bits)[0]) == word


def test_compressed_tensors_word_is_the_same_stream() -> None:
    # codes 0, 2, 2, -1, ... stored as q + 4; the top two bits tell the dense stream from the older padded words
    codes = [(0xCD95B7B4 >> (3 * i)) & 7 for i in range(10)]
    assert codes[:4] == [0 + 4, 2 + 4, 2 + 4, -1 + 4]
    dense, padded = ((int(pack_codes(jnp.asarray([*codes, last], jnp.uint8), 3)[0])) for last in (0b011, 0b000))
    assert (dense, padded) == (0xCD95B7B4, 0x0D95B7B4)


def test_no_codes_make_no_words() -> None:
    words = pack_codes(jnp.zeros((3, 0), jnp.uint8), 5)
    assert words.shape == (3, 0) and unpack_codes(words, 5, 0).shape == (3, 0)


def test_wider_integers_pack_alike() -> None:
    codes = _codes(5, 2, 40)
    expected = pack_codes(jnp.asarray(codes), 5)
    np.testing.assert_array_equal(pack_codes(jnp.asarray(codes, jnp.int32), 5), expected)


@pytest.mark.parametrize(("bits", "count"), [(2, 8), (3, 8), (4, 8), (5, 4), (7, 4), (8, 4)])
def test_window_reads_what_unpack_reads(bits: int, count: int) -> None:
    codes = _codes(bits, 3, 45)
    words = jnp.asarray(pack_codes(jnp.asarray(codes), bits)).T
    for index in range(-(-45 // count)):  # the last window reaches past the end of the stream
        window = np.asarray(stream_window(words[None], jnp.int32(index), bits, count))[0][:, None]
        window = (window >> (bits * np.arange(count, dtype=np.uint32))) & np.uint32(2**bits - 1)
        expected = codes[:, index * count : (index + 1) * count]
        np.testing.assert_array_equal(window[:, : expected.shape[1]], expected)


def test_wrong_widths_and_counts_are_refused() -> None:
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"codes of {bits} bits"):
            pack_codes(jnp.zeros(3, jnp.uint8), bits)
    with pytest.raises(ValueError, match="2 words do not hold 100 codes of 3 bits; expected 10 words"):
        unpack_codes(jnp.zeros((4, 2), jnp.uint32), 3, 100)
