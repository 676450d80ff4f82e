"""Named arrays in a folder, through Orbax, with the same bytes for the same arrays.

    FOLDER/_METADATA                 the tree: one flat dictionary
    FOLDER/<name>/.zarray, 0.0       shape, type; the bytes, uncompressed, little-endian, C order

A name's slashes become directories. Orbax cannot store an array without entries; the caller keeps those out. What it
would get wrong in silence on the way back (a cast, a missing or an extra array) is compared here before reading.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

_ADVICE = "copy the checkpoint again or make it anew"


def holds_arrays(folder: Path) -> bool:
    """Whether `write_arrays` wrote this folder."""
    return (folder / "_METADATA").is_file()


def write_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes {name: array} into a new folder."""
    folder.mkdir()
    if not arrays:
        return
    with _quiet():
        import orbax.checkpoint as ocp
        from etils import epath

        handler = _handler()
        try:
            # the handler alone: a Checkpointer around it would add files with timestamps
            handler.save(epath.Path(folder), args=ocp.args.PyTreeSave(arrays))
            handler.finalize(epath.Path(folder))
        finally:
            handler.close()


def read_arrays(folder: Path, expected: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """{name: array} of exactly the expected names, whose values hold "shape" (a list) and "dtype" (its name).

    ValueError names the array that is missing, unknown, unreadable, or stored with another shape or type.
    """
    if not expected:
        return {}
    for name in expected:
        if not (folder / name / ".zarray").is_file():
            path, _, field = name.rpartition("/")
            raise ValueError(f"{path}: array {field} is not in {folder}; {_ADVICE}")
    with _quiet():
        import orbax.checkpoint as ocp
        from etils import epath

        handler = _handler()
        try:
            with _named(folder, expected):
                found = handler.metadata(epath.Path(folder)).tree
            _compare(folder, found, expected)
            _check_sizes(folder, expected)
            how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in expected}
            with _named(folder, expected):
                return dict(handler.restore(epath.Path(folder), args=ocp.args.PyTreeRestore(restore_args=how)))
        finally:
            handler.close()


def _handler() -> Any:
    # imported here, because it takes as long as jax itself and most commands need no checkpoint.
    # OCDBT files hold random names; compression would save a tenth of the codes and tie bytes to a zstd version.
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, use_compression=False)


def _compare(folder: Path, found: Any, expected: Mapping[str, Mapping[str, Any]]) -> None:
    if not isinstance(found, dict) or set(found) != set(expected):
        names = set(found) if isinstance(found, dict) else set()
        raise ValueError(
            f"{folder} holds other arrays than the checkpoint lists: missing {sorted(set(expected) - names)}, "
            f"unknown {sorted(names - set(expected))}; {_ADVICE}"
        )
    for name, array in expected.items():
        path, _, field = name.rpartition("/")
        for what, got, wanted in (
            ("shape", list(getattr(found[name], "shape", None) or []), array["shape"]),
            ("dtype", str(getattr(found[name], "dtype", None)), array["dtype"]),
        ):
            if got != wanted:
                raise ValueError(f"{path}: array {field} is stored with {what} {got}; the checkpoint expects {wanted}")


def _check_sizes(folder: Path, expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Every array's bytes are there; Orbax would notice, but its other reads, then abandoned, complain aloud."""
    for name, array in expected.items():
        wanted = math.prod(array["shape"]) * jnp.dtype(array["dtype"]).itemsize
        found = sum(part.stat().st_size for part in (folder / name).glob("[0-9]*"))
        if found != wanted:
            path, _, field = name.rpartition("/")
            raise ValueError(f"{path}: array {field} has {found} bytes on the disk; expected {wanted}; {_ADVICE}")


@contextmanager
def _named(folder: Path, expected: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Turns whatever Orbax and TensorStore raise into a ValueError that begins with the array whose file they name."""
    try:
        yield
    except Exception as error:
        text = str(error).partition("\n")[0].partition(" [tensorstore_spec=")[0] or type(error).__name__
        name = next((name for name in expected if f"/{name}/" in text), None)
        if name is None:
            raise ValueError(f"{folder} cannot be read: {text}; {_ADVICE}") from error
        path, _, field = name.rpartition("/")
        raise ValueError(f"{path}: array {field} cannot be read: {text}; {_ADVICE}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's notes about how it works off the user's terminal; errors are raised, not logged."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
