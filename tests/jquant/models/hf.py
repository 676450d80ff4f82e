"""Tiny random Hugging Face models and the same models as our Decoder, for comparing logits (torch is needed)."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jquant.models import Decoder, ModelConfig, RopeScaling

TINY: dict[str, Any] = dict(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def tiny_hf(family: str, *, seed: int = 0, **options: Any):
    """A random float32 CPU model of `family`, with weights large enough that every part of it matters.

    Hugging Face's initialiser (0.02 and unit norms) gives near-uniform attention and logits near zero, which would
    hide errors in positions, windows and norms.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **(TINY | options))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
    return model


def config_of(hf: Any) -> ModelConfig:
    """Our configuration of a Hugging Face configuration, written for these tests alone."""
    rope = dict(hf.rope_parameters)
    fields = dict(kind=rope["rope_type"])
    names = (
        "factor low_freq_factor high_freq_factor beta_fast beta_slow attention_factor mscale mscale_all_dim truncate"
    )
    fields |= {name: rope[name] for name in names.split() if rope.get(name) is not None}
    if rope["rope_type"] in ("llama3", "yarn"):
        fields["original_positions"] = rope.get("original_max_position_embeddings")
    window = getattr(hf, "sliding_window", None)
    kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    return ModelConfig(
        family=hf.model_type,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        max_positions=hf.max_position_embeddings,
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        norm_eps=hf.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        rope_scaling=RopeScaling(**fields),
        qkv_bias=hf.model_type == "qwen2" or getattr(hf, "attention_bias", False),
        out_bias=hf.model_type != "qwen2" and getattr(hf, "attention_bias", False),
        mlp_bias=getattr(hf, "mlp_bias", False),
        qk_norm=hf.model_type == "qwen3",
        tie_embeddings=hf.tie_word_embeddings,
    )


def decoder_of(model: Any, config: ModelConfig | None = None, dtype: Any = jnp.float32) -> Decoder:
    """Our Decoder with the weights of a Hugging Face model; every parameter must be found and none left over."""
    state = {
        name.removeprefix("model."): tensor.float().numpy()
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_word_embeddings and name == "lm_head.weight")
    }
    decoder = Decoder(config or config_of(model.config), dtype=dtype)
    for path, module in nnx.iter_modules(decoder):
        for name in ("weight", "bias"):
            parameter = getattr(module, name, None)
            if isinstance(parameter, nnx.Param):
                array = state.pop(".".join(map(str, (*path, name))))
                assert array.shape == parameter.get_value().shape
                parameter.set_value(jnp.asarray(array, dtype))
    assert not state, f"unused parameters {sorted(state)}"
    return decoder


def hf_logits(model: Any, tokens: np.ndarray, **inputs: Any) -> np.ndarray:
    """Logits [B, T, V] float32 of a Hugging Face model."""
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(tokens, dtype=torch.long), use_cache=False, **inputs).logits.float().numpy()
