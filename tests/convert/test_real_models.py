"""Real checkpoints, where they are at hand: SmolLM2 as GGUF, stories260K as a Hugging Face directory.

The fixtures `smollm2_gguf` and `shared_dir` skip these tests where the files are not named.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from convert.gguf_tokenizer import build_tokenizer

STORIES = "models/stories260K"


def test_smollm2_configuration_and_tokenizer(smollm2_gguf):
    source = convert.open_source(smollm2_gguf)
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
def test_smollm2_logits_equal_those_of_transformers(smollm2_gguf):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = convert.open_source(smollm2_gguf)
    tokens = source.tokenizer().encode("The capital of France is Paris, and the capital of Italy is")
    # The two steps of from_pretrained(gguf_file=...), which itself asks for accelerate.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(str(smollm2_gguf), return_tensors=True, model_to_load=theirs)["tensors"]
    assert theirs.load_state_dict(tensors, strict=False).missing_keys == ["lm_head.weight"]
    theirs.tie_weights()
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor([tokens])).logits.numpy()
    with jax.default_matmul_precision("highest"):
        logits, _ = source.load()(jnp.asarray([tokens], jnp.int32))
    # Every logit is a sum of terms as large as the largest logits, near 30, which float32 has to 2e-6 after each of the
    # thirty layers; in which order they are added depends on the processor.
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-5)
    assert source.tokenizer().decode(int(jnp.argmax(logits[0, -1]))) == " Rome"


def test_stories_are_likely_to_a_model_of_stories(shared_dir):
    source = convert.open_source(shared_dir / STORIES)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    tokens = jnp.asarray([source.tokenizer().encode(text)], jnp.int32)
    logits, _ = jax.jit(lambda model, tokens: model(tokens))(source.load(), tokens)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
    # log(512) is 6.2 for a guess; wrong rotary planes, scales or transposes give 3 and more.
    assert float(losses.mean()) < 1.5


def test_sentence_piece_vocabulary_gives_the_ids_of_the_tokenizer_file(shared_dir):
    # A GGUF of this model would hold the vocabulary with scores that fall in the order of the merges.
    reference = convert.load_tokenizer(shared_dir / STORIES)
    tokens = reference.convert_ids_to_tokens(list(range(len(reference))))
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.unknown_token_id": 0,
    }
    ours, _ = build_tokenizer(metadata, "it")
    for text in ("Once upon a time, there was a little girl.", 'She said: "It\'s 25 miles!"\n\n  Then', "naïve 你好"):
        assert ours.encode(text).ids == reference.encode(text, add_special_tokens=False)
