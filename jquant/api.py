"""The face in Python: open, load and save models, whatever they come from.

    model = jq.load("owner/name" | directory | file.gguf | quantized directory)
    jq.save(directory, quantized_model, report, tokenizer=...)

A quantized directory is this project's own checkpoint (`jquant.format.checkpoint`) whose header holds

    config       the `ModelConfig`              method, plan, report    how it was made
    calibration  where the text came from       dtype                   type of the leaves left dense
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jquant.format import checkpoint, tree as trees
from jquant.format.nested import narrow
from jquant.format.weights import canonical, is_quantized, shape_of
from jquant.linear import Implementation, prepare
from jquant.models import Decoder, ModelConfig
from jquant.models.decoder import untied
from jquant.quantize.calibrate import calibrate, split_batches
from jquant.quantize.passes.transforms import Kind as Kind, transform
from jquant.quantize.pipeline import Report


class Opened(Protocol):
    """A model that can be loaded: headers read and checked, no tensor read yet."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def kind(self) -> str: ...

    @property
    def name(self) -> str: ...

    def load(self, dtype: DTypeLike | None = None, implementation: Implementation = None) -> Decoder: ...

    def tokenizer(self) -> Any: ...

    def fingerprint(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class QuantizedDirectory:
    """An opened checkpoint of this project; see `Opened`."""

    path: Path
    header: Mapping[str, Any]
    config: ModelConfig
    kind: str = "jquant"

    @property
    def name(self) -> str:
        return str(self.path)

    def load(self, dtype: DTypeLike | None = None, implementation: Implementation = None) -> Decoder:
        """The model in the layout this device reads fastest; its dense leaves in `dtype` (None: as stored)."""
        leaves, _ = checkpoint.load(self.path)
        wanted = jnp.dtype(self.config.dtype if dtype is None else dtype)
        config = dataclasses.replace(self.config, dtype=wanted.name)
        abstract = jax.eval_shape(lambda: Decoder(config, dtype=wanted, implementation=implementation))
        _check_leaves(trees.leaves(abstract), leaves, self.path)
        ready = {
            path: leaf if is_quantized(leaf) else jnp.asarray(leaf).astype(wanted) for path, leaf in leaves.items()
        }
        return prepare(trees.replace(abstract, ready))

    def tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    def fingerprint(self) -> str:
        return hashlib.sha256((self.path / checkpoint.SIDECAR).read_bytes()).hexdigest()


def open_model(source: str | Path) -> Opened:
    """Opens a quantized directory, a Hugging Face directory or hub id, or a .gguf file.

    ValueError says what was wrong, what was expected and what to give instead.
    """
    path = Path(source).expanduser()
    if checkpoint.is_checkpoint(path):
        header = checkpoint.read_header(path)
        try:
            config = ModelConfig.from_json(header["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path / checkpoint.SIDECAR}: the model config cannot be read ({error})") from error
        return QuantizedDirectory(path, header, config)
    from convert import open_source  # not at import time: convert itself stands on jquant

    return open_source(source)


def load(
    source: str | Path,
    dtype: DTypeLike | None = None,
    implementation: Implementation = None,
    *,
    bits: int | None = None,
) -> Decoder:
    """The model at `source` as a Flax NNX module, quantized or not, ready to run.

    bits: the width to read nested codebooks at; None is their widest.

    dtype: type of the parameters and the arithmetic; None is the stored type, but float32 on a CPU, where half
    precision is only slower. implementation: see `jquant.linear`.
    """
    model = open_model(source).load(run_dtype(dtype), implementation)
    return model if bits is None else prepare(narrow(model, bits))


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer stored with a model, as a transformers object."""
    from convert import load_tokenizer as load_files, open_source

    path = Path(source).expanduser()
    return load_files(path) if path.exists() else open_source(source).tokenizer()


def load_text(path: Path) -> str:
    """A UTF-8 text file; ValueError if it is anything else, or empty."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); give a plain text"
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is empty; give a plain text file")
    return text


def run_dtype(dtype: DTypeLike | None) -> DTypeLike | None:
    """The type to load parameters in when the user named none: float32 on a CPU, else as stored (None)."""
    return jnp.float32 if dtype is None and jax.default_backend() == "cpu" else dtype


def transformed(model: Decoder, kind: Kind, sequences: np.ndarray | None = None, seed: int = 0) -> Decoder:
    """The same function in other weights, which quantize better: kind "rotate", "rotate-offline" or "smooth".

    Tied embeddings are untied first where the kind needs it. "smooth" measures the inputs on token sequences [S, T].
    See `jquant.quantize.passes.transforms`.
    """
    amax = None
    if kind == "smooth":
        if sequences is None:
            raise ValueError("the transform smooth measures the layers' inputs; give calibration sequences")
        stats = calibrate(model, split_batches(sequences), "range")
        amax = {path: stat.finalize() for path, stat in stats.items()}
    elif model.config.tie_embeddings:
        model = untied(model)
    return transform(model, kind, seed=seed, head_dim=model.config.head_dim, amax=amax)


def save(
    directory: str | Path,
    model: Decoder,
    report: Report | None = None,
    *,
    tokenizer: Any = None,
    calibration: Mapping[str, Any] | None = None,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes a quantized model: packed weights, `jquant.json` and the tokenizer; all or nothing.

    dtype: type of the leaves that stayed dense; None keeps theirs. ValueError if the directory exists.
    """
    dense = jnp.dtype(model.config.dtype if dtype is None else dtype)
    leaves = {
        path: canonical(leaf) if is_quantized(leaf) else leaf.astype(dense)
        for path, leaf in trees.leaves(model).items()
    }
    header = {
        "config": dataclasses.replace(model.config, dtype=dense.name).to_json(),
        "plan": {} if report is None else {layer.path: layer.spec for layer in report.layers},
        "report": None if report is None else report.to_json(),
        "calibration": dict(calibration or {}),
    }
    extra = None if tokenizer is None else tokenizer.save_pretrained
    checkpoint.save(Path(directory), leaves, header, extra)


def _check_leaves(expected: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    """ValueError listing every leaf that is missing, unexpected or of another shape."""
    problems = [f"{name} is missing" for name in sorted(set(expected) - set(found))]
    problems += [f"{name} does not belong to this model" for name in sorted(set(found) - set(expected))]
    for name in sorted(set(expected) & set(found)):
        leaf = found[name]
        shape = shape_of(leaf) if is_quantized(leaf) else tuple(np.shape(leaf))
        if shape != expected[name].shape:
            problems.append(f"{name} has shape {list(shape)}; the config wants {list(expected[name].shape)}")
    if problems:
        raise ValueError(f"{path} does not hold the model its config describes: " + "; ".join(problems[:20]))
