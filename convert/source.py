"""An opened checkpoint of somebody else's: what it is, and how to get our model and its tokenizer out of it."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from convert.mapping import Rule, TensorReader, load_into
from jquant.linear import Implementation
from jquant.models import Decoder, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DTYPES = ("float32", "bfloat16", "float16")
# Bytes of every tensor that enter the fingerprint: enough to tell two fine-tunes of one model apart.
_SAMPLE_BYTES = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint whose headers have been read and whose configuration is supported; `open_source` makes them.

    `kind` is "huggingface" or "gguf", `name` what the user called it, `path` the directory or file.
    """

    config: ModelConfig
    kind: str
    name: str
    path: Path
    reader: TensorReader
    rules: tuple[Rule, ...]

    def load(self, dtype: DTypeLike | None = None, implementation: Implementation = None) -> Decoder:
        """The model, its parameters in `dtype` (None: as the source stores them; float32 where it stores blocks).

        Reads one tensor at a time: host memory stays below the model plus a few copies of its largest tensor.
        `model.config.dtype` tells the type that was loaded. ValueError lists every tensor that is missing,
        unexpected, misshaped, of a wrong type, or not finite.
        """
        wanted = jnp.dtype(self.config.dtype if dtype is None else dtype)
        if wanted.name not in _DTYPES:
            raise ValueError(f"parameters cannot be loaded as {wanted.name}; expected one of {', '.join(_DTYPES)}")
        config = dataclasses.replace(self.config, dtype=wanted.name)
        abstract = jax.eval_shape(lambda: Decoder(config, dtype=wanted, implementation=implementation))
        return load_into(abstract, self.reader, self.rules, config.num_layers, wanted, self.name)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The checkpoint's own tokenizer, as a transformers object that `save_pretrained` can store anywhere."""
        from convert.tokenizer import load_tokenizer

        return load_tokenizer(self.path)

    def tensor_names(self) -> tuple[str, ...]:
        """Every tensor of the checkpoint by the source's name, sorted."""
        return tuple(sorted(self.reader.infos()))

    def tensor_bytes(self) -> int:
        """Bytes of all tensors as the source stores them."""
        return sum(info.stored_bytes for info in self.reader.infos().values())

    def fingerprint(self) -> str:
        """64 hex digits: SHA-256 of the configuration and of name, shape, type, size and first KiB of every tensor.

        Independent of where the checkpoint lies, how it is sharded and when it was written.
        """
        digest = hashlib.sha256(json.dumps(self.config.to_json(), sort_keys=True).encode())
        for name, info in sorted(self.reader.infos().items()):
            digest.update(f"\n{name} {info.shape} {info.dtype} {info.stored_bytes}\n".encode())
            digest.update(self.reader.sample(name, _SAMPLE_BYTES))
        return digest.hexdigest()
