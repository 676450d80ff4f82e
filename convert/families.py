"""Hugging Face configurations of the Llama-like families -> `ModelConfig`, with nothing passed over in silence.

Llama, Mistral, Qwen2 and Qwen3 are one decoder with different settings, so a family is a table: what an absent
attribute of config.json means (`defaults`, as in the transformers class of the same name, which a test compares) and
how its attributes set biases, norms and windows. Each attribute of a config.json is then one of

- handled: it is in `defaults` and enters the ModelConfig;
- inert: it is in `_INERT` and may only have values that change nothing here;
- ignored on purpose: it is in `_IGNORED`, with the reason;
- refused by name and value, as everything unknown is: a new feature cannot slip through.

(The idea is Penzai's: models/transformer/variants/llama.py refuses what it does not know.)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from convert.mapping import Rule, raise_all
from convert.rope import rope_from_json
from jquant.models import ModelConfig

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_ROPE = {"rope_theta": None, "rope_scaling": None, "rope_parameters": None}


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    `defaults` holds every handled attribute with the meaning of its absence; `biases` tells from the attributes
    whether q, k, v have a bias, whether o has, whether the MLP has; `windows` gives one window or None a layer.
    """

    model_type: str
    defaults: dict[str, Any]
    biases: Callable[[dict[str, Any]], tuple[bool, bool, bool]]
    windows: Callable[[dict[str, Any], list[str]], tuple[int | None, ...]]
    qk_norm: bool = False
    default_theta: float = 10000.0


def _full(values: dict[str, Any], errors: list[str]) -> tuple[int | None, ...]:
    return (None,) * values["num_hidden_layers"]


def _same_everywhere(values: dict[str, Any], errors: list[str]) -> tuple[int | None, ...]:
    return (_window(values, errors),) * values["num_hidden_layers"]


def _by_layer(values: dict[str, Any], errors: list[str]) -> tuple[int | None, ...]:
    window = _window(values, errors) if values["use_sliding_window"] else None
    count, first = values["num_hidden_layers"], values["max_window_layers"]
    kinds = values["layer_types"]
    if kinds is None:
        slides = [window is not None and layer >= first for layer in range(count)]
        return tuple(window if slide else None for slide in slides)
    if not isinstance(kinds, list) or len(kinds) != count:
        errors.append(f"layer_types = {kinds!r} does not list {count} layers (num_hidden_layers)")
        return (None,) * count
    unknown = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"})
    if unknown:
        errors.append(f"layer_types has {unknown}; supported: full_attention, sliding_attention")
    if "sliding_attention" in kinds and window is None:
        errors.append("layer_types has sliding_attention, but sliding_window is null or use_sliding_window is false")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _window(values: dict[str, Any], errors: list[str]) -> int | None:
    window = values["sliding_window"]
    if window is not None and (type(window) is not int or window < 1):
        errors.append(f"sliding_window = {window!r} is neither null nor a positive number of tokens")
        return None
    return window


_COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
} | _ROPE
_QWEN = _COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            _COMMON
            | {"intermediate_size": 11008, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
            biases=lambda v: (v["attention_bias"], v["attention_bias"], v["mlp_bias"]),
            windows=_full,
        ),
        Family(
            "mistral",
            _COMMON
            | {
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "sliding_window": 4096,
            },
            biases=lambda v: (False, False, False),
            windows=_same_everywhere,
        ),
        Family("qwen2", _QWEN, biases=lambda v: (True, False, False), windows=_by_layer),
        Family(
            "qwen3",
            _QWEN | {"head_dim": 128, "attention_bias": False},
            biases=lambda v: (v["attention_bias"], v["attention_bias"], False),
            windows=_by_layer,
            qk_norm=True,
        ),
    )
}

# Attributes that would change the model, accepted where their value says that they do not.
_INERT: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "chunk_size_feed_forward": (0,),
    "is_encoder_decoder": (False,),
    "layer_types": (None,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (None, 1, 1.0),
    "per_layer_config": (None, {}),
    "pretraining_tp": (None, 1),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False, None),
}
_WHY_REFUSED = {
    "quantization_config": "already quantized checkpoints are not read by this version; give the original model",
    "pretraining_tp": "weights sliced for tensor parallel pretraining are not supported; only 1 is",
    "auto_map": "the model comes with code of its own, which is never run",
}

# Attributes that do not change what the network computes, with the reason.
_SAMPLING = "a default for sampling; generate takes these as arguments"
_TRAINING = "used in training only"
_BOOKKEEPING = "says where the file comes from, not what the model is"
_RUNTIME = "how transformers runs it, not what it computes"
_IGNORED: dict[str, str] = {
    "architectures": "checked on its own",
    "model_type": "chose the family",
    "dtype": "read from the headers of the weights instead",
    "torch_dtype": "read from the headers of the weights instead",
    "pad_token_id": "padding is marked by positions here",
    "unk_token_id": "the tokenizer's business",
    "tokenizer_class": "the tokenizer's business",
    "attention_dropout": _TRAINING,
    "initializer_range": _TRAINING,
    "id2label": "for classifiers",
    "label2id": "for classifiers",
    "num_labels": "for classifiers",
    "problem_type": "for classifiers",
    "is_llama_config": _BOOKKEEPING,
    "transformers.js_config": "for another program",
    "unsloth_fixed": _BOOKKEEPING,
    "unsloth_version": _BOOKKEEPING,
    **dict.fromkeys(("transformers_version", "_name_or_path", "name_or_path", "_commit_hash"), _BOOKKEEPING),
    **dict.fromkeys(("use_cache", "output_attentions", "output_hidden_states", "return_dict", "torchscript"), _RUNTIME),
    **dict.fromkeys(("_attn_implementation", "attn_implementation", "_attn_implementation_autoset"), _RUNTIME),
    **dict.fromkeys(("is_decoder", "use_bfloat16", "tie_last_hidden_states", "_flash_attn_2_enabled"), _RUNTIME),
    **dict.fromkeys(("temperature", "top_k", "top_p", "typical_p", "do_sample", "max_length", "min_length"), _SAMPLING),
    **dict.fromkeys(("num_beams", "num_beam_groups", "early_stopping", "length_penalty"), _SAMPLING),
    **dict.fromkeys(("repetition_penalty", "diversity_penalty", "no_repeat_ngram_size"), _SAMPLING),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"), _SAMPLING),
    **dict.fromkeys(("output_scores", "return_dict_in_generate", "suppress_tokens"), _SAMPLING),
    **dict.fromkeys(("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"), _SAMPLING),
    **dict.fromkeys(("remove_invalid_values", "exponential_decay_length_penalty", "prefix"), _SAMPLING),
    **dict.fromkeys(("decoder_start_token_id", "sep_token_id", "task_specific_params", "finetuning_task"), _SAMPLING),
    "cross_attention_hidden_size": "for encoder-decoder models",
}


def config_from_json(config: dict[str, Any], generation: dict[str, Any], dtype: str, name: str) -> ModelConfig:
    """ModelConfig from the contents of config.json and generation_config.json (`{}` where there is none).

    `dtype` is the type of the stored weights. ValueError lists everything wrong, by attribute and value.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise ValueError(
            f"{name} has model_type {config.get('model_type')!r}, which is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    errors: list[str] = []
    architectures = config.get("architectures") or []
    if any(not str(item).endswith("ForCausalLM") for item in architectures):
        errors.append(f"architectures = {architectures!r}: only causal language models (...ForCausalLM) are supported")
    _refuse(family, config, errors)
    values = family.defaults | {key: value for key, value in config.items() if key in family.defaults}
    _check_sizes(values, errors)
    raise_all(f"the configuration of {name} cannot be used", errors)
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    head_dim = values["head_dim"] or hidden // heads
    rope = {key: config[key] for key in _ROPE if key in config}
    theta, scaling = rope_from_json(rope, family.default_theta, values["max_position_embeddings"], errors)
    windows = family.windows(values, errors)
    bos, eos = _special_ids(family, config, generation, errors)
    if head_dim % 2:
        errors.append(f"head_dim = {head_dim} is odd; rotary embeddings need an even one")
    raise_all(f"the configuration of {name} cannot be used", errors)
    qkv_bias, out_bias, mlp_bias = family.biases(values)
    return ModelConfig(
        family=family.model_type,
        vocab_size=values["vocab_size"],
        hidden_size=hidden,
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values["num_key_value_heads"] or heads,
        head_dim=head_dim,
        max_positions=values["max_position_embeddings"],
        windows=windows,
        norm_eps=float(values["rms_norm_eps"]),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        qk_norm=family.qk_norm,
        tie_embeddings=values["tie_word_embeddings"],
        bos_id=bos,
        eos_ids=eos,
        dtype=dtype,
    )


def _refuse(family: Family, config: dict[str, Any], errors: list[str]) -> None:
    for key, value in config.items():
        if key in family.defaults or key in _IGNORED:
            continue
        if key in _INERT and any(value is ok or (value == ok and type(value) is type(ok)) for ok in _INERT[key]):
            continue
        shown = repr(value) if len(repr(value)) <= 120 else repr(value)[:117] + "..."
        why = _WHY_REFUSED.get(key)
        if why is None and key in _INERT:
            why = f"supported: {', '.join(repr(ok) for ok in _INERT[key])}"
        errors.append(
            f"{key} = {shown} is refused: "
            + (why or f"unknown for {family.model_type}; if it changes nothing, remove it from config.json")
        )


def _check_sizes(values: dict[str, Any], errors: list[str]) -> None:
    optional = [key for key in ("head_dim", "num_key_value_heads") if values[key] is not None]
    for key in (*_SIZES, "max_position_embeddings", *optional):
        if type(values[key]) is not int or values[key] < 1:
            errors.append(f"{key} = {values[key]!r} is not a positive integer")
    for key in _FLAGS:
        if key in values and type(values[key]) is not bool:
            errors.append(f"{key} = {values[key]!r} is not true or false")
    if values["hidden_act"] not in ("silu", "swish"):
        errors.append(f"hidden_act = {values['hidden_act']!r} is not supported; only 'silu' is")
    if type(values["rms_norm_eps"]) not in (int, float) or not values["rms_norm_eps"] >= 0:
        errors.append(f"rms_norm_eps = {values['rms_norm_eps']!r} is not a number of at least 0")
    if type(values.get("max_window_layers", 0)) is not int:
        errors.append(f"max_window_layers = {values['max_window_layers']!r} is not an integer")
    if errors:
        return
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if kv_heads is not None and heads % kv_heads:
        errors.append(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
    if values["head_dim"] is None and values["hidden_size"] % heads:
        errors.append(f"hidden_size = {values['hidden_size']} is not a multiple of num_attention_heads = {heads}")


def _special_ids(
    family: Family, config: dict[str, Any], generation: dict[str, Any], errors: list[str]
) -> tuple[int | None, tuple[int, ...]]:
    """BOS, and every id that either file lets end a text; the class's defaults only where both files are silent."""
    eos: list[int] = []
    for source in (config, generation) if "eos_token_id" in {**config, **generation} else (family.defaults,):
        value = source.get("eos_token_id")
        for item in value if isinstance(value, list) else [value]:
            if type(item) is int and item not in eos:
                eos.append(item)
            elif item is not None and type(item) is not int:
                errors.append(f"eos_token_id = {value!r} is neither an id nor a list of ids")
    given = [source["bos_token_id"] for source in (config, generation) if "bos_token_id" in source]
    bos = next((item for item in given if item is not None), None) if given else family.defaults["bos_token_id"]
    if bos is not None and type(bos) is not int:
        errors.append(f"bos_token_id = {bos!r} is not an id")
        bos = None
    return bos, tuple(eos)


_LAYER_TENSORS = (
    *(f"self_attn.{part}_proj.{kind}" for part in "qkvo" for kind in ("weight", "bias")),
    *(f"mlp.{part}_proj.{kind}" for part in ("gate", "up", "down") for kind in ("weight", "bias")),
    *(f"{norm}.weight" for norm in ("self_attn.q_norm", "self_attn.k_norm")),
    *(f"{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")),
)


def tensor_rules(tied: bool) -> tuple[Rule, ...]:
    """The table of the whole group: our names are theirs without `model.`; a tied head is a copy of the embedding."""
    return (
        Rule("model.embed_tokens.weight", "embed_tokens.weight"),
        *(Rule(f"model.layers.{{}}.{name}", f"layers.{{}}.{name}") for name in _LAYER_TENSORS),
        Rule("model.norm.weight", "norm.weight"),
        Rule("lm_head.weight", "embed_tokens.weight" if tied else "lm_head.weight"),
        # Old checkpoints stored the rotary frequencies, which the configuration determines.
        Rule("model.layers.{}.self_attn.rotary_emb.inv_freq", None),
        Rule("model.rotary_emb.inv_freq", None),
    )
