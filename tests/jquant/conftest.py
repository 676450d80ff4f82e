"""A tiny Llama checkpoint on disk, complete with a tokenizer: what the command line and the pipeline work on."""

import json
import string
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jquant.format import tree as trees
from jquant.models import Decoder, ModelConfig

LETTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits + " .,\n"
SPECIAL = ("<s>", "</s>", "<unk>")
TINY = ModelConfig(
    family="llama",
    vocab_size=len(LETTERS) + len(SPECIAL),
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=128,
    windows=(None,) * 3,
    tie_embeddings=True,
    bos_id=0,
    eos_ids=(1,),
)
TEXT = "the quick brown fox jumps over the lazy dog. Pack my box with five dozen jugs, 0123456789.\n" * 40


def tiny_model(seed: int = 0) -> Decoder:
    """A random model whose layers matter: weights large enough that rounding shows in the logits."""
    model = Decoder(TINY, key=jax.random.key(seed))
    scaled = {path: leaf * 6 for path, leaf in trees.leaves(model).items() if leaf.ndim == 2}
    return trees.replace(model, scaled)


@pytest.fixture(scope="session")
def model() -> Decoder:
    return tiny_model()


@pytest.fixture(scope="session")
def sequences() -> np.ndarray:
    """Calibration tokens [6, 24]."""
    return np.random.default_rng(0).integers(3, TINY.vocab_size, (6, 24)).astype(np.int32)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import Fuse

    directory = tmp_path_factory.mktemp("tiny") / "model"
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": TINY.vocab_size,
        "hidden_size": TINY.hidden_size,
        "intermediate_size": TINY.intermediate_size,
        "num_hidden_layers": TINY.num_layers,
        "num_attention_heads": TINY.num_heads,
        "num_key_value_heads": TINY.num_kv_heads,
        "head_dim": TINY.head_dim,
        "max_position_embeddings": TINY.max_positions,
        "rms_norm_eps": TINY.norm_eps,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {f"model.{path}": np.asarray(leaf) for path, leaf in trees.leaves(tiny_model()).items()}
    save_file(tensors, directory / "model.safetensors")
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 128,
        "chat_template": "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file
