"""GGUF metadata becomes the same configuration and parameters that the Hugging Face spelling gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

import convert
from convert.gguf_config import _unpermute
from jquant.models import RopeScaling


def permute(rows, heads):
    """llama.cpp's convert_hf_to_gguf.py: half order to interleaved order."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def with_biases(tensors, rng):
    sizes = {"attn_q": 32, "attn_k": 16, "attn_v": 16}
    return tensors | {
        f"blk.{layer}.{name}.bias": rng.normal(size=size).astype(np.float32)
        for layer in range(2)
        for name, size in sizes.items()
    }


def test_configuration_of_a_small_llama(gguf_file):
    metadata = {"tokenizer.ggml.tokens": [str(i) for i in range(38)], "tokenizer.ggml.bos_token_id": 1}
    metadata |= {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2}
    source = convert.open_source(gguf_file(metadata=metadata))
    config = source.config
    assert (source.kind, config.family, config.dtype) == ("gguf", "llama", "float32")
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (40, 32, 64)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 8)
    assert (config.max_positions, config.windows, config.norm_eps) == (64, (None, None), 1e-5)
    assert (config.rope_theta, config.rope_scaling, config.tie_embeddings) == (10000.0, RopeScaling(), False)
    assert (config.bos_id, config.eos_ids) == (1, (2, 5))
    assert not (config.qkv_bias or config.out_bias or config.mlp_bias or config.qk_norm)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_only_llama_rows_are_unpermuted_weights_and_biases_alike(gguf_file, small, architecture):
    tensors = with_biases(small.gguf_tensors(), np.random.default_rng(1))
    stored = dict(tensors)
    if architecture == "llama":
        for name in tensors:
            if ".attn_q." in name or ".attn_k." in name:
                stored[name] = permute(tensors[name], 4 if ".attn_q." in name else 2)
    source = convert.open_source(gguf_file(stored, architecture))
    assert source.config.qkv_bias
    model = source.load()
    for layer, block in enumerate(model.layers):
        for theirs, ours in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj")):
            linear = getattr(block.self_attn, ours)
            for kind in ("weight", "bias"):
                expected = tensors[f"blk.{layer}.{theirs}.{kind}"]
                np.testing.assert_array_equal(getattr(linear, kind).get_value(), expected)
    np.testing.assert_array_equal(model.layers[1].mlp.down_proj.weight.get_value(), tensors["blk.1.ffn_down.weight"])
    assert model.lm_head is not None
    np.testing.assert_array_equal(model.lm_head.weight.get_value(), tensors["output.weight"])


def test_scores_of_unpermuted_rows_equal_interleaved_scores_of_stored_rows():
    # What the permutation is for: attention scores are the same in either order of the planes.
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 24))  # three heads of 8, as stored
    frequencies = 10000.0 ** -(np.arange(4) / 4)

    def rotate(planes, position):
        first, second = planes
        cos, sin = np.cos(position * frequencies), np.sin(position * frequencies)
        return np.stack([first * cos - second * sin, second * cos + first * sin])

    def interleaved(rows, position):
        heads = rows.reshape(3, 4, 2)
        return rotate((heads[..., 0], heads[..., 1]), position)

    def half(rows, position):
        heads = rows.reshape(3, 2, 4)
        return rotate((heads[:, 0], heads[:, 1]), position)

    expected = np.sum(interleaved(q, 5) * interleaved(k, 2), axis=(0, 2))
    actual = np.sum(half(_unpermute(3)(q), 5) * half(_unpermute(3)(k), 2), axis=(0, 2))
    # float64 sums of eight products in another order
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_a_file_without_output_is_tied_and_a_quantized_one_is_decoded(gguf_file, small):
    tensors = small.gguf_tensors(tied=True)
    kind = GGMLQuantizationType.Q8_0
    stored = {name: (quantize(array, kind), kind) if array.ndim == 2 else array for name, array in tensors.items()}
    source = convert.open_source(gguf_file(stored))
    assert source.config.tie_embeddings and source.config.dtype == "float32"
    assert source.tensor_bytes() < sum(array.nbytes for array in tensors.values()) / 3
    model = source.load(jnp.bfloat16)
    assert model.lm_head is None
    data = dequantize(quantize(tensors["blk.0.ffn_up.weight"], kind), kind)
    expected = jnp.asarray(data).astype(jnp.bfloat16)
    np.testing.assert_array_equal(model.layers[0].mlp.up_proj.weight.get_value(), expected)
    logits, _ = model(jnp.asarray([[1, 2, 3]], jnp.int32))
    assert jnp.isfinite(logits).all()


def test_half_precision_files_keep_their_type(gguf_file, small):
    halves = {
        name: array.astype(np.float16) if array.ndim == 2 else array for name, array in small.gguf_tensors().items()
    }
    source = convert.open_source(gguf_file(halves))
    assert source.config.dtype == "float16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(source.load())} == {"float16"}


def test_qwen3_norms_and_free_head_size(gguf_file, small):
    tensors = small.gguf_tensors()
    for layer in range(2):
        tensors[f"blk.{layer}.attn_q.weight"] = np.ones((64, 32), np.float32)
        tensors[f"blk.{layer}.attn_output.weight"] = np.ones((32, 64), np.float32)
        for name, shape in (("attn_k", (32, 32)), ("attn_v", (32, 32)), ("attn_q_norm", (16,)), ("attn_k_norm", (16,))):
            tensors[f"blk.{layer}.{name}.weight"] = np.full(shape, layer + 1, np.float32)
    changes = {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": None}
    source = convert.open_source(gguf_file(tensors, "qwen3", changes))
    assert source.config.head_dim == 16 and source.config.qk_norm and source.config.family == "qwen3"
    norm = source.load().layers[1].self_attn.k_norm
    assert norm is not None
    np.testing.assert_array_equal(norm.weight.get_value(), np.full(16, 2.0))


def llama3_factors(factor, theta=500000.0, head_dim=8, low=1.0, high=4.0, original=8192):
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors."""
    factors = []
    for frequency in 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            factors.append(1)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognized_from_its_result(gguf_file, small, factor):
    changes = {"rope.freq_base": 500000.0, "context_length": 131072}
    tensors = small.gguf_tensors() | {"rope_freqs.weight": llama3_factors(factor)}
    source = convert.open_source(gguf_file(tensors, changes=changes))
    assert source.config.rope_scaling == RopeScaling(
        kind="llama3", factor=factor, original_positions=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )
    source.load()


@pytest.mark.parametrize(
    "table", [np.array([1, 2, 3, 4]), llama3_factors(8.0, high=3.0, head_dim=64), np.full(4, np.nan)]
)
def test_other_frequency_tables_are_refused(gguf_file, small, table):
    tensors = small.gguf_tensors() | {"rope_freqs.weight": table.astype(np.float32)}
    with pytest.raises(ValueError, match="rope_freqs.weight .* is not the Llama 3 scaling"):
        convert.open_source(gguf_file(tensors, changes={"rope.freq_base": 500000.0}))


def test_a_frequency_table_of_ones_changes_nothing(gguf_file, small):
    tensors = small.gguf_tensors() | {"rope_freqs.weight": np.ones(4, np.float32)}
    assert convert.open_source(gguf_file(tensors)).config.rope_scaling == RopeScaling()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope.scaling.type": "none"}, RopeScaling()),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, RopeScaling(kind="linear", factor=2.0)),
        ({"rope.scale_linear": 4.0}, RopeScaling(kind="linear", factor=4.0)),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
            RopeScaling(kind="yarn", factor=4.0, original_positions=16),
        ),
    ],
)
def test_rope_scaling_keys(gguf_file, changes, expected):
    assert convert.open_source(gguf_file(changes=changes)).config.rope_scaling == expected


def test_sliding_window_key_applies_to_every_layer(gguf_file):
    assert convert.open_source(gguf_file(changes={"attention.sliding_window": 7})).config.windows == (7, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_count": 8}, "llama.expert_count = '8' is not known"),
        ({"logit_scale": 0.5}, "llama.logit_scale = '0.5' is not known"),
        ({"block_count": None}, "llama.block_count is missing"),
        ({"attention.head_count": [4, 2]}, r"llama.attention.head_count = \[4, 2\] is not one positive integer"),
        ({"rope.dimension_count": 4}, "llama.rope.dimension_count = 4 differs from the size of a head, 8"),
        ({"vocab_size": 41}, "the vocabulary is 41 by llama.vocab_size"),
        ({"attention.head_count_kv": 3}, "4 heads of size 8 with 3 key-value heads"),
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type = 'longrope' is not supported"),
        ({"rope.freq_base": "x"}, "llama.rope.freq_base = 'x' is not a float"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor = 0.5"),
    ],
)
def test_what_is_not_understood_is_refused_by_key_and_value(gguf_file, changes, message):
    with pytest.raises(ValueError, match=message):
        convert.open_source(gguf_file(changes=changes))


def test_values_that_change_nothing_are_accepted(gguf_file):
    convert.open_source(
        gguf_file(changes={"expert_count": 0, "attention.causal": True, "rope.scaling.finetuned": True})
    )


@pytest.mark.parametrize("architecture", ["gemma3", "llama4", "qwen3moe"])
def test_unknown_architectures_list_the_supported_ones(gguf_file, architecture):
    with pytest.raises(ValueError, match="not supported; supported: llama, qwen2, qwen3"):
        convert.open_source(gguf_file(architecture=architecture))


def test_a_part_of_a_split_file_says_how_to_join(gguf_file):
    with pytest.raises(ValueError, match="one of 3 parts; join them with `llama-gguf-split --merge`"):
        convert.open_source(gguf_file(metadata={"split.count": 3}))


def test_unsupported_types_and_stray_tensors_are_listed_at_load(gguf_file, small):
    tensors = small.gguf_tensors()
    tensors["blk.0.ffn_up.weight"] = (np.zeros((64, 18), np.uint8), GGMLQuantizationType.IQ4_NL)
    tensors["blk.0.ffn_gate_inp.weight"] = np.ones((4, 32), np.float32)
    del tensors["blk.1.attn_norm.weight"]
    with pytest.raises(ValueError) as caught:
        convert.open_source(gguf_file(tensors)).load()
    text = str(caught.value)
    assert "not a float type: blk.0.ffn_up.weight is IQ4_NL" in text
    assert "unexpected: blk.0.ffn_gate_inp.weight" in text
    assert "missing: layers.1.input_layernorm.weight [32] (blk.1.attn_norm.weight)" in text


def test_a_file_without_embedding_is_refused(gguf_file, small):
    tensors = small.gguf_tensors()
    del tensors["token_embd.weight"]
    with pytest.raises(ValueError, match="token_embd.weight .* is missing"):
        convert.open_source(gguf_file(tensors))
