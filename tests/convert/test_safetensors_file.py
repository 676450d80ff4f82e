"""Shards are checked against their headers and their index before a tensor is read."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.safetensors_file import SafetensorsReader


def write(directory, header, data=b"", name="model.safetensors"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / name).write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(dtype) for name, shape in {"a": (3, 5), "b": (7,), "c": ()}.items()}
    tensors["empty"] = np.zeros((0, 4), dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    for name, array in tensors.items():
        info = reader.infos()[name]
        assert (info.shape, info.stored_bytes, info.is_float) == (array.shape, array.nbytes, True)
        back = reader.read(name)
        assert back.dtype == array.dtype
        assert back.tobytes() == array.tobytes() == reader.sample(name, 10**6)
    assert reader.sample("a", 4) == tensors["a"].tobytes()[:4]


def test_integers_are_described_but_not_read(tmp_path):
    save_file({"a": np.zeros(3, np.int32)}, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    assert not reader.infos()["a"].is_float
    with pytest.raises(ValueError, match="a is I32"):
        reader.read("a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file or is damaged"),
        (b"\x00" * 7, "not a safetensors file or is damaged"),
        (b"\xff" * 64, "not a safetensors file or is damaged"),
        (struct.pack("<Q", 500) + b"{}", "header of 500 bytes in a file of 10"),
        (struct.pack("<Q", 2) + b"[]", "no JSON object"),
        (struct.pack("<Q", 2) + b"{x", "not a safetensors file or is damaged"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\x03\x04" + b"\x7f" * 60, "pickles are never read"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, b"\0" * 7, "is truncated: .* bytes by its header"),
        ({"a": entry()}, b"\0" * 9, "has bytes after its last tensor"),
        ({"a": entry(shape=(3,))}, b"\0" * 8, r"'a' is F32 \[3\] but its offsets are \[0, 8\]"),
        ({"a": entry(shape=(-2,))}, b"\0" * 8, "'a' lacks a shape or offsets"),
        ({"a": entry(offsets=(8, 0))}, b"\0" * 8, "but its offsets"),
        ({"a": entry(offsets=(4, 12))}, b"\0" * 12, "leave holes at byte 4"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12, "overlap"),
        ({"a": entry(dtype="Q7")}, b"\0" * 8, "unknown type 'Q7'"),
        ({"a": 3}, b"", "'a' lacks a shape"),
        (b'{"a": 1, "a": 2}', b"", "a name appears twice"),
    ],
)
def test_headers_that_do_not_fit_the_file_are_refused(tmp_path, header, data, message):
    write(tmp_path, header, data)
    with pytest.raises(ValueError, match=message):
        SafetensorsReader(tmp_path)


def test_any_truncation_is_a_value_error(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((4, 4), np.float32), "b": np.ones(3, np.float16)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated|damaged"):
            SafetensorsReader(tmp_path)


def test_damaged_headers_end_in_a_value_error_or_in_the_same_tensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((4, 4), np.float32), "b": np.ones(3, np.float16)}, path)
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = whole.copy()
        broken[rng.integers(0, 8 + int.from_bytes(whole[:8], "little"))] = rng.integers(0, 256)
        path.write_bytes(broken)
        try:
            reader = SafetensorsReader(tmp_path)
        except ValueError:
            continue
        for name, info in reader.infos().items():
            assert not info.is_float or reader.read(name).shape == info.shape


def shards(directory, weight_map, files):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file, names in files.items():
        save_file({name: np.full(2, ord(name), np.float32) for name in names}, directory / file)


def test_shards_are_read_as_one(tmp_path):
    files = {"1.safetensors": "ab", "2.safetensors": "c"}
    shards(tmp_path, {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}, files)
    reader = SafetensorsReader(tmp_path)
    assert sorted(reader.infos()) == ["a", "b", "c"]
    assert reader.read("c")[0] == ord("c")


def test_disagreements_of_shards_and_index_are_all_listed(tmp_path):
    weight_map = {"a": "1.safetensors", "b": "2.safetensors", "d": "2.safetensors"}
    shards(tmp_path, weight_map, {"1.safetensors": "ab", "2.safetensors": "ac"})
    with pytest.raises(ValueError) as caught:
        SafetensorsReader(tmp_path)
    text = str(caught.value)
    assert "a is in 1.safetensors and again in 2.safetensors" in text
    assert "b is in 1.safetensors, but the index says 2.safetensors" in text
    assert "c is in 2.safetensors, but the index says nothing of it" in text
    assert "d is in the index but in no shard" in text


@pytest.mark.parametrize(
    "name", ["../1.safetensors", "/1.safetensors", "sub/1.safetensors", "..", "a\\..\\1.safetensors", "1.bin", 7, None]
)
def test_an_index_cannot_lead_elsewhere(tmp_path, name):
    directory = tmp_path / "model"
    directory.mkdir()
    shards(directory, {"a": name}, {"1.safetensors": "a"})
    shards(tmp_path, {"a": name}, {"1.safetensors": "a"})
    with pytest.raises(ValueError, match="is not the plain name of a .safetensors file in the same directory"):
        SafetensorsReader(directory)


def test_a_missing_shard_is_named(tmp_path):
    shards(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}, {"1.safetensors": "a"})
    with pytest.raises(ValueError, match="2.safetensors is named in the index but is not there"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}'])
def test_an_unusable_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="is not a shard index"):
        SafetensorsReader(tmp_path)


def test_links_out_of_the_directory_are_followed_as_the_hub_cache_needs(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123")
    assert SafetensorsReader(tmp_path / "snapshot").read("a")[1] == 1


def test_unclear_directories_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no .safetensors file; expected model.safetensors"):
        SafetensorsReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="never read because a pickle can run code; convert them once"):
        SafetensorsReader(tmp_path)
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "one.safetensors")
    assert list(SafetensorsReader(tmp_path).infos()) == ["a"]
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="2 .safetensors files but no model.safetensors.index.json"):
        SafetensorsReader(tmp_path)
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has both"):
        SafetensorsReader(tmp_path)
