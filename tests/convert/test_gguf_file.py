"""GGUF headers are walked safely, and every supported block type decodes as the gguf package decodes it."""

import struct
import warnings

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from convert.gguf_file import GGUFReader

CLASSIC = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
# The gguf package has no encoder for these: bytes are random, with the float16 scales (at these places) kept finite.
SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(name, rows, columns, rng):
    """Block bytes [rows, bytes a row] of one type."""
    kind = GGMLQuantizationType[name]
    if name in CLASSIC:
        return quantize(rng.normal(size=(rows, columns)).astype(np.float32), kind)
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // size, nbytes), np.uint8)
    for place in SCALES[name]:
        scales = rng.uniform(0.01, 1, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", [*CLASSIC, *SCALES])
def test_block_types_decode_as_the_gguf_package_does(gguf_file, name):
    kind = GGMLQuantizationType[name]
    data = random_blocks(name, 6, 512, np.random.default_rng(0))
    reader = GGUFReader(gguf_file({"a": (data, kind), "b": np.ones(3, np.float32)}))
    info = reader.infos()["a"]
    assert (info.shape, info.dtype, info.stored_bytes, info.is_float) == ((6, 512), name, data.nbytes, True)
    out = reader.read("a")
    assert out.dtype == np.float32 and np.isfinite(out).all()
    np.testing.assert_array_equal(out, dequantize(data, kind))
    assert reader.sample("a", 5) == data.tobytes()[:5]


def test_decoding_in_pieces_changes_nothing(gguf_file, monkeypatch):
    from convert import gguf_file as module

    data = random_blocks("Q4_K", 37, 512, np.random.default_rng(1))
    reader = GGUFReader(gguf_file({"a": (data, GGMLQuantizationType.Q4_K)}))
    whole = reader.read("a")
    monkeypatch.setattr(module, "_CHUNK", 5 * 512)
    np.testing.assert_array_equal(reader.read("a"), whole)


def test_plain_types_come_back_bit_for_bit(gguf_file):
    values = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    half, brain = values.astype(np.float16), values.astype(ml_dtypes.bfloat16)
    brain_bytes = (brain.view(np.uint8), GGMLQuantizationType.BF16)
    reader = GGUFReader(gguf_file({"a": values, "b": half, "c": brain_bytes, "d": values[0]}))
    for name, expected in {"a": values, "b": half, "c": brain, "d": values[0]}.items():
        out = reader.read(name)
        assert (out.dtype, out.shape) == (expected.dtype, expected.shape)
        assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "I8"])
def test_other_types_are_described_but_not_read(gguf_file, name):
    kind = GGMLQuantizationType[name]
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    dtype = np.int8 if name == "I8" else np.uint8
    reader = GGUFReader(gguf_file({"a": (np.zeros((2, 256 // size * nbytes), dtype), kind)}))
    assert reader.infos()["a"].dtype == name and not reader.infos()["a"].is_float
    with pytest.raises(ValueError, match=f"a is {name}; supported: F32, F16, BF16, Q8_0"):
        reader.read("a")


def test_metadata_and_tensors_equal_what_the_gguf_package_reads(gguf_file):
    metadata = {
        "x.list": [1, 2, 3],
        "x.words": ["a", "", "é▁"],
        "x.flag": True,
        "x.real": 0.5,
        "x.flags": [True, False],
    }
    path = gguf_file(metadata=metadata)
    reader, theirs = GGUFReader(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert reader.metadata == fields
    assert {**reader.metadata, **metadata} == reader.metadata
    assert list(reader.infos()) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(reader.read(tensor.name), tensor.data)


def test_any_truncation_is_a_value_error(gguf_file, small):
    tensors = {name: small.gguf_tensors()[name] for name in ("output_norm.weight", "blk.0.attn_k.weight")}
    path = gguf_file(tensors, metadata={"x.words": ["one", "two"], "x.list": [1, 2]})
    whole = path.read_bytes()
    last = GGUFReader(path).read("blk.0.attn_k.weight").tobytes()
    end = whole.rindex(last) + len(last)  # what follows is padding, which a file may lack
    for length in [*range(0, end - len(last), 3), *range(end - 40, end)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated|damaged|not a GGUF file"):
            GGUFReader(path)
    path.write_bytes(whole[:end])
    assert GGUFReader(path).read("blk.0.attn_k.weight").tobytes() == last


def test_damaged_headers_end_in_a_value_error_or_in_readable_tensors(gguf_file):
    path = gguf_file({"a": np.ones((4, 32), np.float32)}, metadata={"x.words": ["one"]})
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(400):
        broken = whole.copy()
        broken[rng.integers(4, len(whole) - 512)] = rng.integers(0, 256)
        path.write_bytes(broken)
        try:
            reader = GGUFReader(path)
        except ValueError:
            continue
        for name, info in reader.infos().items():
            if info.is_float:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # bytes that became scales may overflow
                    assert reader.read(name).shape == info.shape


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"", "not a GGUF file"),
        (b"GGML", "not a GGUF file"),
        (b"version https://git-lfs", "a Git LFS pointer, not the model"),
        (b"GGUF" + struct.pack("<I", 1), "GGUF version 1; little-endian versions 2 and 3"),
        (b"GGUF" + struct.pack(">I", 3), "big-endian GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "truncated or damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "truncated or damaged: its header needs"),
    ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path, start, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(start)
    with pytest.raises(ValueError, match=message):
        GGUFReader(path)


def test_an_alignment_of_its_own_is_followed(gguf_file):
    path = gguf_file({"a": np.ones(3, np.float32)}, metadata={"general.alignment": 48})
    with pytest.raises(ValueError, match="general.alignment = 48 is not a power of two"):
        GGUFReader(path)
