"""Other people's checkpoints -> our model: Hugging Face directories, hub ids and GGUF files.

    source = convert.open_source("owner/name")      reads and checks configuration and headers
    model = source.load()                           streams the tensors into a `jquant.models` Decoder
    tokenizer = source.tokenizer()

torch is never needed, nothing from a checkpoint is ever run, and whatever is not understood is refused by name.
"""

from pathlib import Path

from convert.gguf_config import open_file
from convert.huggingface import download, is_hub_id, open_directory
from convert.source import Source
from convert.tokenizer import load_tokenizer

__all__ = ["Source", "load_tokenizer", "open_source"]


def open_source(source: str | Path) -> Source:
    """Opens a Hugging Face model directory, a .gguf file or a hub id `owner/name` (fetched unless cached).

    Reads the configuration and the headers of the weights and checks both; no tensor is read yet. ValueError says what
    was wrong, what was expected and what to give instead.
    """
    name, path = str(source), Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(
                f"{name} is a file, but no .gguf file; give a .gguf file, or the directory that holds config.json"
            )
        config, reader, rules = open_file(path)
        return Source(config, "gguf", name, path, reader, rules)
    if not path.is_dir():
        if not is_hub_id(name):
            raise ValueError(
                f"{name} does not exist: looked for a directory with config.json and for a .gguf file of that name, "
                "and it has not the form of a hub id (owner/name); check the path"
            )
        path = download(name)
    config, reader, rules = open_directory(path)
    return Source(config, "huggingface", name, path, reader, rules)
