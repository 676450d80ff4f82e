"""`jquant eval` and `jquant generate`: run a model, quantized or not."""

import argparse
from typing import Any

from jquant.api import Opened, load_text, open_model, run_dtype
from jquant.cli import show
from jquant.format import tree as trees
from jquant.format.nested import narrow
from jquant.format.weights import is_quantized, shape_of, size_bytes
from jquant.linear import explain, prepare
from jquant.models import Decoder
from jquant.quantize.calibrate import linear_paths
from jquant.runtime.evaluate import Comparison, Perplexity, ReferenceStates, compare, perplexity, reference_states
from jquant.runtime.generate import Generation, generate
from jquant.runtime.sampling import Sampling


def _loaded(source: Opened, options: argparse.Namespace) -> Decoder:
    """The model in the type, and nested codebooks at the width, that the options name."""
    model = source.load(run_dtype(options.dtype))
    return model if options.bits is None else prepare(narrow(model, options.bits))


def eval_command(options: argparse.Namespace) -> None:
    """Runs the command; see `jquant eval --help`."""
    text = load_text(options.text)
    source = open_model(options.source)
    tokens = encode(source.tokenizer(), text)
    # The reference goes first and leaves its last states behind: the two models are never in memory together.
    states = None if options.reference is None else run_reference(options, source, tokens)
    model = _loaded(source, options)
    outcome = evaluate(model, tokens, options.seq_len, options.max_windows, states)
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
    lines = [line]
    if isinstance(outcome, Comparison):
        data |= {"reference_perplexity": outcome.reference_perplexity, "kl": outcome.kl, "top1": outcome.top1}
        lines.append(
            f"reference perplexity {outcome.reference_perplexity:.4f}, KL {outcome.kl:.5f} nats, "
            f"the same likeliest token in {outcome.top1:.2%}"
        )
    show.result(data, options.json, lines)


def generate_command(options: argparse.Namespace) -> None:
    """Runs the command; see `jquant generate --help`."""
    source = open_model(options.source)
    tokenizer = source.tokenizer()
    prompts = [encode_prompt(tokenizer, text, options.chat) for text in options.prompt]
    model = _loaded(source, options)
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


def run_reference(options: argparse.Namespace, source: Opened, tokens: list[int]) -> ReferenceStates:
    """The states of the model to compare with, with a progress bar; ValueError if it has other tokens."""
    reference = open_model(options.reference)
    if reference.config.vocab_size != source.config.vocab_size:
        raise ValueError(
            f"--reference {options.reference} has {reference.config.vocab_size} tokens, {options.source} "
            f"{source.config.vocab_size}; give the model it was made from"
        )
    model = reference.load(run_dtype(options.dtype))
    with show.bar("running the reference") as bar:
        return reference_states(model, tokens, seq_len=options.seq_len, max_windows=options.max_windows, progress=bar)


def evaluate(
    model: Decoder,
    tokens: list[int],
    seq_len: int,
    max_windows: int | None,
    reference: ReferenceStates | None = None,
) -> Perplexity:
    """Perplexity, or a Comparison if there is a reference, with a progress bar."""
    with show.bar("evaluating") as bar:
        if reference is None:
            return perplexity(model, tokens, seq_len=seq_len, max_windows=max_windows, progress=bar)
        return compare(model, reference, tokens, seq_len=seq_len, max_windows=max_windows, progress=bar)


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
