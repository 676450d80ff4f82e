"""Perplexity against bits: `python -m bench.quality MODEL --text FILE --calibration FILE`.

Every row quantizes the same model with the same calibration sequences and evaluates the same windows. Results go to
bench/results/quality-<name>.json after every row; `python -m bench.readme` makes the README's table of it.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

import jquant as jq
from bench import record
from jquant.api import load_text, run_dtype
from jquant.cli.quantize import mean_bits
from jquant.quantize.calibrate import cut_batches, split_batches

# (label, method, spec): the comparisons that the README shows, at 3 bits
ROWS = (
    ("RTN, one scale a row", "rtn", "w3"),
    ("RTN, groups of 64", "rtn", "w3-g64"),
    ("GPTQ, groups of 64", "gptq", "w3-g64"),
    ("SqueezeLLM dense", "squeezellm", "w3-codebook"),
    ("SqueezeLLM + 0.45 %", "squeezellm", "w3-codebook+s0.45%"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calibration-len", type=int, default=1024)
    parser.add_argument("--name", default="smollm2-135m-instruct")
    options = parser.parse_args()

    source = jq.open_model(options.model)
    tokenizer = source.tokenizer()
    model = source.load(run_dtype(None))
    text, calibration = (
        tokenizer(load_text(file), add_special_tokens=False, verbose=False)["input_ids"]
        for file in (options.text, options.calibration)
    )
    sequences = np.concatenate(cut_batches(calibration, options.samples, options.calibration_len))
    rows: list[dict[str, Any]] = []

    def add(label: str, method: str | None, spec: str | None, quantized: Any, bits: float, seconds: float) -> None:
        outcome = jq.perplexity(quantized, text, seq_len=options.seq_len, max_windows=options.windows)
        rows.append(
            {
                "label": label,
                "method": method,
                "spec": spec,
                "bits_per_weight": bits,
                "perplexity": outcome.perplexity,
                "quantize_seconds": seconds,
                "eval_seconds": outcome.seconds,
            }
        )
        print(f"{label:24s} {bits:7.3f} bits  perplexity {outcome.perplexity:.3f}  {seconds:.0f} s", flush=True)
        protocol = {name: str(value) for name, value in vars(options).items() if name != "model"}
        record.save(f"quality-{options.name}", {"protocol": protocol, "rows": rows})

    add("unquantized", None, None, model, 16.0, 0.0)
    fisher: Any = None
    for label, method, spec in ROWS:
        started = time.perf_counter()
        data: Any = sequences
        if method == "squeezellm":  # one Fisher serves every row; its time counts for the first
            fisher = fisher or jq.calibrate(model, split_batches(sequences), "fisher")
            data = fisher
        quantized, report = jq.quantize(model, spec, data, method=method)
        add(label, method, spec, jq.prepare(quantized), mean_bits(report), time.perf_counter() - started)


if __name__ == "__main__":
    main()
