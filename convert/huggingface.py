"""Hugging Face checkpoints: a directory, or a hub id that is fetched into the hub's own cache first.

A directory holds `config.json`, perhaps `generation_config.json`, the tokenizer's files, and safetensors shards with
names such as `model.layers.0.self_attn.q_proj.weight`, matrices [N, K] (out, in) as ours. Only data is fetched or
read: no pickles, no Python files.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from convert.families import config_from_json, tensor_rules
from convert.mapping import Rule
from convert.safetensors_file import SafetensorsReader
from jquant.models import ModelConfig

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FETCH = ("*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja")
# Second copies of the weights in the authors' own layouts, and weights that other programs read.
_LEAVE = ("consolidated*", "original/*", "onnx/*", "*/*")
_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def is_hub_id(source: str) -> bool:
    """Whether the text has the form `owner/name`."""
    return _HUB_ID.fullmatch(source) is not None


def download(hub_id: str) -> Path:
    """Fetches weights, configuration and tokenizer of `owner/name`; the directory in the hub's cache.

    Offline, a complete copy in the cache is used. ValueError says in one line why it could not be had.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_FETCH), ignore_patterns=list(_LEAVE))
        )
    except errors.GatedRepoError:
        reason = "it is gated: accept its terms on the hub and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "the hub has no such public model: check the spelling, or log in with `hf auth login` if it is private"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = (
            "the hub cannot be reached (offline) and the cache has no complete copy: connect, or give the path of a "
            "local directory or .gguf file"
        )
    except Exception as error:  # the HTTP library below the hub's client has changed, and its errors with it
        reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no details'])[0]}"
    raise ValueError(f"{hub_id!r} is no local path, and as a hub id it cannot be downloaded: {reason}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object; download it again")
    return value


def open_directory(directory: Path) -> tuple[ModelConfig, SafetensorsReader, tuple[Rule, ...]]:
    """Configuration, tensors and naming table of one directory; reads headers only.

    ValueError: no config.json, an unsupported configuration, missing or damaged weights.
    """
    config_path = directory / "config.json"
    if not config_path.is_file():
        ggufs = sorted(path.name for path in directory.glob("*.gguf"))
        hint = f"; to read a GGUF file give its path: {directory / ggufs[0]}" if ggufs else ""
        raise ValueError(f"{directory} has no config.json, so it is no Hugging Face model directory{hint}")
    config_json = _read_json(config_path)
    generation_path = directory / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.is_file() else {}
    # The configuration first: for an unsupported model that is the better news than how its files are.
    config_from_json(config_json, generation, "float32", str(directory))
    reader = SafetensorsReader(directory)
    config = config_from_json(config_json, generation, _stored_dtype(reader, directory), str(directory))
    return config, reader, tensor_rules(config.tie_embeddings)


def _stored_dtype(reader: SafetensorsReader, directory: Path) -> str:
    """The float type most of the bytes have: the headers know it, config.json only claims it."""
    stored: Counter[str] = Counter()
    for info in reader.infos().values():
        stored[info.dtype] += info.stored_bytes
    floats = [(size, kind) for kind, size in stored.items() if kind in _DTYPES]
    if not floats:
        kinds = ", ".join(sorted(stored)) or "none"
        raise ValueError(f"{directory} has no floating-point weights (stored types: {kinds}); only those are read")
    return _DTYPES[max(floats)[1]]
