"""Quality against bits: `python -m bench.quality MODEL --text FILE --calibration FILE [--rows GLOB ...] [--jobs N]`.

Every row quantizes the same model with the same calibration sequences and is evaluated on the same windows, all in
float32 with float32 products: perplexity over --windows windows of the text and over its first --reference-windows,
perplexity on a second text, and over the first --reference-windows the KL and top-1 agreement with the model itself.
The second text is --second-text, or what the calibration file holds beyond the calibration sequences.

    --tokenize OUT.npz   only writes the texts' tokens, for a machine without the tokenizer: there, --tokens OUT.npz
    --shared             statistics of the unquantized model, gathered once for all rows of a process (original inputs)
    --resume             leaves out the rows that --out holds already
    --jobs N             N rows at a time, each in a process of its own; one that fails leaves its error behind
    --out DIR            rows/<row>.json as each row ends; quality-<name>.json of all rows found there, also put into
                         bench/results; and the compile cache of the processes

Seconds include what had to be compiled. Peak memory is that of the process since its start, up to the end of the
row's quantization: of the row alone only if each has a process of its own.
"""

import argparse
import glob
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jquant as jq
from bench import record
from bench.rows import ROWS, Row
from jquant.api import load_text, transformed
from jquant.format import tree as trees
from jquant.format.weights import is_quantized, shape_of
from jquant.quantize.budget import spend_bits
from jquant.quantize.calibrate import cut_batches, linear_paths, split_batches
from jquant.quantize.matrix import Recipe
from jquant.quantize.plan import Rule
from jquant.runtime.evaluate import exp_mean

ACT_EXACT = 0.5  # percent that shared histograms leave out
# what decides the numbers, beside the texts
COUNTS = {
    "windows": 40,
    "reference_windows": 16,
    "second_windows": 16,
    "seq_len": 2048,
    "samples": 32,
    "calibration_len": 1024,
}


class Texts(NamedTuple):
    """Token ids of what is evaluated, of what calibration is cut from, and of a second text; and the files' names."""

    text: np.ndarray
    calibration: np.ndarray
    second: np.ndarray  # empty: the rest of the calibration text
    names: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--second-text", type=Path)
    parser.add_argument("--tokens", type=Path, metavar="FILE.npz", help="instead of the texts")
    parser.add_argument("--tokenize", type=Path, metavar="OUT.npz", help="write the tokens and stop")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="GLOB", help="labels or groups (default: all)")
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--out", type=Path, help="a directory (default: in .cache), or one row's file (.json)")
    parser.add_argument("--name", default="smollm2-135m-instruct")
    for name, default in COUNTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = parser.parse_args()
    options.out = options.out or Path(__file__).parent.parent / ".cache" / f"quality-{options.name}"
    if options.tokens is None and (options.text is None or options.calibration is None):
        parser.error("give --text and --calibration, or --tokens")
    rows = [row for row in ROWS if any(fnmatchcase(name, each) for each in options.rows for name in row[:2])]
    if not rows:
        parser.error(f"no row matches {options.rows}; rows: {', '.join(row.label for row in ROWS)}")

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share one device
    if options.tokenize is not None:
        write_tokens(read_texts(options), options.tokenize)
    elif options.out.suffix == ".json":
        run_rows(rows, options, lambda row: options.out)
    else:
        folder = options.out / "rows"
        folder.mkdir(parents=True, exist_ok=True)
        if options.resume:
            rows = [row for row in rows if not row_file(folder, row).exists()]
        if options.jobs > 1:
            run_processes(rows, options, folder)
        else:
            run_rows(rows, options, lambda row: row_file(folder, row))
        merge(options.out, options.name)


def read_texts(options: argparse.Namespace) -> Texts:
    """The tokens, from --tokens or by the model's tokenizer."""
    if options.tokens is not None:
        with np.load(options.tokens, allow_pickle=False) as stored:
            names = [str(name) for name in stored["names"]]
            return Texts(stored["text"], stored["calibration"], stored["second"], names)
    files = [file for file in (options.text, options.calibration, options.second_text) if file is not None]
    tokenizer = jq.open_model(options.model).tokenizer()
    ids = [tokenizer(load_text(file), add_special_tokens=False, verbose=False)["input_ids"] for file in files]
    text, calibration, second = (np.asarray(each, np.int32) for each in [*ids, []][:3])
    return Texts(text, calibration, second, [file.name for file in files])


def write_tokens(texts: Texts, file: Path) -> None:
    with file.open("wb") as stream:
        np.savez_compressed(
            stream,
            text=texts.text,
            calibration=texts.calibration,
            second=texts.second,
            names=np.asarray(texts.names),
        )


class Session:
    """What the rows of one process share: the model, the texts, and the model's own states once somebody wants them."""

    def __init__(self, options: argparse.Namespace):
        jax.config.update("jax_default_matmul_precision", "highest")
        self.options = options
        self.gathered: dict[Any, Any] = {}
        texts = read_texts(options)
        self.model = jq.open_model(options.model).load(jnp.float32)
        self.sequences = np.concatenate(cut_batches(texts.calibration, options.samples, options.calibration_len))
        self.text, self.second, self.names = texts.text, texts.second, texts.names
        if not len(texts.second):
            self.second = texts.calibration[self.sequences.size :]
            self.names = [*texts.names[:2], f"{texts.names[1]}, from token {self.sequences.size} on"]

    @cached_property
    def states(self) -> Any:
        options = self.options
        return jq.reference_states(
            self.model, self.text, seq_len=options.seq_len, max_windows=options.reference_windows
        )

    def statistics(self, model: Any, row: Row, recipe: Recipe) -> dict[str, Any]:
        """What the row's method and those like it need, from one pass over the (transformed) model."""
        gradients = recipe.needs_saliency() or recipe.needs_fisher()
        key = (row.transforms, gradients)
        if key not in self.gathered:
            kinds = ("fisher", "inputs", "guided", "range") if gradients else ("hessian", "range")
            batches = split_batches(self.sequences)
            self.gathered[key] = jq.calibrate(model, batches, kinds, exact=ACT_EXACT)
        return self.gathered[key]

    def protocol(self) -> dict[str, Any]:
        """All that the numbers depend on."""
        arrays = zip(("text", "calibration", "second_text"), (self.text, self.sequences, self.second), strict=True)
        digests = {name: hashlib.sha256(np.asarray(ids, np.int32).tobytes()).hexdigest()[:12] for name, ids in arrays}
        names = dict(zip(digests, self.names, strict=True))
        about = {**names, "tokens_sha256": digests}
        counts = {name: getattr(self.options, name) for name in COUNTS}
        if self.options.shared:
            counts["inputs"] = "original"
        return {"model": Path(self.options.model).name, **about, **counts, "evaluation": "float32, precision highest"}

    def measure(self, row: Row) -> dict[str, Any]:
        """Quantizes, then evaluates."""
        started = time.perf_counter()
        quantized, bits, layers = self.model, 16.0, []
        if row.method is not None and row.spec is not None:
            recipe, model = Recipe(row.method, **row.options), self.model
            plan = jq.make_plan(
                model, jq.QuantSpec.parse(row.spec), row.method, [Rule.parse(text) for text in row.rules]
            )
            for kind in row.transforms:
                model = transformed(model, kind, self.sequences)
            if row.budget is not None:
                plan = spend_bits(model, plan, recipe, split_batches(self.sequences), row.budget)
            data = self.statistics(model, row, recipe) if self.options.shared else self.sequences
            quantized, report = jq.quantize(model, plan, data, method=recipe)
            jax.block_until_ready(jax.tree.leaves(quantized))
            bits = stored_bits(quantized)
            quantized = jq.prepare(quantized)
            # what the plan says of every layer is not told again
            layers = [[each.path, each.spec, each.note] for each in report.layers if each.note or each.spec != row.spec]
        seconds, peak = time.perf_counter() - started, peak_bytes()
        started = time.perf_counter()
        return {
            "bits_per_weight": bits,
            **self.evaluate(quantized),
            "quantize_seconds": seconds,
            "eval_seconds": time.perf_counter() - started,
            "peak_bytes": peak,
            "layers": layers,
        }

    def evaluate(self, model: Any) -> dict[str, Any]:
        options, text = self.options, self.text
        length, first = options.seq_len, options.reference_windows
        comparison = jq.compare(model, self.states, text, seq_len=length, max_windows=min(first, options.windows))
        losses = list(comparison.losses)
        rest = text[first * length : options.windows * length]
        if len(rest) >= length:
            losses += jq.perplexity(model, rest, seq_len=length).losses
        second = None
        if len(self.second) >= length and options.second_windows:
            second = jq.perplexity(model, self.second, seq_len=length, max_windows=options.second_windows)
        return {
            "perplexity": exp_mean(losses),
            "perplexity_reference_windows": comparison.perplexity,
            "second_perplexity": second and second.perplexity,
            "kl": comparison.kl,
            "top1": comparison.top1,
            "losses": [round(loss, 5) for loss in losses],
            "second_losses": second and [round(loss, 5) for loss in second.losses],
        }


def run_rows(rows: Sequence[Row], options: argparse.Namespace, file_of: Any) -> None:
    """The rows one after the other in this process; the error of a row is its result."""
    session = Session(options)
    for row in rows:
        try:
            outcome = session.measure(row)
        except Exception as error:
            traceback.print_exc()
            outcome = {"error": f"{type(error).__name__}: {error}"}
        write_row(file_of(row), row, outcome, {"environment": record.environment(), "protocol": session.protocol()})
        print(describe({"label": row.label, **outcome}), flush=True)


def run_processes(rows: Sequence[Row], options: argparse.Namespace, folder: Path) -> None:
    """A process a row, --jobs of them at a time."""
    tokens = options.tokens
    if tokens is None:
        tokens = options.out / "tokens.npz"
        write_tokens(read_texts(options), tokens)
    command = [sys.executable, "-m", "bench.quality", options.model, "--tokens", str(tokens)]
    for name in COUNTS:
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str((options.out / "xla").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }

    def run(row: Row) -> None:
        file = row_file(folder, row)
        file.unlink(missing_ok=True)
        own = ["--rows", glob.escape(row.label), "--out", str(file)]
        with file.with_suffix(".log").open("w+") as log:
            code = subprocess.run(
                command + own, env={**os.environ, **cache}, stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode
            log.seek(0)
            last = (log.read().strip().splitlines() or [""])[-1]
        if not file.exists():  # killed, or it never came to the row; the log has more
            write_row(file, row, {"error": f"the process ended with code {code}: {last}"}, {})
        print(describe(json.loads(file.read_text())["row"]), flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, rows))


def row_file(folder: Path, row: Row) -> Path:
    return folder / (re.sub(r"[^a-z0-9.]+", "-", row.label.lower()).strip("-") + ".json")


def write_row(file: Path, row: Row, outcome: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    described = {**row._asdict(), "options": dict(row.options), **outcome}
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps({**about, "row": described}, indent=1, default=str) + "\n")
    temporary.replace(file)


def merge(out: Path, name: str) -> None:
    """All rows in the folder as one result; ValueError if they were not measured alike."""
    stored = {file: json.loads(file.read_text()) for file in sorted((out / "rows").glob("*.json"))}
    order = {row.label: index for index, row in enumerate(ROWS)}
    done = {file: each for file, each in stored.items() if "error" not in each["row"]}
    for file, each in done.items():
        first, data = next(iter(done.items()))
        if each["protocol"] != data["protocol"]:
            raise ValueError(
                f"{file} and {first} were measured by different protocols; delete one, or use another --out"
            )
    errors = [each["row"] for each in stored.values() if "error" in each["row"]]
    about = next(iter(done.values()), {"environment": record.environment(), "protocol": {}})
    usual = about["environment"].get("device")
    for each in done.values():  # most rows come from one machine; of others the table says so
        if (device := each["environment"].get("device")) != usual:
            each["row"]["device"] = device
    rows = sorted((each["row"] for each in done.values()), key=lambda row: order.get(row["label"], len(order)))
    result = {"environment": about["environment"], "protocol": about["protocol"], "rows": rows, "errors": errors}
    if done:
        saved = record.save(f"quality-{name}", result)
        (out / saved.name).write_bytes(saved.read_bytes())
    print("\n".join(["", HEADER, *map(describe, rows + errors)]))


HEADER = (
    f"{'':28s} {'bits':>6s} {'ppl':>9s} {'first':>9s} {'second':>9s} {'KL':>8s} {'top-1':>7s} {'s':>6s} {'peak':>8s}"
)


def describe(row: Mapping[str, Any]) -> str:
    """A row as a line."""
    if "error" in row:
        return f"{row['label']:28s} {row['error']}"
    ppl = [row["perplexity"], row["perplexity_reference_windows"], row["second_perplexity"] or float("nan")]
    return (
        f"{row['label']:28s} {row['bits_per_weight']:6.3f} {' '.join(f'{each:9.3f}' for each in ppl)} {row['kl']:8.4f} "
        f"{row['top1']:7.2%} {row['quantize_seconds']:6.1f} {row['peak_bytes'] / 1e9:5.2f} GB"
    )


def stored_bits(model: Any) -> float:
    """Bits stored for each weight of the linear layers inside the blocks, those left dense at 16."""
    leaves = trees.leaves(model)
    stored = [leaves[path] for path in linear_paths(model)]
    count = sum(shape_of(leaf)[0] * shape_of(leaf)[1] if is_quantized(leaf) else leaf.size for leaf in stored)
    return sum(8 * jq.size_bytes(leaf) if is_quantized(leaf) else 16 * leaf.size for leaf in stored) / count


def peak_bytes() -> int:
    """The most memory this process has had: of the device where it tells, else of the host."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


if __name__ == "__main__":
    main()
