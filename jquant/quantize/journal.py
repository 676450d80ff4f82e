"""Finished blocks on disk, so that an interrupted quantization goes on at the next one.

A journal is a directory beside the output:

    run.json            what is being made: source, plan, method, seed, calibration; a run may only continue its own
    calibration.npy     the token sequences, so that text the model sampled for itself is not sampled again
    block-0007.safetensors   block 7: its packed arrays, named `<path>/<array>`; static fields and reports as metadata

Every file is written under another name and renamed, so a file that exists is whole. Nothing is unpickled.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jquant.format.checkpoint import leaf_arrays, leaf_from_arrays
from jquant.format.weights import QuantizedLinear
from jquant.quantize.matrix import LayerReport
from jquant.quantize.pipeline import Results

_SEPARATOR = "/"


class DirectoryJournal:
    """The journal of one run in `directory`, created if it is not there.

    run: everything that decides the result, JSON-ready. ValueError if the directory belongs to another run (naming
    what differs), or if it exists and `resume` is False.
    """

    def __init__(self, directory: Path, run: Mapping[str, Any], *, resume: bool):
        self.directory = directory
        described = json.dumps(run, indent=1, sort_keys=True)
        file = directory / "run.json"
        if file.exists():
            if not resume:
                raise ValueError(
                    f"{directory} holds an interrupted run of this output; add --resume to continue it, "
                    "or delete that directory to start again"
                )
            _check_same(json.loads(file.read_text()), json.loads(described), directory)
        else:
            directory.mkdir(parents=True, exist_ok=True)
            _write(file, lambda path: path.write_text(described))

    def calibration(self) -> np.ndarray | None:
        """The stored token sequences [S, T], or None."""
        file = self.directory / "calibration.npy"
        return np.load(file, allow_pickle=False) if file.exists() else None

    def store_calibration(self, sequences: np.ndarray) -> None:
        def write(path: Path) -> None:
            with path.open("wb") as stream:  # a file object: np.save would add its own suffix to a name
                np.save(stream, sequences, allow_pickle=False)

        _write(self.directory / "calibration.npy", write)

    def load(self, block: int) -> Results | None:
        """The results of a finished block, or None; a damaged file counts as unfinished."""
        file = self._file(block)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="numpy") as stored:
                described = json.loads((stored.metadata() or {})["layers"])
                arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, KeyError, ValueError):
            return None
        results: Results = {}
        for path, (static, report) in described.items():
            own = {
                name.removeprefix(path + _SEPARATOR): array
                for name, array in arrays.items()
                if name.startswith(path + _SEPARATOR)
            }
            weight = leaf_from_arrays(own, static, path)
            if not isinstance(weight, QuantizedLinear):
                return None
            results[path] = (weight, LayerReport(**report))
        return results

    def store(self, block: int, results: Results) -> None:
        arrays, described = {}, {}
        for path, (weight, report) in results.items():
            own, static = leaf_arrays(weight)
            arrays |= {path + _SEPARATOR + name: np.ascontiguousarray(array) for name, array in own.items()}
            described[path] = (static, report.to_json())
        metadata = {"layers": json.dumps(described)}
        _write(self._file(block), lambda path: save_file(arrays, path, metadata=metadata))

    def finished_blocks(self) -> int:
        """How many blocks are stored."""
        return len(list(self.directory.glob("block-*.safetensors")))

    def remove(self) -> None:
        """Deletes the journal, after the output is safe."""
        shutil.rmtree(self.directory)

    def _file(self, block: int) -> Path:
        return self.directory / f"block-{block:04d}.safetensors"


def _write(file: Path, write: Any) -> None:
    """Writes under a temporary name, forces it to disk and renames it."""
    temporary = file.with_name(file.name + ".tmp")
    write(temporary)
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(file)


def _check_same(stored: Any, given: Any, directory: Path) -> None:
    differing = sorted(key for key in {*stored, *given} if stored.get(key) != given.get(key))
    if differing:
        what = "; ".join(f"{key} was {_short(stored.get(key))}, is {_short(given.get(key))}" for key in differing)
        raise ValueError(
            f"{directory} belongs to a different run ({what}); give the same arguments, or delete that directory"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
