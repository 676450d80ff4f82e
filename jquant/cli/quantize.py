"""`jquant quantize`: open, plan, calibrate, quantize, save; each step somebody else's function."""

import argparse
import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jquant.api import Opened, load_text, open_model, run_dtype, save, transformed
from jquant.cli import show
from jquant.format.spec import ActivationSpec, QuantSpec
from jquant.format.tree import leaves
from jquant.models import Decoder
from jquant.quantize.budget import spend_bits
from jquant.quantize.calibrate import cut_batches, split_batches
from jquant.quantize.journal import DirectoryJournal
from jquant.quantize.matrix import TABLES, Recipe
from jquant.quantize.passes.quik import fraction_count
from jquant.quantize.pipeline import Progress, Report, quantize
from jquant.quantize.plan import Forecast, Rule, forecast, make_plan, needs_gradients, quik_rules
from jquant.runtime.generate import sample_text_tokens

GROUP_SIZE = 128
SPARSE = 0.45
ACT_EXACT = 0.5
SEQ_LEN = 512


def compile_sooner() -> None:
    """Tells XLA, before its first use, to leave products on a GPU to cuBLAS instead of tuning Triton's for each shape.

    A product of this work runs a few hundred times, which does not repay the seconds of tuning: of quantizing a 7 B
    model, compiling would be half. What the user has said in XLA_FLAGS stands.
    """
    flag, said = "--xla_gpu_enable_triton_gemm", os.environ.get("XLA_FLAGS", "")
    if flag not in said:
        os.environ["XLA_FLAGS"] = f"{said} {flag}=false".strip()


def quantize_command(options: argparse.Namespace) -> None:
    """Runs the command; see `jquant quantize --help`."""
    compile_sooner()
    recipe = recipe_of(options)
    rules = [Rule.parse(text) for text in options.rule]
    out: Path = options.out
    if out.exists():
        raise ValueError(f"{out} exists already; give --out a directory that does not, or delete it")
    source = open_model(options.source)
    stored = options.dtype or source.config.dtype
    abstract = jax.eval_shape(lambda: Decoder(source.config, dtype=run_dtype(None) or source.config.dtype))
    if source.kind == "jquant":
        raise ValueError(f"{options.source} is quantized already; give the model it was made from")
    if options.transform and source.config.tie_embeddings:
        show.note("the embedding also serves as the head; --transform gives the head a copy of its own")
    spec = spec_of(options, source.config.hidden_size)
    if options.method == "quik":
        rules = [*quik_rules(abstract, spec, share_of(options.outliers)), *rules]
    plan = make_plan(abstract, spec, options.method, rules)
    calibrates = (
        recipe.needs_hessian()
        or needs_gradients(plan, recipe)
        or options.target_bpw is not None
        or "smooth" in options.transform
    )
    if options.seq_len is None:
        options.seq_len = min(SEQ_LEN, source.config.position_limit())
    if options.seq_len > source.config.position_limit():
        raise ValueError(
            f"--seq-len is {options.seq_len}, but the model has {source.config.position_limit()} positions; lower it"
        )
    text = None
    if calibrates and options.calibration != "self":
        # Read before anything costly: a wrong path or a short text should not cost a model's loading.
        text = load_text(Path(options.calibration))
    priced = forecast(
        abstract,
        plan,
        recipe,
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
        "recipe": dataclasses.asdict(recipe),
        "transforms": options.transform,
        "target_bpw": options.target_bpw,
        "plan": {path: str(each) for path, each in plan.items()},
        "dtype": stored,
    }
    if calibrates:
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


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe that the options describe."""
    return Recipe(
        options.method,
        guided=options.guided,
        sequential=not options.original_inputs,
        clip_search=options.clip_search,
        exact=options.exact,
        zero_outliers=options.zero_outliers,
        act_order=options.act_order,
    )


def share_of(outliers: int | float | None) -> float | None:
    """The share of a layer's inputs that --outliers asks to keep, None for a number of them."""
    if outliers is None:
        return 1 / 16
    return outliers / 100 if isinstance(outliers, float) else None


def spec_of(options: argparse.Namespace, hidden: int) -> QuantSpec:
    """The QuantSpec of the options, for a model `hidden` wide; ValueError for an option the method does not take."""
    method = options.method
    tables, quik = method in TABLES, method == "quik"
    for name, given, fits in (
        ("--group-size", options.group_size is not None, not tables and not quik),
        ("--group-axis", options.group_axis != "in", method in ("rtn", "gptq")),
        ("--symmetric", options.symmetric, not tables),
        ("--two-level", options.two_level, method in ("rtn", "gptq")),
        ("--clip-search", options.clip_search, not tables and not quik),
        ("--outliers", options.outliers is not None, quik),
        ("--semistructured", options.semistructured, quik),
        ("--act-order", options.act_order, quik),
        ("--sparse", options.sparse is not None, tables and options.table == "row"),
        ("--exact", options.exact, tables),
        ("--int8-tables", options.int8_tables, tables),
        ("--nested-from", options.nested_from is not None, method == "squeezellm" and not options.sparse),
        ("--table", options.table != "row", method == "kllm"),
        ("--act-exact", options.act_exact is not None, method == "kllm"),
        ("--act-static", options.act_static, method == "kllm"),
    ):
        if given and not fits:
            raise ValueError(f"{name} does not go with {method}; leave it out (`jquant quantize --help` says which do)")
    if options.group_size == 0:
        raise ValueError("--group-size is 0; expected at least 1, or -1 for the whole row")
    act_bits = options.act_bits or {"quik": options.bits, "kllm": 4}.get(method)
    activation = None
    if act_bits and method == "kllm":
        exact = ACT_EXACT if options.act_exact is None else options.act_exact
        activation = ActivationSpec(act_bits, "codebook", exact=exact, static=options.act_static)
    elif act_bits:
        activation = ActivationSpec(act_bits)
    if tables:
        dense = method == "kllm" or options.nested_from is not None
        sparse = (0.0 if dense else SPARSE) if options.sparse is None else options.sparse
        shared = options.table == "matrix"
        return QuantSpec(
            options.bits,
            "codebook",
            sparse=sparse,
            shared=shared,
            nested_from=options.nested_from,
            int8_table=options.int8_tables,
            activation=activation,
        )
    if quik:
        share = share_of(options.outliers)
        outliers = options.outliers if share is None else fraction_count(share, hidden)
        return QuantSpec(
            options.bits,
            symmetric=True,
            semistructured=options.semistructured,
            outliers=outliers,
            activation=activation,
        )
    group = GROUP_SIZE if options.group_size is None else options.group_size
    return QuantSpec(
        options.bits,
        group_size=None if group == -1 else group,
        group_axis=options.group_axis,
        symmetric=options.symmetric or options.two_level,
        two_level=options.two_level,
        activation=activation,
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
    sequences = np.zeros((0, 0), np.int32)
    if "calibration" in run:
        stored_sequences = journal.calibration()
        if stored_sequences is not None:
            sequences = stored_sequences
        else:
            if text is None:
                start = start_token(source, tokenizer)
                sequences = calibration_tokens(model, options.samples, options.seq_len, options.seed, start)
            else:
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                sequences = np.concatenate(cut_batches(ids, options.samples, options.seq_len))
            journal.store_calibration(sequences)
    for kind in options.transform:
        show.note(f"transforming: {kind}")
        model = transformed(model, kind, sequences, options.seed)
    if options.target_bpw is not None:
        batches = split_batches(sequences)
        with show.bar("measuring layers") as bar:
            plan = spend_bits(
                model,
                plan,
                recipe_of(options),
                batches,
                options.target_bpw,
                progress=lambda stage, done, total: bar(done, total, stage),
            )
    with show.bar("quantizing") as bar:
        quantized, report = quantize(
            model,
            plan,
            sequences if sequences.size else None,
            method=recipe_of(options),
            journal=journal,
            progress=lambda step: bar(step.done, step.total, describe(step)),
        )
    del model
    show.note(f"saving {options.out}")
    details = {"recipe": run["recipe"], "transforms": options.transform, **run.get("calibration", {})}
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
    bits = report.bits_per_weight()
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
    if (snapping := report.int8_tables()) is not None:
        data["int8_tables"] = snapping
        lines.insert(
            2,
            "int8 tables: mean relative error {mean_error:.3e}, {mean_error_before:.3e} with tables of floats; most in "
            "{layer}: {layer_error:.3e}, {layer_error_before:.3e}".format(**snapping),
        )
    show.result(data, options.json, lines)
