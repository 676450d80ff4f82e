"""Transforms: the same logits from other weights, quieter channels, and a refusal of what cannot stay the same."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.format import tree as trees
from jquant.format.rotation import Rotation, Transformed, matrix
from jquant.format.weights import AffineWeight, affine_weight
from jquant.models import Decoder, ModelConfig
from jquant.models.decoder import untied
from jquant.quantize.calibrate.blocks import block_prefix, run_tapped
from jquant.quantize.passes.transforms import (
    fold_norms,
    rotate_inputs,
    rotate_residual,
    rotate_values,
    rotations,
    smooth,
    transform,
)

# widths with an odd part, so that rotations are not Hadamard matrices alone; two query heads a kv head
PLAIN = ModelConfig(
    family="llama",
    vocab_size=61,
    hidden_size=48,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    windows=(None, None),
)
RICH = dataclasses.replace(
    PLAIN, family="qwen3", windows=(None, 5), qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True
)
TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, 61, (2, 12)), jnp.int32)
LAYERS = [f"self_attn.{name}_proj.weight" for name in "qkvo"] + [f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
# Float32 sums of about 48 products in another order, through two layers, relative to the largest logit.
EXACT = 1e-5


def decoder(config: ModelConfig) -> Decoder:
    """A random model in which every part matters: loud weights and biases, gains far from 1, a loud input channel."""
    rng = np.random.default_rng(0)
    new = {}
    for path, leaf in trees.leaves(Decoder(config, key=jax.random.key(0))).items():
        gain = path.endswith("norm.weight")
        values = rng.uniform(0.3, 3.0, leaf.shape) if gain else rng.normal(0, 0.15, leaf.shape)
        if path == "embed_tokens.weight":
            values[:, 7] = 7.5 * np.sign(values[:, 7])
        new[path] = jnp.asarray(values, jnp.float32)
    return trees.replace(Decoder(config), new)


@pytest.fixture(scope="module", params=[PLAIN, RICH], ids=lambda config: config.family)
def model(request: pytest.FixtureRequest) -> Decoder:
    return decoder(request.param)


@pytest.fixture(scope="module")
def plain() -> Decoder:
    return decoder(PLAIN)


@jax.jit
def logits_of(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model(tokens)[0]


@jax.jit
def input_amax(model: Decoder, tokens: jax.Array) -> dict[str, jax.Array]:
    """{path: the largest |input| of each channel, [K]} of every linear layer, as the layer's product sees it."""
    x = model.embed(tokens)
    context = model.context(jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape))
    found = {}
    for index, block in enumerate(model.layers):
        x, seen = run_tapped(block, LAYERS, x, context)
        found |= {block_prefix(index) + path: jnp.max(jnp.abs(y), axis=(0, 1)) for path, y in seen.items()}
    return found


def distance(model: Decoder, other: Decoder) -> float:
    """The largest difference of logits, relative to the largest logit."""
    expected = logits_of(model, TOKENS)
    return float(jnp.max(jnp.abs(logits_of(other, TOKENS) - expected)) / jnp.max(jnp.abs(expected)))


def dense(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float64)


def changed(model: Decoder, other: Decoder) -> set[str]:
    """The names of the layers whose values differ, without their numbers."""
    before, after = trees.leaves(model), trees.leaves(other)
    return {
        path.split(".", 2)[-1] if path.startswith("layers.") else path
        for path in before
        if not np.array_equal(before[path], after[path])
    }


def test_every_transform_changes_weights_and_keeps_the_logits(model: Decoder) -> None:
    amax = input_amax(model, TOKENS)
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    readers = {path for path in LAYERS if path.split(".")[1] not in ("o_proj", "down_proj")}
    writers = set(LAYERS) - readers
    rich = {"self_attn.o_proj.bias", "mlp.down_proj.bias"} if model.config.out_bias else set()
    bias_v, bias_up = ({"self_attn.v_proj.bias"}, {"mlp.up_proj.bias"}) if rich else (set(), set())
    ends = {"norm.weight", "lm_head.weight"}
    expected: list[tuple[Decoder, set[str]]] = [
        (fold_norms(model), norms | readers | ends),
        (rotate_residual(model, 1), norms | readers | writers | rich | ends | {"embed_tokens.weight"}),
        (rotate_values(model, 8, 2), {"self_attn.v_proj.weight", "self_attn.o_proj.weight"} | bias_v),
        (smooth(model, amax), norms | readers),
        (
            smooth(model, amax, 0.8, also=("o_proj", "down_proj"), head_dim=8),
            norms | readers | writers | bias_v | bias_up,
        ),
        (rotate_inputs(model, seed=3), writers),
    ]
    for other, parts in expected:
        assert distance(model, other) < EXACT
        assert changed(model, other) == parts


def test_transforms_compose(model: Decoder) -> None:
    amax = input_amax(model, TOKENS)
    offline = rotate_values(rotate_residual(smooth(model, amax, also=("down_proj",)), 1), 8, 2)
    assert distance(model, offline) < EXACT
    again = smooth(offline, input_amax(offline, TOKENS), also=("o_proj", "down_proj"), head_dim=8)
    assert distance(model, again) < EXACT
    online = rotate_residual(rotate_inputs(fold_norms(again), seed=4), 5)  # the stream may turn behind online layers
    assert distance(model, online) < EXACT
    assert set(rotations(online).values()) == {Rotation(32, 4), Rotation(40, 4)}
    for kind in ("rotate", "rotate-offline", "smooth"):
        assert distance(model, transform(model, kind, seed=6, head_dim=8, amax=amax)) < EXACT


def test_rotated_weights_are_the_products_with_the_matrix() -> None:
    model = decoder(RICH)
    before, after = trees.leaves(model), trees.leaves(rotate_residual(model, 9))
    R = dense(matrix(Rotation(48, 9)))
    gain, W, out, bias = (
        dense(before[f"layers.1.{name}"])
        for name in ("input_layernorm.weight", LAYERS[0], LAYERS[3], "self_attn.o_proj.bias")
    )
    # values of order 1 and float32 sums of 48
    for path, expected in {
        "embed_tokens.weight": dense(before["embed_tokens.weight"]) @ R.T,
        "lm_head.weight": dense(before["lm_head.weight"]) * dense(before["norm.weight"]) @ R.T,
        "norm.weight": np.ones(48),
        "layers.1.self_attn.q_proj.weight": W * gain @ R.T,
        "layers.1.self_attn.o_proj.weight": R @ out,
        "layers.1.self_attn.o_proj.bias": R @ bias,
    }.items():
        np.testing.assert_allclose(after[path], expected, atol=1e-5)
    heads = trees.leaves(rotate_values(model, 8, 9))
    R = dense(matrix(Rotation(8, 9)))
    path = "layers.1.self_attn.v_proj"
    np.testing.assert_allclose(
        heads[f"{path}.weight"], np.kron(np.eye(2), R) @ dense(before[f"{path}.weight"]), atol=1e-5
    )
    np.testing.assert_allclose(heads[f"{path}.bias"], np.kron(np.eye(2), R) @ dense(before[f"{path}.bias"]), atol=1e-5)
    np.testing.assert_allclose(heads[f"layers.1.{LAYERS[3]}"], out @ np.kron(np.eye(4), R).T, atol=1e-5)
    online = rotate_inputs(model, ["layers.1.mlp.up_proj.weight"], 9)
    kept = online.layers[1].mlp.up_proj.weight.get_value()
    assert isinstance(kept, Transformed) and kept.transform == Rotation(48, 9)
    up = dense(before["layers.1.mlp.up_proj.weight"])
    np.testing.assert_allclose(kept.value, up @ dense(matrix(Rotation(48, 9))).T, atol=1e-5)


def kurtosis(x: jax.Array) -> float:
    """Fourth moment over the squared second, 3 for a normal distribution."""
    values = dense(x).reshape(-1)
    return float(np.mean(values**4) / np.mean(values**2) ** 2)


def test_rotation_spreads_a_loud_channel(plain: Decoder) -> None:
    # one channel of the stream, and one of down_proj's inputs, far above the others
    up = trees.leaves(plain)["layers.0.mlp.up_proj.weight"]
    model = trees.replace(plain, {"layers.0.mlp.up_proj.weight": up.at[3].multiply(50.0)})
    other = transform(model, "rotate")
    before, after = model.embed(TOKENS), other.embed(TOKENS)
    assert float(jnp.max(jnp.abs(before))) > 3 * float(jnp.max(jnp.abs(after)))
    assert kurtosis(before) > 30 and kurtosis(after) < 4  # one channel of 48 would be 48, a normal distribution 3
    loud, quiet = input_amax(model, TOKENS), input_amax(other, TOKENS)
    for path in ("layers.0.mlp.down_proj.weight", "layers.0.self_attn.q_proj.weight"):
        crest = [float(jnp.max(amax[path]) / jnp.median(amax[path])) for amax in (loud, quiet)]
        assert crest[0] > 5 > 2.5 > crest[1], path


def test_smoothing_evens_out_inputs_and_weights(model: Decoder) -> None:
    """With alpha 1/2 the input's range and the readers' are both sqrt(amax max|W|), channel by channel."""
    smoothed = smooth(model, input_amax(model, TOKENS), also=("o_proj", "down_proj"), head_dim=8)
    amax, weights = input_amax(smoothed, TOKENS), trees.leaves(smoothed)
    for prefix in (block_prefix(0), block_prefix(1)):
        for group in (LAYERS[:3], LAYERS[3:4], LAYERS[4:6], LAYERS[6:]):
            heard = amax[prefix + group[0]]
            loud = jnp.max(jnp.stack([jnp.max(jnp.abs(weights[prefix + path]), axis=0) for path in group]), axis=0)
            if group == LAYERS[3:4]:  # one s for both query heads of a kv head: their maxima meet
                heard, loud = (jnp.max(values.reshape(2, 2, 8), axis=1) for values in (heard, loud))
            # amax was measured before the layers in front were changed; they agree up to rounding
            np.testing.assert_allclose(heard, loud, rtol=1e-4)


def test_smoothing_follows_the_formula(plain: Decoder) -> None:
    rng = np.random.default_rng(1)
    amax = {
        path: rng.uniform(0.1, 20.0, 48) for path in input_amax(plain, TOKENS) if not path.endswith("down_proj.weight")
    }
    for path in amax:
        amax[path][:4] = 0.0  # channels that never fired, in any of the readers
    before, after = trees.leaves(plain), trees.leaves(smooth(plain, amax, 0.7))
    names = [f"layers.0.{path}" for path in LAYERS[:3]]
    heard = np.max([amax[path] for path in names], axis=0)
    loud = np.max([np.abs(dense(before[path])).max(axis=0) for path in names], axis=0)
    s = np.where(heard > 0, heard**0.7 / loud**0.3, 1.0)
    for path in names:
        np.testing.assert_allclose(after[path], dense(before[path]) * s, rtol=1e-5)
    gain = "layers.0.input_layernorm.weight"
    np.testing.assert_allclose(after[gain], dense(before[gain]) / s, rtol=1e-5)
    only_one = {path: values for path, values in amax.items() if path.endswith(("q_proj.weight", "up_proj.weight"))}
    assert distance(plain, smooth(plain, only_one)) < EXACT


def test_tied_model_is_refused_until_it_has_a_head_of_its_own() -> None:
    tied = trees.replace(
        Decoder(dataclasses.replace(PLAIN, tie_embeddings=True)),
        {path: leaf for path, leaf in trees.leaves(decoder(PLAIN)).items() if path != "lm_head.weight"},
    )
    with pytest.raises(ValueError, match="head is its embedding cannot be rotated.*untied"):
        rotate_residual(tied)
    folded = fold_norms(tied)  # all but the final gain
    assert distance(tied, folded) < EXACT and "norm.weight" not in changed(tied, folded)
    own = untied(tied)
    assert tied.lm_head is None and tied.config.tie_embeddings and not own.config.tie_embeddings
    assert jax.tree.structure(own) == jax.tree.structure(Decoder(own.config)) and untied(own) is own
    assert distance(tied, own) < EXACT
    assert distance(tied, transform(own, "rotate")) < EXACT


def test_types_are_kept_and_results_repeat() -> None:
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), decoder(RICH))
    one, two = (transform(narrow, "rotate", seed=4) for _ in range(2))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == jnp.bfloat16 and np.array_equal(a, b)
    assert changed(one, transform(narrow, "rotate", seed=5)) >= set(LAYERS)


def test_any_tree_with_the_paths_will_do(plain: Decoder) -> None:
    tree: dict[str, Any] = {}
    for path, leaf in trees.leaves(plain).items():
        *steps, last = path.split(".")
        node = tree
        for step in steps:
            node = node.setdefault(step, {})
        node[last] = leaf
    there, here = trees.leaves(transform(tree, "rotate")), trees.leaves(transform(plain, "rotate"))
    assert all(np.array_equal(there[path], here[path]) for path in here)
    down = rotate_inputs({"mlp": {"down_proj": {"weight": jnp.ones((4, 6))}}})
    assert rotations(down) == {"mlp.down_proj.weight": Rotation(6, 0)}
    chosen = rotate_inputs(plain, lambda path: "gate_proj" in path)
    assert set(rotations(chosen)) == {f"layers.{i}.mlp.gate_proj.weight" for i in range(2)}


def refused(match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_models_that_cannot_be_transformed_are_refused(plain: Decoder) -> None:
    leaves = trees.leaves(plain)
    down = "layers.1.mlp.down_proj.weight"
    refused("lacks the leaves.*'layers.0.mlp.up_proj.weight'", lambda: fold_norms({"norm": {"weight": jnp.ones(4)}}))
    extra = dict(leaves) | {"layers.0.post_feedforward_layernorm.weight": jnp.ones(48)}
    refused("post_feedforward_layernorm.*no transform knows", lambda: rotate_residual(extra))
    packed = affine_weight(jnp.zeros((48, 40), jnp.int32), jnp.ones((48, 1)), None, 4, None, "in")
    assert isinstance(packed, AffineWeight)
    quantized = trees.replace(plain, {down: packed})
    for function in (fold_norms, rotate_residual, rotate_inputs):
        refused(f"{down} is quantized already", lambda function=function: function(quantized))
    wrong = trees.replace(plain, {down: jnp.ones((48, 39))})
    refused(r"down_proj.weight has shape \(48, 39\); .* 48 features out, 40 in", lambda: rotate_residual(wrong))
    refused("not heads of size 5", lambda: rotate_values(plain, 5))
    broken = trees.replace(plain, {down: leaves[down].at[0, 0].set(jnp.inf)})
    refused(f"{down} would hold values that are not finite", lambda: rotate_residual(broken))


def test_arguments_that_make_no_sense_are_refused(plain: Decoder) -> None:
    q, down, up = (f"layers.0.{path}" for path in (LAYERS[0], LAYERS[6], LAYERS[5]))
    amax = {path: np.asarray(values) for path, values in input_amax(plain, TOKENS).items()}
    for bad in (np.nan, np.inf, -1.0):
        values = amax[q].copy()
        values[3] = bad
        refused(f"amax of {q} has 1 of 48 values", lambda values=values: smooth(plain, amax | {q: values}))
    refused(r"shape \(4,\); expected \(48,\)", lambda: smooth(plain, amax | {q: np.ones(4)}))
    refused("amax has none of", lambda: smooth(plain, {}))
    refused("alpha is 1.5", lambda: smooth(plain, amax, 1.5))
    refused("also names", lambda: smooth(plain, amax, also=("q_proj",)))  # type: ignore[arg-type]
    refused("give head_dim", lambda: smooth(plain, amax, also=("o_proj",)))
    refused("unknown transform 'turn'.*rotate-offline", lambda: transform(plain, "turn"))  # type: ignore[arg-type]
    refused("give head_dim", lambda: transform(plain, "rotate-offline"))
    refused("needs amax", lambda: transform(plain, "smooth"))
    refused("no weight was chosen", lambda: rotate_inputs(plain, []))
    refused("no leaves.*nowhere", lambda: rotate_inputs(plain, ["nowhere"]))
    for path in ("embed_tokens.weight", "norm.weight"):
        refused("not the weight of a linear layer", lambda path=path: rotate_inputs(plain, [path]))
    online = rotate_inputs(plain, [down, up])
    refused("rotated already", lambda: rotate_inputs(online, [down]))
    refused(f"{up} has its input rotated online", lambda: fold_norms(online))
    refused(f"{down} has its input rotated online", lambda: smooth(online, amax, also=("down_proj",)))
