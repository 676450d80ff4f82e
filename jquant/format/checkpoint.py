"""A saved model: arrays in Orbax, everything that gives them meaning in a checked JSON beside them.

    DIR/weights/      Orbax (zarr, one directory an array, uncompressed), one flat tree of arrays
    DIR/jquant.json   format_version, header, and for every leaf its kind, static fields and arrays
    DIR/...           whatever the caller adds (tokenizer files)

An array's name is the leaf's path, a slash and the field: `layers.0.self_attn.q_proj.weight/weight.codes`,
`norm.weight/array`. Packed codes are uint32 words in the canonical order. Arrays without entries stand in the JSON
only, because Orbax cannot store them.

Orbax restores what it finds: it loses static fields, casts types and checks nothing against the model. So `load`
compares kinds, static fields, shapes and types with the JSON before it reads an array, and a SHA-256 of every array
after. The same content gives the same bytes in every file: no timestamps, no random names, sorted keys.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.format.array_store import holds_arrays, read_arrays, write_arrays
from jquant.format.leaves import (
    Leaf as Leaf,
    check_name,
    leaf_arrays as leaf_arrays,
    leaf_from_arrays as leaf_from_arrays,
)

FORMAT_VERSION = 1
SIDECAR = "jquant.json"
WEIGHTS = "weights"
_KEYS = {"format_version", "written_by", "header", "leaves", "sha256"}
_LEAF_KEYS = {"static", "arrays"}
_ARRAY_KEYS = {"shape", "dtype", "sha256"}
# 64-bit types are absent: JAX would narrow them on the way back
_DTYPES = {
    str(jnp.dtype(name))
    for name in (
        *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32"),
        *("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"),
    )
}


def is_checkpoint(directory: str | Path) -> bool:
    """Whether the directory holds a saved model, complete or not: it has one of the two parts that only we write."""
    directory = Path(directory)
    return (directory / SIDECAR).is_file() or holds_arrays(directory / WEIGHTS)


def save(
    directory: str | Path,
    leaves: Mapping[str, Leaf],
    header: Mapping[str, Any],
    extra_files: Callable[[Path], object] | None = None,
) -> None:
    """Writes a checkpoint: all of it or, on any failure, nothing.

    leaves: {path: packed weight or array}, for example `tree.leaves(model)`. header: anything JSON can hold (tuples
    come back as lists). extra_files(folder) may write more files there. ValueError: the directory exists, or a leaf
    cannot be stored. OSError: the disk is full.
    """
    directory = Path(directory)
    if directory.exists() or directory.is_symlink():
        raise ValueError(f"{directory} exists already; name a new directory, or remove this one first")
    arrays, described = _describe(leaves)
    document = {
        "format_version": FORMAT_VERSION,
        "written_by": f"jquant {_own_version()}",
        "header": _plain(header),
        "leaves": described,
    }
    document["sha256"] = _document_hash(document)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.parent / f"{directory.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    size = sum(array.nbytes for array in arrays.values())
    try:
        # arrays are stored as they are, so this is known; Orbax's own failure halfway would be a noisy one
        if shutil.disk_usage(directory.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial.mkdir()
        if extra_files is not None:
            extra_files(partial)
            for name in (WEIGHTS, SIDECAR):
                if (partial / name).exists():
                    raise ValueError(f"extra_files wrote {name}, a name that the checkpoint itself uses; rename it")
        write_arrays(partial / WEIGHTS, arrays)
        (partial / SIDECAR).write_text(_dumps(document, indent=1) + "\n", encoding="utf-8")
        _flush(partial)
        os.rename(partial, directory)
        _fsync(directory.parent)
    except BaseException as error:  # Ctrl-C too must leave nothing behind
        _remove(partial)
        if isinstance(error, Exception) and _is_disk_full(error):
            raise OSError(
                errno.ENOSPC,
                f"no space left on the disk for {directory}, whose arrays take {size / 2**20:.0f} MiB; nothing was "
                "written: free some space or name a directory on another disk",
            ) from error
        raise


def load(directory: str | Path) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """Reads a checkpoint: ({path: leaf}, header), every leaf on the default device.

    ValueError names the leaf, the array and what was expected, for anything that is missing, unknown, altered or
    written by a newer version.
    """
    directory = Path(directory)
    document = _read_document(directory)
    expected = {
        f"{path}/{name}": array
        for path, leaf in document["leaves"].items()
        for name, array in leaf["arrays"].items()
        if 0 not in array["shape"]
    }
    stored = read_arrays(directory / WEIGHTS, expected)
    leaves = {}
    for path, leaf in document["leaves"].items():
        arrays = {}
        for name, array in leaf["arrays"].items():
            value = stored.pop(f"{path}/{name}", None)
            if value is None:
                value = np.zeros(array["shape"], jnp.dtype(array["dtype"]))
            if _hash(value) != array["sha256"]:
                raise ValueError(
                    f"{path}: array {name} of {directory} does not match its checksum: its bytes were damaged or "
                    "altered after saving; copy the checkpoint again or make it anew"
                )
            arrays[name] = jnp.asarray(value)
        leaves[path] = leaf_from_arrays(arrays, leaf["static"], path)
    return leaves, document["header"]


def read_header(directory: str | Path) -> dict[str, Any]:
    """The header alone, with the JSON checked and no array read. ValueError as `load`."""
    return _read_document(Path(directory))["header"]


# --- the JSON ---------------------------------------------------------------------------------------------------


def _describe(leaves: Mapping[str, Leaf]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """({array name: array on the host}, the JSON of every leaf)."""
    stored, described = {}, {}
    for path, leaf in leaves.items():
        check_name(path, path)
        arrays, static = leaf_arrays(leaf)
        # what could not be loaded is not saved
        leaf_from_arrays(arrays, static, path)
        entries = {}
        for name, array in arrays.items():
            array = np.asarray(array)
            if str(array.dtype) not in _DTYPES:
                raise ValueError(f"{path}: array {name} is {array.dtype}; expected one of {sorted(_DTYPES)}; cast it")
            entries[name] = {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": _hash(array)}
            if array.size:
                stored[f"{path}/{name}"] = array
        described[path] = {"static": static, "arrays": entries}
    return stored, described


def _read_document(directory: Path) -> dict[str, Any]:
    """jquant.json, with everything in it checked that can be without the arrays."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; expected a checkpoint written by jquant")
    for name in (SIDECAR, WEIGHTS):
        if not (directory / name).exists():
            raise ValueError(
                f"{directory} has no {name}: it is not a jquant checkpoint, or only part of one; copy or make it again"
            )
    where = directory / SIDECAR
    try:
        document = json.loads(where.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error}); copy or make the checkpoint again") from error
    if not isinstance(document, dict) or type(document.get("format_version")) is not int:
        raise ValueError(f"{where} has no whole-number format_version; expected a checkpoint written by jquant")
    if document["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{where} has format_version {document['format_version']}, written by {document.get('written_by')}; this "
            f"jquant reads {FORMAT_VERSION}: upgrade it (pip install -U jquant-jax) or make the checkpoint again"
        )
    _check_keys(document, _KEYS, str(where))
    for key in ("header", "leaves"):
        if not isinstance(document[key], dict):
            raise ValueError(f"{where}: {key} is not a JSON object")
    for path, leaf in document["leaves"].items():
        _check_leaf(path, leaf)
    if document["sha256"] != _document_hash(document):
        raise ValueError(
            f"{where} does not match its own checksum: it was altered after saving; make the checkpoint again"
        )
    return document


def _check_leaf(path: str, leaf: Any) -> None:
    """Static fields, names, shapes and types of one leaf, against each other."""
    check_name(path, path)
    _check_keys(leaf, _LEAF_KEYS, path)
    _check_keys(leaf["arrays"], None, f"{path}: arrays")
    shapes = {}
    for name, array in leaf["arrays"].items():
        check_name(name, path)
        _check_keys(array, _ARRAY_KEYS, f"{path}: array {name}")
        shape, dtype = array["shape"], array["dtype"]
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{path}: array {name} has shape {shape!r}; expected a list of sizes")
        if dtype not in _DTYPES:
            raise ValueError(f"{path}: array {name} has dtype {dtype!r}; expected one of {sorted(_DTYPES)}")
        shapes[name] = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
    leaf_from_arrays(shapes, leaf["static"], path)


def _check_keys(value: Any, wanted: set[str] | None, where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}; expected a JSON object")
    if wanted is not None and set(value) != wanted:
        raise ValueError(
            f"{where}: missing keys {sorted(wanted - set(value))}, unknown keys {sorted(set(value) - wanted)}"
        )


def _document_hash(document: Mapping[str, Any]) -> str:
    text = _dumps({key: value for key, value in document.items() if key != "sha256"})
    return hashlib.sha256(text.encode()).hexdigest()


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, sort_keys=True, allow_nan=False, ensure_ascii=False)


def _plain(header: Mapping[str, Any]) -> dict[str, Any]:
    """The header as JSON returns it."""
    try:
        return json.loads(_dumps(dict(header)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the header cannot be written as JSON: {error}; expected finite numbers, texts, lists, dicts"
        ) from error


def _own_version() -> str:
    try:
        return version("jquant-jax")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "of unknown version"


def _hash(array: np.ndarray) -> str:
    # bfloat16 has no buffer, its bytes do
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


# --- the disk ---------------------------------------------------------------------------------------------------


def _flush(folder: Path) -> None:
    """Every file and directory onto the disk, so that the rename cannot arrive before them."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(_fsync, [folder, *folder.rglob("*")]))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    # after Ctrl-C Orbax's threads may still be writing into it
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _is_disk_full(error: BaseException | None) -> bool:
    """TensorStore reports a full disk in the text of some other error."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
