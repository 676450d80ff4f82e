"""What the Decoder promises beyond its logits: abstract building, jit, padding, precision, loss."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.models import Decoder, ModelConfig, RMSNorm, RopeScaling
from jquant.models.loss import CHUNK_ROWS, token_losses

CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    windows=(None, 5, None),
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    qk_norm=True,
)


def loud(config: ModelConfig = CONFIG, scale: float = 8.0) -> Decoder:
    """A random model whose attention and logits are far from uniform."""
    return jax.tree.map(lambda leaf: leaf * scale if leaf.ndim == 2 else leaf, Decoder(config, key=jax.random.key(0)))


# Logits are of order 1 and float32 sums may run in another order.
ROUNDING = 5e-5


def tokens_of(length: int, batch: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).integers(0, CONFIG.vocab_size, (batch, length)), jnp.int32)


def programs(function: Any) -> int:
    """How many programs a jitted function has compiled."""
    return function._cache_size()


@jax.jit
def logits_of(model: Decoder, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
    return model(tokens, positions)[0]


@jax.jit
def hidden_of(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model.hidden(tokens)[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_model_is_built_abstractly(dtype):
    abstract = jax.eval_shape(lambda: Decoder(CONFIG, dtype=dtype))
    concrete = Decoder(CONFIG, dtype=dtype)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    for leaf, real in zip(jax.tree.leaves(abstract), jax.tree.leaves(concrete), strict=True):
        assert isinstance(leaf, jax.ShapeDtypeStruct)
        assert (leaf.shape, leaf.dtype) == (real.shape, dtype)


def test_tied_embeddings_are_one_leaf():
    tied = Decoder(dataclasses.replace(CONFIG, tie_embeddings=True))
    assert tied.lm_head is None
    assert len(jax.tree.leaves(tied)) == len(jax.tree.leaves(Decoder(CONFIG))) - 1


def test_parameter_paths_are_those_of_hugging_face():
    leaves = jax.tree_util.tree_leaves_with_path(Decoder(CONFIG))
    paths = {jax.tree_util.keystr(path).removesuffix(".value").lstrip(".") for path, _ in leaves}
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    norms += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    linears = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    inside = norms + [f"{name}.{part}" for name in linears for part in ("weight", "bias")]
    expected = {f"layers[{index}].{name}" for index in range(3) for name in inside}
    assert paths == expected | {"embed_tokens.weight", "norm.weight", "lm_head.weight"}


def test_two_models_of_one_config_share_one_compilation():
    forward = jax.jit(lambda model, tokens: model(tokens)[0])
    for seed in range(3):
        forward(Decoder(CONFIG, key=jax.random.key(seed)), tokens_of(8))
    assert programs(forward) == 1


def test_equal_blocks_share_one_compilation():
    config = dataclasses.replace(CONFIG, windows=(None, None, None))
    model = loud(config)
    context = model.context(jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 8)))
    block = jax.jit(lambda layer, x, context: layer(x, context)[0])
    x = model.embed(tokens_of(8))
    for layer in model.layers:
        x = block(layer, x, context)
    assert programs(block) == 1
    np.testing.assert_allclose(model.head(x), logits_of(model, tokens_of(8)), atol=ROUNDING)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["default", "dynamic"])
def test_padding_changes_no_logit(side, kind):
    model = loud(dataclasses.replace(CONFIG, max_positions=16, rope_scaling=RopeScaling(kind, factor=4.0)))
    tokens = tokens_of(20)
    pad = ((0, 0), (9, 0) if side == "left" else (0, 9))
    positions = jnp.broadcast_to(jnp.arange(20, dtype=jnp.int32), tokens.shape)
    padded = logits_of(model, jnp.pad(tokens, pad), jnp.pad(positions, pad, constant_values=-1))
    real = slice(9, None) if side == "left" else slice(0, 20)
    np.testing.assert_allclose(padded[:, real], logits_of(model, tokens), atol=ROUNDING)
    assert np.isfinite(np.asarray(padded)).all()


def test_dynamic_frequencies_of_a_row_ignore_its_companions():
    config = dataclasses.replace(CONFIG, max_positions=8, rope_scaling=RopeScaling("dynamic", factor=4.0))
    model, tokens = loud(config), tokens_of(20)
    positions = np.stack([np.arange(20), np.r_[np.arange(6), np.full(14, -1)]]).astype(np.int32)
    together = logits_of(model, tokens, jnp.asarray(positions))
    np.testing.assert_allclose(together[1:, :6], logits_of(model, tokens[1:, :6]), atol=ROUNDING)


def test_a_token_outside_the_vocabulary_is_not_mistaken_for_another():
    logits = logits_of(loud(), jnp.asarray([[1, CONFIG.vocab_size]], jnp.int32))
    assert np.isnan(np.asarray(logits[0, 1])).all()


def test_memory_without_positions_is_refused():
    with pytest.raises(ValueError, match="positions"):
        Decoder(CONFIG)(tokens_of(4), None, ())


def test_rms_norm_of_half_precision_is_computed_in_float32():
    norm = RMSNorm(64, eps=1e-6, dtype=jnp.float16)
    x = jnp.full((1, 64), 1000.0, jnp.float16)  # 1000^2 is beyond float16
    np.testing.assert_allclose(np.asarray(norm(x), np.float32), 1.0, atol=1e-3)


@pytest.mark.parametrize("length", [2, 9, CHUNK_ROWS + 5])
def test_loss_equals_float64_cross_entropy(length):
    model, tokens = loud(dataclasses.replace(CONFIG, max_positions=512)), tokens_of(length)
    x = hidden_of(model, tokens)
    logits = np.asarray(model.head(x), np.float64)[:, :-1]
    chosen = np.take_along_axis(logits, np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    expected = np.log(np.exp(logits).sum(-1)) - chosen
    np.testing.assert_allclose(jax.jit(token_losses)(model, x[:, :-1], tokens[:, 1:]), expected, atol=1e-4)
    np.testing.assert_allclose(jax.jit(Decoder.loss)(model, x, tokens), expected.mean(-1), rtol=1e-5)


def test_loss_gradient_equals_that_of_whole_logits():
    model, tokens = loud(), tokens_of(12)

    def whole(model):
        logits = jax.nn.log_softmax(model(tokens)[0][:, :-1])
        return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))

    ours = jax.jit(jax.grad(lambda model: jnp.mean(model.loss(model.hidden(tokens)[0], tokens))))(model)
    for mine, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(jax.jit(jax.grad(whole))(model)), strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5 + 1e-4 * float(jnp.abs(expected).max()))


def test_loss_never_holds_the_logits_of_a_sequence():
    config = dataclasses.replace(CONFIG, vocab_size=5000, max_positions=4096)
    model, length = Decoder(config), 8 * CHUNK_ROWS
    x, tokens = jnp.zeros((1, length, 32)), jnp.zeros((1, length), jnp.int32)
    gradient = jax.jit(jax.grad(lambda x, model: jnp.sum(model.loss(x, tokens))))
    memory = gradient.lower(x, model).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < length * 5000 * 4


def test_a_loss_needs_a_target():
    with pytest.raises(ValueError, match="at least 2"):
        loud().loss(jnp.zeros((1, 1, 32)), jnp.zeros((1, 1), jnp.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(windows=(None,)), "1 windows for num_layers=3"),
        (dict(num_kv_heads=3), "num_heads=4, not a multiple of num_kv_heads=3"),
        (dict(head_dim=7), "head_dim=7"),
        (dict(vocab_size=0), "vocab_size=0"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_unknown_rope_kinds_are_refused_by_name():
    with pytest.raises(ValueError, match="'longrope'.*yarn"):
        RopeScaling("longrope")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="low_freq_factor=None"):
        RopeScaling("llama3", factor=8.0)


def test_config_survives_json():
    import json

    config = dataclasses.replace(CONFIG, eos_ids=(1, 2), rope_scaling=RopeScaling("yarn", 4.0, 32, truncate=False))
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(ValueError, match="colour"):
        ModelConfig.from_json(config.to_json() | {"colour": 1})
