"""Every attribute of a config.json is handled, ignored for a reason, or refused by name and value."""

import json

import pytest
from transformers import AutoConfig

from convert.families import FAMILIES, config_from_json
from jquant.models import RopeScaling

LLAMA2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA31 = LLAMA2 | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
SMOLLM2 = LLAMA2 | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "vocab_size": 49152,
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = {key: value for key, value in QWEN2.items() if key != "use_mrope"} | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "sliding_window": None,
}


def convert(config, generation=None):
    return config_from_json(config, generation or {}, "bfloat16", "it")


def reference(config):
    """What the installed transformers makes of the same config.json."""
    return AutoConfig.for_model(**json.loads(json.dumps(config)))


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_attributes_mean_what_they_mean_in_transformers(family):
    theirs, ours = reference({"model_type": family}), convert({"model_type": family})
    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope_scaling.kind == theirs.rope_parameters["rope_type"]
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert set(ours.windows) == {theirs.sliding_window if family == "mistral" else None}
    assert FAMILIES[family].defaults["hidden_act"] == theirs.hidden_act
    for name in ("attention_bias", "mlp_bias", "max_window_layers", "use_sliding_window"):
        if name in FAMILIES[family].defaults:
            assert FAMILIES[family].defaults[name] == getattr(theirs, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_installed_transformers_saves_is_understood(family):
    config = json.loads(reference({"model_type": family}).to_json_string(use_diff=False))
    assert convert(config) == convert({"model_type": family})


@pytest.mark.parametrize("config", [LLAMA2, LLAMA31, SMOLLM2, MISTRAL, QWEN2, QWEN3])
def test_published_configurations_are_understood(config):
    ours = convert(config)
    assert ours.rope_theta == config.get("rope_theta", 10000.0)
    assert ours.head_dim == config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    assert ours.tie_embeddings == config["tie_word_embeddings"]
    assert (ours.qkv_bias, ours.out_bias, ours.mlp_bias) == (config["model_type"] == "qwen2", False, False)
    assert ours.qk_norm == (config["model_type"] == "qwen3")
    assert set(ours.windows) == {4096 if config is MISTRAL else None}
    assert ours.dtype == "bfloat16"


def test_both_spellings_of_rope_are_the_same():
    scaling = LLAMA31["rope_scaling"]
    new = {key: value for key, value in LLAMA31.items() if not key.startswith("rope_")}
    new["rope_parameters"] = scaling | {"rope_theta": 500000.0}
    old = LLAMA31 | {"rope_scaling": {("type" if k == "rope_type" else k): v for k, v in scaling.items()}}
    assert convert(new) == convert(old) == convert(LLAMA31)
    assert convert(LLAMA31).rope_scaling == RopeScaling(
        kind="llama3", factor=8.0, original_positions=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"type": "linear", "factor": 2}, RopeScaling(kind="linear", factor=2.0)),
        ({"rope_type": "dynamic", "factor": 4.0}, RopeScaling(kind="dynamic", factor=4.0, original_positions=4096)),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 16},
            RopeScaling(kind="yarn", factor=4.0, original_positions=1024, beta_fast=16.0),
        ),
        (
            {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024, "truncate": False},
            RopeScaling(kind="yarn", factor=4.0, original_positions=1024, truncate=False),
        ),
        ({"rope_type": "default"}, RopeScaling()),
    ],
)
def test_rope_kinds(rope, expected):
    assert convert(LLAMA2 | {"rope_scaling": rope}).rope_scaling == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; only 'silu'"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantization_config = .*gptq.* already quantized",
        ),
        ({"pretraining_tp": 2}, "pretraining_tp = 2 is refused"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.X"}}, "auto_map = .*code of its own, which is never run"),
        ({"rope_interleaved": True}, "rope_interleaved = True is refused: supported: False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is refused"),
        ({"sliding_window": 512}, "sliding_window = 512 is refused"),
        ({"num_local_experts": 8}, "num_local_experts = 8 is refused: unknown for llama"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is refused"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures = .*only causal language models"),
        ({"hidden_size": "4096"}, "hidden_size = '4096' is not a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 is not a positive integer"),
        ({"num_key_value_heads": 5}, "num_attention_heads = 32 is not a multiple of num_key_value_heads = 5"),
        ({"num_attention_heads": 31, "num_key_value_heads": None}, "hidden_size = 4096 is not a multiple of"),
        ({"head_dim": 3}, "head_dim = 3 is odd"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes' is not true or false"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0"),
        ({"eos_token_id": "</s>"}, "eos_token_id = '</s>' is neither an id nor a list"),
        ({"bos_token_id": [1]}, r"bos_token_id = \[1\] is not an id"),
        ({"rope_theta": -1}, "rope_theta = -1 is not a positive number"),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "rope_type = 'longrope' is not supported; supported: default, linear",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor = '2' is not a number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor = 0.5 is below 1"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "mrope": 1}}, "rope_scaling.mrope = 1 is not known"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs between kinds of layers"),
        ({"rope_parameters": 3}, "rope_parameters = 3 is not an object"),
    ],
)
def test_one_broken_attribute_is_named_with_its_value(changes, message):
    with pytest.raises(ValueError, match=message):
        convert(LLAMA2 | changes)


def test_all_refused_attributes_are_in_one_error():
    with pytest.raises(ValueError) as caught:
        convert(LLAMA2 | {"hidden_act": "gelu", "pretraining_tp": 4, "novelty": {"deep": [1]}})
    text = str(caught.value)
    assert "hidden_act = 'gelu'" in text and "pretraining_tp = 4" in text and "novelty = {'deep': [1]}" in text


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3", None, ["llama"]])
def test_unknown_architectures_list_the_supported_ones(model_type):
    with pytest.raises(ValueError, match="not supported; supported: llama, mistral, qwen2, qwen3"):
        convert(LLAMA2 | {"model_type": model_type})


def test_eos_ids_of_both_files_are_merged_in_order():
    assert convert(LLAMA31, {"eos_token_id": [128009, 5]}).eos_ids == (128001, 128008, 128009, 5)
    silent = {key: value for key, value in LLAMA2.items() if not key.endswith("token_id")}
    assert convert(silent).eos_ids == (2,)
    assert convert(silent, {"eos_token_id": 7, "bos_token_id": 6}).eos_ids == (7,)
    assert convert(silent, {"bos_token_id": 6}).bos_id == 6
    assert convert(LLAMA2 | {"eos_token_id": None, "bos_token_id": None}).eos_ids == ()
    assert convert(LLAMA2 | {"eos_token_id": None, "bos_token_id": None}).bos_id is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [None, None, None, None]),
        ({"use_sliding_window": True}, [None, None, 8, 8]),
        ({"use_sliding_window": True, "max_window_layers": 4}, [None, None, None, None]),
        (
            {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
            [8, None, 8, None],
        ),
        ({"layer_types": ["full_attention"] * 4}, [None, None, None, None]),
    ],
)
def test_qwen_windows_follow_transformers(changes, expected):
    config = QWEN2 | {"num_hidden_layers": 4, "sliding_window": 8, "max_window_layers": 2} | changes
    assert list(convert(config).windows) == expected
    theirs = reference(config)
    kinds = [theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types]
    assert kinds == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"]}, "does not list 24 layers"),
        ({"layer_types": ["full_attention"] * 23 + ["conv"]}, r"layer_types has \['conv'\]"),
        ({"layer_types": ["sliding_attention"] * 24}, "use_sliding_window is false"),
        ({"sliding_window": -3, "use_sliding_window": True}, "sliding_window = -3"),
        ({"max_window_layers": None}, "max_window_layers = None is not an integer"),
    ],
)
def test_impossible_windows_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        convert(QWEN2 | changes)


def test_biases_and_norms_follow_the_family():
    assert convert(LLAMA2 | {"attention_bias": True, "mlp_bias": True}).out_bias
    assert convert(QWEN3 | {"attention_bias": True}).qkv_bias
    with pytest.raises(ValueError, match="attention_bias = True is refused"):
        convert(MISTRAL | {"attention_bias": True})
    assert convert(MISTRAL | {"sliding_window": None}).windows == (None,) * 32
