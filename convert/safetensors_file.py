"""Safetensors shards: headers checked against the files first, then one tensor at a time, without torch.

    file = u64 header length (little endian) | JSON header | data
    header = {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}

Offsets count from the start of the data; the format demands that the tensors cover the data without holes or overlap
(https://github.com/huggingface/safetensors#format). Everything here is data: nothing in a shard can run. Tensors are
read with one plain file read each, not mapped, so that what is held is what is counted; bfloat16 comes as
`ml_dtypes.bfloat16`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.mapping import TensorInfo, raise_all, read_array

INDEX = "model.safetensors.index.json"
_FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Known to the format, never a weight here. Sizes in bits, since the format has types below one byte.
_OTHER_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8} | {
    "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "I32": 32, "U32": 32,
    "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip
# The safetensors library's own limit; a larger number means that these eight bytes are no header length.
_MAX_HEADER_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True)
class _Entry:
    path: Path
    offset: int
    dtype: np.dtype | None
    info: TensorInfo


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name appears twice")
    return out


def _not_safetensors(path: Path, start: bytes) -> str:
    if start.startswith(b"version "):
        return f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return f"{path} is a pickle under another name; pickles are never read, save it with safetensors"
    return f"{path} is not a safetensors file or is damaged; download it again"


def read_header(path: Path) -> dict[str, _Entry]:
    """Tensors of one file. ValueError if it is truncated, is no safetensors file, or its offsets make no sense."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _MAX_HEADER_BYTES:
            raise ValueError(_not_safetensors(path, start))
        text = file.read(length)
    if len(text) < length:
        raise ValueError(_not_safetensors(path, start) + f" (header of {length} bytes in a file of {size})")
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(_not_safetensors(path, start) + f" (header: {error})") from None
    if not isinstance(header, dict):
        raise ValueError(_not_safetensors(path, start) + " (its header is no JSON object)")
    header.pop("__metadata__", None)
    data, entries, spans = 8 + length, {}, []
    for name, item in header.items():
        entry, span = _entry(path, name, item, data)
        entries[name] = entry
        spans.append(span)
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise ValueError(f"{path} is damaged: its tensors overlap or leave holes at byte {begin} of the data")
        end = stop
    if data + end != size:
        state = "is truncated" if data + end > size else "has bytes after its last tensor"
        raise ValueError(f"{path} {state}: {data + end} bytes by its header, {size} in the file; download it again")
    return entries


def _entry(path: Path, name: str, item: Any, data: int) -> tuple[_Entry, tuple[int, int]]:
    def is_sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(part) is int and part >= 0 for part in value)

    if not (isinstance(item, dict) and is_sizes(item.get("shape")) and is_sizes(item.get("data_offsets"))):
        raise ValueError(f"{path} is damaged: the header entry of {name!r} lacks a shape or offsets")
    kind, shape, offsets = str(item.get("dtype")), tuple(item["shape"]), item["data_offsets"]
    dtype = _FLOATS.get(kind)
    bits = _OTHER_BITS.get(kind) if dtype is None else 8 * dtype.itemsize
    if bits is None:
        raise ValueError(f"{path}: tensor {name!r} has the unknown type {kind!r}")
    if len(offsets) != 2 or (offsets[1] - offsets[0]) * 8 != math.prod(shape) * bits:
        raise ValueError(f"{path} is damaged: {name!r} is {kind} {list(shape)} but its offsets are {offsets}")
    info = TensorInfo(shape, kind, offsets[1] - offsets[0], is_float=dtype is not None)
    return _Entry(path, data + offsets[0], dtype, info), (offsets[0], offsets[1])


def find_shards(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a directory and, where there is an index, its map from tensor to file name.

    ValueError where there are none, where it is unclear which to read, where the index names a missing file or one
    outside the directory.
    """
    single, index = directory / "model.safetensors", directory / INDEX
    if single.is_file() and index.is_file():
        raise ValueError(f"{directory} has both {single.name} and {index.name}; remove the one that is out of date")
    if index.is_file():
        return _from_index(directory, index)
    if single.is_file():
        return [single], None
    found = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if len(found) == 1:
        return found, None
    if found:
        raise ValueError(f"{directory} has {len(found)} .safetensors files but no {INDEX} to say which belong together")
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
        raise ValueError(
            f"{directory} has only pickled weights (.bin, .pt), which are never read because a pickle can run code; "
            "convert them once where torch is installed: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
        )
    raise ValueError(f"{directory} has no .safetensors file; expected model.safetensors or {INDEX} with its shards")


def _from_index(directory: Path, index: Path) -> tuple[list[Path], dict[str, str]]:
    try:
        weight_map = json.loads(index.read_bytes(), object_pairs_hook=_unique)["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not a shard index (no usable weight_map: {error!r}); download it again") from None
    errors = []
    for name in names:
        # By spelling, not by resolving: the hub's cache is made of symbolic links that leave the directory rightly.
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            errors.append(f"{name!r} is not the plain name of a .safetensors file in the same directory; refused")
        elif not (directory / name).is_file():
            errors.append(f"{name} is named in the index but is not there; download it")
    raise_all(f"{index} cannot be followed", errors)
    return [directory / name for name in names], weight_map


class SafetensorsReader:
    """The tensors of one directory's shards, as `mapping.TensorReader`."""

    def __init__(self, directory: Path):
        """Reads and checks all headers. ValueError lists tensors that shards and index disagree about."""
        paths, weight_map = find_shards(directory)
        self._entries: dict[str, _Entry] = {}
        errors = []
        for path in paths:
            for name, entry in read_header(path).items():
                if name in self._entries:
                    errors.append(f"{name} is in {self._entries[name].path.name} and again in {path.name}")
                elif weight_map is not None and weight_map.get(name) != path.name:
                    said = weight_map.get(name, "nothing of it")
                    errors.append(f"{name} is in {path.name}, but the index says {said}")
                self._entries[name] = entry
        for name in sorted(set(weight_map or ()) - set(self._entries)):
            errors.append(f"{name} is in the index but in no shard")
        raise_all(f"the shards of {directory} and their index disagree", errors)

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name."""
        return {name: entry.info for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the type it is stored in."""
        entry = self._entries[name]
        if entry.dtype is None:
            raise ValueError(f"{name} is {entry.info.dtype}, which is no float type that weights are read from")
        return read_array(entry.path, entry.offset, entry.info.shape, entry.dtype)

    def sample(self, name: str, count: int) -> bytes:
        """The first bytes of one tensor."""
        entry = self._entries[name]
        with entry.path.open("rb") as file:
            file.seek(entry.offset)
            return file.read(min(count, entry.info.stored_bytes))
