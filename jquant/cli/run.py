"""`jquant eval` and `jquant generate`: run a model, quantized or not."""

import argparse
from typing import Any

from jquant.api import load_text, open_model, run_dtype
from jquant.cli import show
from jquant.format import tree as trees
from jquant.format.weights import is_quantized, shape_of, size_bytes
from jquant.linear import explain
from jquant.models import Decoder
from jquant.quantize.calibrate import linear_paths
from jquant.runtime.evaluate import Perplexity, perplexity
from jquant.runtime.generate import Generation, generate
from jquant.runtime.sampling import Sampling


def eval_command(options: argparse.Namespace) -> None:
    """Runs the command; see `jquant eval --help`."""
    text = load_text(options.text)
    source = open_model(options.source)
    tokens = encode(source.tokenizer(), text)
    model = source.load(run_dtype(options.dtype))
    outcome = evaluate(model, tokens, options.seq_len, options.max_windows)
    data = {
        "perplexity": outcome.perplexity,
        "tokens": outcome.tokens,
        "windows": outcome.windows,
        "bits_per_weight": model_bits(model),
        "seconds": outcome.seconds,
    }
    line = (
        f"perplexity {outcome.perplexity:.4f} over {outcome.windows} windows of {outcome.seq_len} tokens, "
        f"{data['bits_per_weight']:.3f} bits a weight, {show.duration(outcome.seconds)}"
    )
    show.result(data, options.json, [line])


def generate_command(options: argparse.Namespace) -> None:
    """Runs the command; see `jquant generate --help`."""
    source = open_model(options.source)
    tokenizer = source.tokenizer()
    prompts = [encode_prompt(tokenizer, text, options.chat) for text in options.prompt]
    model = source.load(run_dtype(options.dtype))
    if options.explain:
        show.note(explain(model, len(prompts)))
    outcome = generate(
        model,
        prompts,
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(options.temperature, options.top_k, options.top_p),
        seed=options.seed,
        eos_ids=source.config.eos_ids,
    )
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in outcome.tokens]
    data = {
        "texts": texts,
        "tokens": outcome.tokens,
        "stopped": outcome.stopped,
        "prompt_tokens": outcome.prompt_lengths,
        "seconds_prefill": outcome.seconds_prefill,
        "seconds_decode": outcome.seconds_decode,
        "tokens_per_second": outcome.decode_tokens_per_second,
        "compiled": outcome.compiled,
    }
    show.result(data, options.json, texts)
    show.note(speed(outcome))


def evaluate(model: Decoder, tokens: list[int], seq_len: int, max_windows: int | None) -> Perplexity:
    """Perplexity with a progress bar."""
    with show.bar("evaluating") as bar:
        return perplexity(model, tokens, seq_len=seq_len, max_windows=max_windows, progress=bar)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids without special tokens; long texts are meant, so the tokenizer's warning about length is off."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def encode_prompt(tokenizer: Any, text: str, chat: bool) -> list[int]:
    """A prompt's ids: as the tokenizer begins any text, or in the model's chat form."""
    if not chat:
        return tokenizer(text)["input_ids"]
    if not tokenizer.chat_template:
        raise ValueError("the model's tokenizer has no chat form; leave out --chat")
    messages = [{"role": "user", "content": text}]
    form = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(form, add_special_tokens=False)["input_ids"]


def model_bits(model: Decoder) -> float:
    """Bits stored for each weight of the linear layers inside the blocks, quantized or not."""
    leaves = trees.leaves(model)
    stored = {path: leaves[path] for path in linear_paths(model)}
    count = sum(shape_of(leaf)[0] * shape_of(leaf)[1] if is_quantized(leaf) else leaf.size for leaf in stored.values())
    return 8 * sum(size_bytes(leaf) for leaf in stored.values()) / count


def speed(outcome: Generation) -> str:
    """How fast it went, in a line."""
    count = sum(map(len, outcome.tokens))
    compiled = " (compiling included)" if outcome.compiled else ""
    return (
        f"{count} tokens, {outcome.decode_tokens_per_second:.1f} tokens/s after a prefill of "
        f"{outcome.seconds_prefill:.2f} s{compiled}"
    )
