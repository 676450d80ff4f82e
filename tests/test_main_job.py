"""The main job on a real model: SmolLM2-135M-Instruct from its GGUF file, the way `jquant demo` gets it."""

from pathlib import Path

import pytest

import jquant as jq
from jquant.api import load_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(smollm2_gguf: Path):
    return jq.open_model(smollm2_gguf)


def test_perplexity_is_the_published_code_s(source, shared_dir: Path) -> None:
    """Four windows of WikiText-2 under the usual protocol: 24.15 by transformers and torch in float32."""
    text = load_text(shared_dir / "data" / "wikitext2-test.txt")
    tokens = source.tokenizer()(text[:60_000], add_special_tokens=False, verbose=False)["input_ids"]
    outcome = jq.perplexity(source.load("float32"), tokens, seq_len=2048, max_windows=4)
    assert outcome.windows == 4
    assert abs(outcome.perplexity - 24.15) < 0.01  # the reference is given to two decimals


def test_quantized_saved_and_loaded_it_still_answers(source, tmp_path: Path) -> None:
    tokenizer = source.tokenizer()
    small, report = jq.quantize(source.load("float32"), "w4-g64", method="rtn")
    assert len(report.layers) == 210
    jq.save(tmp_path / "small", small, report, tokenizer=tokenizer, dtype="float16")
    again, tokenizer = jq.load(tmp_path / "small"), jq.load_tokenizer(tmp_path / "small")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False), add_special_tokens=False
    )["input_ids"]
    answer = jq.generate(again, [prompt], max_new_tokens=16, eos_ids=again.config.eos_ids)
    assert "Paris" in tokenizer.decode(answer.tokens[0])
