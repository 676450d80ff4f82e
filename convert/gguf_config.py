"""GGUF metadata and tensor names -> `ModelConfig` and the naming table.

A GGUF file describes its network by keys under the architecture's name (`llama.block_count`), of which every one is
used, ignored on purpose, or refused. Names and one transform differ from Hugging Face's:

- `blk.0.attn_q.weight` and so on; matrices are [N, K] as ours once the dims are read in reverse;
- in the "llama" architecture (Llama, Mistral, SmolLM2) the rows of q_proj and k_proj are stored for *interleaved*
  rotary embedding: reshape(heads, 2, d/2, K).swap(1, 2). `_unpermute` is the inverse. Qwen files keep the "half" order;
- Llama 3's frequency scaling is stored as its result, `rope_freqs.weight` [d/2], the divisor of every frequency.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert.gguf_file import GGUFReader
from convert.mapping import Rule, raise_all
from jquant.models import ModelConfig, RopeScaling

# architecture -> (our family, whether q and k rows are interleaved, whether q and k are normalised)
_ARCHITECTURES = {"llama": ("llama", True, False), "qwen2": ("qwen2", False, False), "qwen3": ("qwen3", False, True)}
_REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
_USED = (
    *_REQUIRED,
    "vocab_size",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor",
)
_FLOATS = (
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.scale_linear",
    *(key for key in _USED if key.startswith("rope.scaling.") and key.endswith(("factor", "beta_fast", "beta_slow"))),
)
_IGNORED = {
    "rope.scaling.finetuned": "says how the model was trained",
    "tensor_data_layout": "names the order of the file it was converted from",
}
# Keys that would change the network, accepted where their value says that they do not.
_INERT = {"attention.causal": True, "expert_count": 0, "expert_used_count": 0, "use_parallel_residual": False}
_UNKNOWN = object()
# Llama 3.1 and 3.2 share these; the file keeps the result only, so they are assumed and then checked against it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_positions": 8192}
_ROPE_FACTORS = "rope_freqs.weight"


def open_file(path: Path) -> tuple[ModelConfig, GGUFReader, tuple[Rule, ...]]:
    """Configuration, tensors and naming table of one file; of the tensors only `rope_freqs.weight` is read.

    ValueError: a damaged file, an unsupported architecture, key or value (all of them listed).
    """
    reader = GGUFReader(path)
    if reader.metadata.get("split.count", 0) > 1:
        raise ValueError(
            f"{path} is one of {reader.metadata['split.count']} parts; join them with `llama-gguf-split --merge` first"
        )
    architecture = reader.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"{path} has the architecture {architecture!r}, which is not supported; "
            f"supported: {', '.join(_ARCHITECTURES)} (Mistral and SmolLM2 files are 'llama')"
        )
    config = _config(reader, architecture, str(path))
    return config, reader, tensor_rules(config, permuted=_ARCHITECTURES[architecture][1])


def _config(reader: GGUFReader, architecture: str, name: str) -> ModelConfig:
    infos, errors = reader.infos(), []
    prefix = architecture + "."
    values = {key[len(prefix) :]: value for key, value in reader.metadata.items() if key.startswith(prefix)}
    for key, value in values.items():
        if key not in _USED and key not in _IGNORED and value != _INERT.get(key, _UNKNOWN):
            errors.append(f"{prefix}{key} = {str(value)[:100]!r} is not known to this converter")
    for key in _REQUIRED:
        if key not in values:
            errors.append(f"{prefix}{key} is missing")
    for key in (*_REQUIRED[:-1], "attention.head_count_kv", "attention.key_length", "attention.sliding_window"):
        if key in values and (type(values[key]) is not int or values[key] < (key != "attention.sliding_window")):
            errors.append(f"{prefix}{key} = {str(values[key])[:100]} is not one positive integer")
    for key in _FLOATS:
        if key in values and type(values[key]) is not float:
            errors.append(f"{prefix}{key} = {str(values[key])[:100]!r} is not a float")
    embedding = infos.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        errors.append("the tensor token_embd.weight [vocabulary, hidden] is missing")
    raise_all(f"the configuration of {name} cannot be used", errors)
    assert embedding is not None
    heads, hidden = values["attention.head_count"], values["embedding_length"]
    kv_heads = values.get("attention.head_count_kv", heads)
    head_dim = values.get("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.get(key, head_dim) != head_dim:
            errors.append(f"{prefix}{key} = {values[key]} differs from the size of a head, {head_dim}; not supported")
    if heads % kv_heads or head_dim % 2:
        errors.append(f"{heads} heads of size {head_dim} with {kv_heads} key-value heads are not a supported shape")
    vocab_size = embedding.shape[0]
    tokens = reader.metadata.get("tokenizer.ggml.tokens", [])
    if values.get("vocab_size", vocab_size) != vocab_size or len(tokens) > vocab_size:
        errors.append(
            f"the vocabulary is {values.get('vocab_size')} by {prefix}vocab_size, {len(tokens)} by "
            f"tokenizer.ggml.tokens, and {vocab_size} by token_embd.weight; they should agree"
        )
    theta = _shortest(values.get("rope.freq_base", 10000.0))
    scaling = _rope_scaling(values, prefix, errors)
    if _ROPE_FACTORS in infos:
        scaling = _llama3_scaling(reader, theta, head_dim, scaling, errors)
    raise_all(f"the configuration of {name} cannot be used", errors)
    ids = (reader.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    window = values.get("attention.sliding_window") or None
    return ModelConfig(
        family=_ARCHITECTURES[architecture][0],
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=values["feed_forward_length"],
        num_layers=values["block_count"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=values["context_length"],
        windows=(window,) * values["block_count"],
        norm_eps=_shortest(values["attention.layer_norm_rms_epsilon"]),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias="blk.0.attn_q.bias" in infos,
        out_bias="blk.0.attn_output.bias" in infos,
        mlp_bias="blk.0.ffn_gate.bias" in infos,
        qk_norm=_ARCHITECTURES[architecture][2],
        tie_embeddings="output.weight" not in infos,
        bos_id=reader.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_ids=tuple(dict.fromkeys(token for token in ids if token is not None)),
        dtype=_dtype({info.dtype for info in infos.values() if len(info.shape) == 2}),
    )


def _shortest(value: float) -> float:
    """1e-05 for the float32 nearest to it: the shortest decimal is what the file's author meant."""
    return float(str(np.float32(value)))


def _dtype(kinds: set[str]) -> str:
    """The matrices' own type where they share a 16-bit one; decoded blocks are float32."""
    return {"F16": "float16", "BF16": "bfloat16"}.get(next(iter(kinds)), "float32") if len(kinds) == 1 else "float32"


def _rope_scaling(values: dict[str, Any], prefix: str, errors: list[str]) -> RopeScaling:
    kind = values.get("rope.scaling.type", "linear" if "rope.scale_linear" in values else "none")
    factor = _shortest(values.get("rope.scaling.factor", values.get("rope.scale_linear", 1.0)) or 1.0)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind != "yarn":
        errors.append(f"{prefix}rope.scaling.type = {kind!r} is not supported; supported: none, linear, yarn")
        return RopeScaling()
    extrapolation = values.get("rope.scaling.yarn_ext_factor", 1.0)
    if extrapolation not in (1.0, -1.0):
        errors.append(f"{prefix}rope.scaling.yarn_ext_factor = {extrapolation} is not supported; only 1 is")
    attention = _shortest(values.get("rope.scaling.attn_factor", values.get("rope.scaling.yarn_attn_factor", 1.0)))
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_positions=values.get("rope.scaling.original_context_length", values["context_length"]),
        beta_fast=_shortest(values.get("rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=_shortest(values.get("rope.scaling.yarn_beta_slow", 1.0)),
        # llama.cpp multiplies YaRN's own factor by this one.
        attention_factor=None if attention == 1.0 else attention * (1.0 + 0.1 * float(np.log(factor))),
    )


def _llama3_scaling(
    reader: GGUFReader, theta: float, head_dim: int, scaling: RopeScaling, errors: list[str]
) -> RopeScaling:
    """Llama 3's parameters from the divisors it leads to; the slowest plane is divided by exactly the factor."""
    stored = reader.read(_ROPE_FACTORS).astype(np.float64).reshape(-1)
    if stored.size == head_dim // 2 and np.all(stored == 1.0):
        return scaling
    if stored.size == head_dim // 2 and scaling.kind == "default" and np.isfinite(stored).all():
        factor = _shortest(stored[-1])
        turns = _LLAMA3["original_positions"] * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
        blend = np.clip(
            (turns - _LLAMA3["low_freq_factor"]) / (_LLAMA3["high_freq_factor"] - _LLAMA3["low_freq_factor"]), 0, 1
        )
        # Stored as float32 after float32 arithmetic: a few roundings of 6e-8, and 1e-4 is far below the next factor.
        if factor >= 1 and np.allclose(stored, 1 / ((1 - blend) / factor + blend), rtol=1e-4, atol=0):
            return RopeScaling(
                kind="llama3",
                factor=factor,
                original_positions=int(_LLAMA3["original_positions"]),
                low_freq_factor=_LLAMA3["low_freq_factor"],
                high_freq_factor=_LLAMA3["high_freq_factor"],
            )
    errors.append(
        f"{_ROPE_FACTORS} ({stored.size} values up to {stored.max(initial=0):g}) is not the Llama 3 scaling of "
        "low_freq_factor 1, high_freq_factor 4 and original context 8192; other tables are not supported"
    )
    return RopeScaling()


def _unpermute(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Rows [heads * d, ...] (or a bias) from interleaved to half order."""

    def transform(rows: np.ndarray) -> np.ndarray:
        pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)

    return transform


def tensor_rules(config: ModelConfig, permuted: bool) -> tuple[Rule, ...]:
    """GGUF name -> our path, for both weights and biases."""
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    linears = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"} | {
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"} | {
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
    }
    return (
        Rule("token_embd.weight", "embed_tokens.weight"),
        Rule("output_norm.weight", "norm.weight"),
        Rule("output.weight", "lm_head.weight"),
        Rule(_ROPE_FACTORS, None),
        *(
            Rule(
                f"blk.{{}}.{theirs}.{kind}",
                f"layers.{{}}.{ours}.{kind}",
                _unpermute(heads[theirs]) if permuted and theirs in heads else None,
            )
            for theirs, ours in linears.items()
            for kind in ("weight", "bias")
        ),
        *(Rule(f"blk.{{}}.{theirs}.weight", f"layers.{{}}.{ours}.weight") for theirs, ours in norms.items()),
    )
