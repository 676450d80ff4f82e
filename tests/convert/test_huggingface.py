"""Whole directories: what transformers saves is loaded and computes the same; what is wrong is said."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert import huggingface

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 40))
BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
CASES = {
    "llama": ("llama", {}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 16, "rms_norm_eps": 1e-3}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "llama-dynamic-rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2-yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 1e6,
            }
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-biased": ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
}


def saved(directory, family, changes, shard_size="5GB"):
    """A random torch model of transformers, saved; norms and biases are randomized too, since they start trivial."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(BASE | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(directory, max_shard_size=shard_size)
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(tmp_path, case):
    family, changes = CASES[case]
    expected = saved(tmp_path, family, changes)
    source = convert.open_source(tmp_path)
    assert (source.kind, source.config.family, source.config.dtype) == ("huggingface", family, "float32")
    with jax.default_matmul_precision("highest"):
        logits, _ = source.load()(jnp.asarray(TOKENS, jnp.int32))
    # float32 on both sides with sums in another order; logits are of order 1.
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)


def test_shards_load_to_the_same_parameters(tmp_path):
    saved(tmp_path / "one", "llama", {})
    saved(tmp_path / "many", "llama", {}, shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (convert.open_source(tmp_path / name) for name in ("one", "many"))
    jax.tree.map(np.testing.assert_array_equal, one.load(), many.load())
    assert one.fingerprint() == many.fingerprint()
    assert one.tensor_names() == many.tensor_names()


def test_spelling_of_transformers_4_is_read(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}
    expected = saved(tmp_path, "llama", {"rope_parameters": rope})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["dtype"]
    path.write_text(
        json.dumps(
            config | {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"}
        )
    )
    with jax.default_matmul_precision("highest"):
        logits, _ = convert.open_source(tmp_path).load()(jnp.asarray(TOKENS, jnp.int32))
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)


def test_parameters_are_the_tensors(checkpoint):
    directory = checkpoint()
    source = convert.open_source(str(directory))
    model, tensors = source.load(), load_file(directory / "model.safetensors")
    assert set(source.tensor_names()) == set(tensors)
    assert source.tensor_bytes() == sum(array.nbytes for array in tensors.values())
    up = model.layers[1].mlp.up_proj.weight.get_value()
    np.testing.assert_array_equal(up, tensors["model.layers.1.mlp.up_proj.weight"])
    assert model.lm_head is not None
    np.testing.assert_array_equal(model.lm_head.weight.get_value(), tensors["lm_head.weight"])


@pytest.mark.parametrize("stored", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_the_type_is_the_headers_unless_another_is_asked_for(checkpoint, small, stored):
    directory = checkpoint(
        {name: array.astype(stored) for name, array in small.tensors(small.config).items()}, dtype="wrong"
    )
    source = convert.open_source(directory)
    assert source.config.dtype == np.dtype(stored).name
    for wanted in (None, jnp.float32, jnp.bfloat16):
        model = source.load(wanted)
        expected = np.dtype(stored if wanted is None else wanted)
        assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {expected}
        assert model.config.dtype == expected.name
    with pytest.raises(ValueError, match="cannot be loaded as int8; expected one of float32"):
        source.load(jnp.int8)


def test_missing_misnamed_and_misshaped_tensors_are_in_one_error(checkpoint, small):
    tensors = small.tensors(small.config)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.1.mlp.gate.weight"] = tensors.pop("model.layers.1.mlp.gate_proj.weight")
    tensors["model.norm.weight"] = np.ones(17, np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(16, np.float32)
    source = convert.open_source(checkpoint(tensors))
    with pytest.raises(ValueError) as caught:
        source.load()
    text = str(caught.value)
    assert "missing: layers.0.mlp.up_proj.weight [24, 16] (model.layers.0.mlp.up_proj.weight)" in text
    assert "missing: layers.1.mlp.gate_proj.weight" in text
    assert "unexpected: model.layers.1.mlp.gate.weight" in text
    assert "misshaped: model.norm.weight is [17], expected [16]" in text
    assert "unexpected: model.layers.0.self_attn.q_proj.bias" in text


def test_nan_is_named(checkpoint, small):
    tensors = small.tensors(small.config)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    with pytest.raises(ValueError, match="model.layers.1.mlp.down_proj.weight has 1 NaN"):
        convert.open_source(checkpoint(tensors)).load()


def test_old_rotary_buffers_and_an_equal_tied_head_are_passed_over(checkpoint, small):
    config = small.config | {"tie_word_embeddings": True}
    tensors = small.tensors(config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    directory = checkpoint(tensors, tie_word_embeddings=True)
    assert convert.open_source(directory).load().lm_head is None
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight should be a copy of embed_tokens.weight"):
        convert.open_source(directory).load()


def test_fingerprint_tells_weights_apart_and_not_places(checkpoint, tmp_path):
    directory = checkpoint()
    first = convert.open_source(directory).fingerprint()
    assert len(first) == 64
    moved = directory.rename(tmp_path / "elsewhere")
    assert convert.open_source(moved).fingerprint() == first
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, moved / "model.safetensors")
    assert convert.open_source(moved).fingerprint() != first


def test_the_configuration_is_refused_before_the_weights_are_missed(checkpoint):
    directory = checkpoint(hidden_act="relu")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="hidden_act = 'relu'"):
        convert.open_source(directory)


def test_only_quantized_weights_are_refused(checkpoint, small):
    tensors = {name: array.astype(np.int8) for name, array in small.tensors(small.config).items()}
    with pytest.raises(ValueError, match=r"no floating-point weights \(stored types: I8\)"):
        convert.open_source(checkpoint(tensors))


@pytest.mark.parametrize("text", ["", "[1]", "{", '"x"'])
def test_an_unreadable_config_is_named(checkpoint, text):
    directory = checkpoint()
    (directory / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json (is not valid JSON|holds a)"):
        convert.open_source(directory)


def test_what_is_not_there_is_said_with_what_to_give(tmp_path):
    with pytest.raises(
        ValueError, match="does not exist: looked for a directory with config.json and for a .gguf file"
    ):
        convert.open_source(tmp_path / "nothing")
    with pytest.raises(ValueError, match="has no config.json, so it is no Hugging Face model directory"):
        convert.open_source(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="to read a GGUF file give its path: .*a.gguf"):
        convert.open_source(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file, but no .gguf file"):
        convert.open_source(tmp_path / "a.bin")


def test_a_hub_id_is_fetched_without_code_or_pickles(checkpoint, monkeypatch):
    import huggingface_hub

    directory, asked = checkpoint(), {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = convert.open_source("owner/name-1.5")
    assert (source.name, source.path, asked["repo_id"]) == ("owner/name-1.5", directory, "owner/name-1.5")
    assert not any(pattern.endswith((".bin", ".pt", ".py", ".pth", "*")) for pattern in asked["allow_patterns"])


def test_a_failed_download_is_one_line_with_its_cause(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def failing(error):
        def snapshot_download(*args, **options):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        with pytest.raises(ValueError) as caught:
            convert.open_source("owner/name")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "cannot be reached (offline)" in failing(errors.LocalEntryNotFoundError("x\ny"))
    assert "cannot be reached (offline)" in failing(errors.OfflineModeIsEnabled("x"))
    assert "RuntimeError: broken pipe" in failing(RuntimeError("broken pipe\nmore"))
    missing = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
    assert "the hub has no such public model" in failing(missing)
    assert "it is gated" in failing(errors.GatedRepoError.__new__(errors.GatedRepoError))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("owner/name", True), ("meta-llama/Llama-3.2-1B", True), ("name", False), ("/abs/path", False), ("a/b/c", False)]
    + [("./here", False), ("../up", False), ("owner/", False), ("a b/c", False)],
)
def test_hub_ids_have_the_form_owner_slash_name(text, expected):
    assert huggingface.is_hub_id(text) == expected
