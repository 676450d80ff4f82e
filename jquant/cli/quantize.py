"""`jquant quantize`: open, plan, calibrate, quantize, save; each step somebody else's function."""

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jquant.api import Opened, load_text, open_model, run_dtype, save
from jquant.cli import show
from jquant.format.spec import QuantSpec
from jquant.format.tree import leaves
from jquant.models import Decoder
from jquant.quantize.calibrate import cut_batches
from jquant.quantize.journal import DirectoryJournal
from jquant.quantize.matrix import STATISTIC
from jquant.quantize.pipeline import Progress, Report, quantize
from jquant.quantize.plan import Forecast, Rule, forecast, make_plan
from jquant.runtime.generate import sample_text_tokens

GROUP_SIZE = 128
SPARSE = 0.45
SEQ_LEN = 512


def quantize_command(options: argparse.Namespace) -> None:
    """Runs the command; see `jquant quantize --help`."""
    spec = spec_of(options)
    rules = [Rule.parse(text) for text in options.rule]
    out: Path = options.out
    if out.exists():
        raise ValueError(f"{out} exists already; give --out a directory that does not, or delete it")
    source = open_model(options.source)
    stored = options.dtype or source.config.dtype
    abstract = jax.eval_shape(lambda: Decoder(source.config, dtype=run_dtype(None) or source.config.dtype))
    if source.kind == "jquant":
        raise ValueError(f"{options.source} is quantized already; give the model it was made from")
    plan = make_plan(abstract, spec, options.method, rules)
    if options.seq_len is None:
        options.seq_len = min(SEQ_LEN, source.config.position_limit())
    if options.seq_len > source.config.position_limit():
        raise ValueError(
            f"--seq-len is {options.seq_len}, but the model has {source.config.position_limit()} positions; lower it"
        )
    text = None
    if STATISTIC[options.method] and options.calibration != "self":
        # Read before anything costly: a wrong path or a short text should not cost a model's loading.
        text = load_text(Path(options.calibration))
    priced = forecast(
        abstract,
        plan,
        options.method,
        samples=options.samples,
        seq_len=options.seq_len,
        self_calibrated=options.calibration == "self",
        stored_dtype=stored,
    )
    show_plan(options, source, plan, priced)
    if options.dry_run:
        details = {"dry_run": True, **priced.to_json(), "plan": {path: str(each) for path, each in plan.items()}}
        if not options.json:
            shapes = {path: " x ".join(map(str, leaf.shape)) for path, leaf in leaves(abstract).items()}
            show.table(("layer", "shape", "spec"), [(path, shapes[path], each) for path, each in plan.items()])
        show.result(details, options.json, ["dry run: nothing was computed or written"])
        return
    run = {
        "source": source.fingerprint(),
        "method": options.method,
        "plan": {path: str(each) for path, each in plan.items()},
        "dtype": stored,
    }
    if STATISTIC[options.method]:
        digest = "self" if text is None else hashlib.sha256(text.encode()).hexdigest()
        run["calibration"] = {
            "text": digest,
            "samples": options.samples,
            "seq_len": options.seq_len,
            "seed": options.seed if text is None else None,
        }
    journal = DirectoryJournal(out.with_name(out.name + ".partial"), run, resume=options.resume)
    try:
        report = _run(options, source, plan, journal, text, run, stored)
    except KeyboardInterrupt:
        show.note(
            f"interrupted with {journal.finished_blocks()} of {source.config.num_layers} blocks done; "
            "the same command with --resume continues there"
        )
        raise
    except ValueError:
        if not journal.finished_blocks():  # refused before any work: the corrected command must not meet a leftover
            journal.remove()
        raise
    journal.remove()
    _show_outcome(options, report)


def spec_of(options: argparse.Namespace) -> QuantSpec:
    """The QuantSpec that the options describe; ValueError for options the method does not take."""
    if options.method == "squeezellm":
        for name, given in (
            ("--group-size", options.group_size is not None),
            ("--symmetric", options.symmetric),
            ("--group-axis", options.group_axis != "in"),
        ):
            if given:
                raise ValueError(f"{name} does not go with squeezellm, whose tables span a row; leave it out")
        sparse = SPARSE if options.sparse is None else options.sparse
        return QuantSpec(options.bits, "codebook", sparse=sparse)
    if options.sparse is not None:
        raise ValueError(f"--sparse does not go with {options.method}; leave it out, or use squeezellm")
    if options.group_size == 0:
        raise ValueError("--group-size is 0; expected at least 1, or -1 for the whole row")
    group = GROUP_SIZE if options.group_size is None else options.group_size
    return QuantSpec(
        options.bits,
        group_size=None if group == -1 else group,
        group_axis=options.group_axis,
        symmetric=options.symmetric,
    )


def calibration_tokens(model: Decoder, samples: int, seq_len: int, seed: int, start: int) -> np.ndarray:
    """Text that the model writes itself at temperature 1: token sequences [samples, seq_len]."""
    with show.bar("writing calibration text") as bar:
        return sample_text_tokens(model, count=samples, length=seq_len, seed=seed, start_ids=[start], progress=bar)


def start_token(source: Opened, tokenizer: Any) -> int:
    """What the model's own text begins with: its BOS, or a newline where it has none."""
    if source.config.bos_id is not None:
        return source.config.bos_id
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if not newline:
        raise ValueError("the model has no BOS and its tokenizer no newline; give --calibration a text file")
    return int(newline[-1])


def _run(
    options: argparse.Namespace,
    source: Opened,
    plan: Mapping[str, QuantSpec],
    journal: DirectoryJournal,
    text: str | None,
    run: Mapping[str, Any],
    stored: str,
) -> Report:
    show.note(f"loading {source.name}")
    tokenizer = source.tokenizer()
    model = source.load(run_dtype(None))
    sequences = None
    if STATISTIC[options.method]:
        sequences = journal.calibration()
        if sequences is None:
            if text is None:
                start = start_token(source, tokenizer)
                sequences = calibration_tokens(model, options.samples, options.seq_len, options.seed, start)
            else:
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                sequences = np.concatenate(cut_batches(ids, options.samples, options.seq_len))
            journal.store_calibration(sequences)
    with show.bar("quantizing") as bar:
        quantized, report = quantize(
            model,
            plan,
            sequences,
            method=options.method,
            journal=journal,
            progress=lambda step: bar(step.done, step.total, describe(step)),
        )
    del model
    show.note(f"saving {options.out}")
    details = {"method": options.method, **run.get("calibration", {})}
    save(options.out, quantized, report, tokenizer=tokenizer, calibration=details, dtype=stored)
    return report


def describe(step: Progress) -> str:
    """A step as a few words: the layer and its error, or the stage."""
    if step.report is None:
        return step.stage
    name = step.report.path.removeprefix("layers.").removesuffix(".weight")
    return f"{name} error {step.report.objective_error:.2e}"


def show_plan(options: argparse.Namespace, source: Opened, plan: Mapping[str, QuantSpec], priced: Forecast) -> None:
    """The plan and its price, on standard error."""
    counts: dict[str, int] = {}
    for spec in plan.values():
        counts[str(spec)] = counts.get(str(spec), 0) + 1
    kinds = ", ".join(f"{count} layers {spec}" for spec, count in counts.items())
    show.note(f"{source.name}: {source.config.family}, {source.config.num_layers} blocks; {options.method}: {kinds}")
    show.note(
        f"forecast: {priced.bits_per_weight:.3f} bits a weight, {show.size(priced.output_bytes)} on disk, "
        f"peak memory about {show.size(priced.peak_bytes)}, about {show.duration(priced.seconds)}"
    )


def _show_outcome(options: argparse.Namespace, report: Report) -> None:
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    notes = [f"{layer.path}: {layer.note}" for layer in report.layers if layer.note]
    bits = mean_bits(report)
    data = {
        "out": str(options.out),
        "method": report.method,
        "bits_per_weight": bits,
        "size_bytes": size,
        "layers": len(report.layers),
        "seconds": report.seconds,
        "notes": notes,
    }
    worst = max(report.layers, key=lambda layer: layer.objective_error)
    lines = [
        f"{options.out}: {len(report.layers)} layers at {bits:.3f} bits a weight, {show.size(size)}, "
        f"{show.duration(report.seconds)}",
        f"largest relative error {worst.objective_error:.2e} in {worst.path}",
        *notes[:10],
    ]
    show.result(data, options.json, lines)


def mean_bits(report: Report) -> float:
    """Bits a weight over all quantized layers."""
    weights = sum(8 * layer.size_bytes / layer.bits_per_weight for layer in report.layers)
    return 8 * sum(layer.size_bytes for layer in report.layers) / weights
