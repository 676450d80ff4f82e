"""GGUF files: the header walked with every length checked against the file, tensors decoded one at a time.

    "GGUF" | u32 version | u64 tensors | u64 keys | keys: (string, u32 type, value) |
    tensors: (string, u32 ndim, u64 dims, u32 type, u64 offset) | padding to the alignment | data

A string is u64 length and UTF-8 bytes; dims come with the contiguous one first, so [K, N] there is our [N, K]; offsets
count from the start of the data (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The `gguf` package knows
the block types' sizes and decodes them; its own header reader is not used because it trusts the lengths it finds,
and a truncated file ends in reshape errors there instead of a reason.
"""

import dataclasses
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from convert.mapping import TensorInfo, empty, read_array

_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
# Rows are decoded in pieces of about this many values, which bounds the decoder's own temporaries.
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class _Entry:
    offset: int
    kind: GGMLQuantizationType
    info: TensorInfo


class _Cursor:
    """Reads the header's values in order; a value that would pass the end of the file is an error with its place."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.size = path, file, size

    def bytes(self, count: int) -> bytes:
        place = self.file.tell()
        if place + count > self.size:
            raise ValueError(
                f"{self.path} is truncated or damaged: its header needs {count} bytes at byte {place} of {self.size}; "
                "download it again"
            )
        return self.file.read(count)

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def string(self) -> str:
        place = self.file.tell()
        try:
            return self.bytes(self.scalar("<Q")).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.path} is damaged: no UTF-8 text at byte {place}; download it again") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"{self.path} is damaged: value type {kind} does not exist; download it again")
        inner, count = self.scalar("<I"), self.scalar("<Q")
        if inner in _SCALARS:
            form = _SCALARS[inner]
            return list(np.frombuffer(self.bytes(count * struct.calcsize(form)), form.replace("<?", "?")).tolist())
        if inner != _STRING:
            raise ValueError(f"{self.path} is damaged: arrays of value type {inner} are not read")
        return [self.string() for _ in range(count)]


class GGUFReader:
    """`metadata` {key: value} and the tensors of one file, as `mapping.TensorReader`; shapes in [N, K] order."""

    def __init__(self, path: Path):
        """Reads and checks the whole header. ValueError: not GGUF, another version, truncated, damaged."""
        self.path = path
        self.metadata: dict[str, Any] = {}
        self._entries: dict[str, _Entry] = {}
        with path.open("rb") as file:
            self._read_header(_Cursor(path, file, path.stat().st_size))

    def _read_header(self, cursor: _Cursor) -> None:
        magic = cursor.file.read(4)
        if magic != b"GGUF":
            kind = "a Git LFS pointer, not the model" if magic == b"vers" else "not a GGUF file"
            raise ValueError(f"{self.path} is {kind}: it starts with {magic!r}, expected b'GGUF'; download it again")
        version = cursor.scalar("<I")
        if version not in (2, 3):
            big = version and version & 0xFFFF == 0
            raise ValueError(
                f"{self.path} is {'a big-endian GGUF file' if big else f'GGUF version {version}'}; little-endian "
                "versions 2 and 3 are read: convert it again with a current llama.cpp"
            )
        tensors, keys = cursor.scalar("<Q"), cursor.scalar("<Q")
        for _ in range(keys):
            key = cursor.string()
            if key in self.metadata:
                raise ValueError(f"{self.path} is damaged: the key {key} appears twice; download it again")
            self.metadata[key] = cursor.value(cursor.scalar("<I"))
        found = [self._read_tensor_info(cursor) for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{self.path} is damaged: general.alignment = {alignment!r} is not a power of two")
        start = -(-cursor.file.tell() // alignment) * alignment
        for name, entry in found:
            if name in self._entries:
                raise ValueError(f"{self.path} is damaged: tensor {name} appears twice; download it again")
            end = start + entry.offset + entry.info.stored_bytes
            if end > cursor.size:
                raise ValueError(
                    f"{self.path} is truncated: tensor {name} ends at byte {end}, the file has {cursor.size}; "
                    "download it again"
                )
            self._entries[name] = dataclasses.replace(entry, offset=start + entry.offset)

    def _read_tensor_info(self, cursor: _Cursor) -> tuple[str, _Entry]:
        name, ndim = cursor.string(), cursor.scalar("<I")
        if ndim > 4:
            raise ValueError(f"{self.path} is damaged: tensor {name} has {ndim} dimensions; download it again")
        shape = tuple(reversed([cursor.scalar("<Q") for _ in range(ndim)]))
        number, offset = cursor.scalar("<I"), cursor.scalar("<Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(
                f"{self.path}: tensor {name} has type number {number}, which the installed gguf package does not know; "
                f"supported: {', '.join((*_PLAIN, *_BLOCKS))}"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape and shape[-1] % block:
            raise ValueError(f"{self.path} is damaged: {name} is {kind.name} {list(shape)}, in blocks of {block}")
        stored = math.prod(shape) // block * block_bytes
        return name, _Entry(offset, kind, TensorInfo(shape, kind.name, stored, kind.name in (*_PLAIN, *_BLOCKS)))

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its GGUF name."""
        return {name: entry.info for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor: float32 where the file holds blocks or F32, else its own 16-bit type."""
        entry = self._entries[name]
        shape, kind = entry.info.shape, entry.kind
        if not entry.info.is_float:
            raise ValueError(f"{name} is {kind.name}; supported: {', '.join((*_PLAIN, *_BLOCKS))}")
        raw = read_array(self.path, entry.offset, (entry.info.stored_bytes,), np.dtype(np.uint8))
        if kind.name in _PLAIN:
            return raw.view(_PLAIN[kind.name]).reshape(shape)
        rows = raw.reshape(-1, raw.size // max(math.prod(shape[:-1]), 1))
        out = empty((rows.shape[0], shape[-1]), np.dtype(np.float32))
        step = max(_CHUNK // shape[-1], 1)
        for first in range(0, rows.shape[0], step):
            out[first : first + step] = dequantize(rows[first : first + step], kind)
        return out.reshape(shape)

    def sample(self, name: str, count: int) -> bytes:
        """The first stored bytes of one tensor."""
        entry = self._entries[name]
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            return file.read(min(count, entry.info.stored_bytes))
