"""Small checkpoints written by hand, so that these tests need no network and most of them no torch."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SMALL_GGUF: dict[str, Any] = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": 8,
}


def small_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights with Hugging Face's names for a Llama-like config.json without biases."""
    rng = np.random.default_rng(seed)
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = d // config["num_attention_heads"]
    kv = head * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (d, d),
                "self_attn.k_proj": (kv, d),
                "self_attn.v_proj": (kv, d),
                "self_attn.o_proj": (d, d),
                "mlp.gate_proj": (f, d),
                "mlp.up_proj": (f, d),
                "mlp.down_proj": (d, f),
                "input_layernorm": (d,),
                "post_attention_layernorm": (d,),
            }.items()
        }
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def small() -> SimpleNamespace:
    """`config`, `tensors(config)` of the small Llama, and `gguf_tensors()` of the small GGUF model."""
    return SimpleNamespace(config=SMALL, tensors=small_tensors, gguf_tensors=gguf_tensors)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`checkpoint(tensors=None, config changes...)` writes a small Llama directory and returns it."""

    def write(tensors: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
        directory = tmp_path / "model"
        directory.mkdir()
        config = SMALL | changes
        (directory / "config.json").write_text(json.dumps(config))
        save_file(small_tensors(config) if tensors is None else tensors, directory / "model.safetensors")
        return directory

    return write


def gguf_tensors(seed: int = 0, tied: bool = False) -> dict[str, np.ndarray]:
    """Random float32 weights with GGUF's names for SMALL_GGUF."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (40, 32), "output_norm.weight": (32,)}
    if not tied:
        shapes["output.weight"] = (40, 32)
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_q": (32, 32),
                "attn_k": (16, 32),
                "attn_v": (16, 32),
                "attn_output": (32, 32),
                "ffn_gate": (64, 32),
                "ffn_up": (64, 32),
                "ffn_down": (32, 64),
                "attn_norm": (32,),
                "ffn_norm": (32,),
            }.items()
        }
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def gguf_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a GGUF file; tensors are arrays or (bytes [N, bytes a row], type)."""

    def write(
        tensors: dict[str, Any] | None = None,
        architecture: str = "llama",
        changes: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Path:
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        keys = {f"{architecture}.{key}": value for key, value in (SMALL_GGUF | (changes or {})).items()}
        for key, value in (keys | (metadata or {})).items():
            if value is not None:
                _add(writer, key, value)
        for name, value in (gguf_tensors() if tensors is None else tensors).items():
            data, kind = value if isinstance(value, tuple) else (value, None)
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
