"""Tokenizers: transformers' own for a directory, one built from the file's vocabulary for GGUF.

Whatever comes back is a transformers tokenizer: it encodes, decodes, knows BOS and EOS and the chat template, and
`save_pretrained(dir)` writes what `load_tokenizer(dir)` or `AutoTokenizer.from_pretrained(dir)` reads again, with no
config.json needed. Only local files are read and no code from them is run.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.gguf_file import GGUFReader
from convert.gguf_tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(source: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a local directory or .gguf file.

    ValueError: no tokenizer files, files that transformers cannot read, or a GGUF vocabulary of an unsupported kind.
    """
    path = Path(source).expanduser()
    with _without_torch_advice():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    if path.is_file():
        backend, settings = build_tokenizer(GGUFReader(path).metadata, str(path))
        return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; expected a directory with tokenizer files, or a .gguf file")
    if not any((path / name).is_file() for name in _FILES):
        raise ValueError(f"{path} has no tokenizer; expected {' or '.join(_FILES[:2])} beside the weights")
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, ImportError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the tokenizer of {path} cannot be read ({reason}); a tokenizer.json is read best") from error


@contextmanager
def _without_torch_advice() -> Iterator[None]:
    """Drops the one line that transformers prints at import where torch is absent: it is never needed here."""

    def keep(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger: Any = logging.getLogger("transformers")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
