"""The README's tables, and bench/results/matmul.md, made from bench/results: `python -m bench.readme`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.record import RESULTS

SHOWN = ("70b gate", "7b o")  # shapes in the README; all are in bench/results/matmul.md
QUICK = (1, 16, 64, 256, 2048)
README = Path(__file__).parent.parent / "README.md"
MODEL = "smollm2-135m-instruct"


def main() -> None:
    put("quality", quality())
    put("quantize", quantize())
    put("kernels", kernels())
    (RESULTS / "matmul.md").write_text(all_products())
    put("speed", speed())


GROUPS = {
    "weights-4": "4 bits, activations as they are",
    "weights-3": "3 bits",
    "weights-2": "2 bits",
    "activations": "quantized activations",
    "budget": "bits chosen by layer",
}


def quality() -> str:
    """A table a group; the model's own row comes first in each."""
    data = read(f"quality-{MODEL}")
    protocol, rows = data["protocol"], data["rows"]
    own = next(row for row in rows if row["method"] is None)
    about = (
        f"SmolLM2-135M-Instruct; calibration: {protocol['samples']} x {protocol['calibration_len']} tokens of C4; "
        f"windows of {protocol['seq_len']} tokens of WikiText-2 ({protocol['windows']}, and the first "
        f"{protocol['reference_windows']}, for which the last column has what the authors' own code gave on the same "
        "work) and of other C4 text. KL in nats and top-1 agreement are with the unquantized model. The source is a "
        "GGUF file with 4-bit linears (Q4_1), so compare within these tables only."
    )
    tables = []
    for group, title in GROUPS.items():
        lines = [quality_row(row) for row in (own, *(row for row in rows if row["group"] == group))]
        if len(lines) > 1:
            headers = (title, "bits", "first 16", "40 windows", "C4", "KL", "top-1", "authors")
            tables.append(markdown(headers, lines))
    return "\n\n".join([about, *tables])


def quality_row(row: dict[str, Any]) -> tuple[str, ...]:
    theirs = row.get("reference")
    numbers = (row["perplexity_reference_windows"], row["perplexity"], row["second_perplexity"])
    shown = ["" if number is None else f"{number:.2f}" if number < 1000 else f"{number:.0f}" for number in numbers]
    return (
        row["label"] + (f" (on {row['device']})" if "device" in row else ""),
        f"{row['bits_per_weight']:.2f}",
        *shown,
        f"{row['kl']:.3f}",
        f"{row['top1']:.1%}",
        "" if theirs is None else f"{theirs[1]:.2f} at {theirs[0]:.2f}",
    )


def quantize() -> str:
    """Seconds to quantize Llama-2-7B's shape, by method."""
    rows, devices = [], set()
    for method in ("squeezellm", "kllm", "quik", "gptq", "lnq"):
        data = read(f"quantize-llama-2-7b-{method}")
        devices.add(data["environment"]["device"])
        beside = (data["peak_bytes"] - data["weight_bytes"]) / 1e9
        text = f"{data['samples']} x {data['seq_len']}"
        rows.append((f"{method} {data['spec']}", text, f"{data['projected_seconds']:.0f}", f"{beside:.1f}"))
    about = (
        f"Random weights of Llama-2-7B's shape on one {' / '.join(sorted(devices))}, compilation included: the first "
        "blocks measured, the rest of 32 projected from the last. Memory is what is needed beside the weights."
    )
    return f"{about}\n\n{markdown(('method', 'tokens', 'seconds', 'GB'), rows)}"


def kernels() -> str:
    """One linear layer on a GPU, two shapes and some numbers of tokens."""
    data = read("matmul")
    tables = [products(data, shape, QUICK, True) for shape in SHOWN]
    about = (
        f"One {data['environment']['device']}, device time, times as fast as XLA's dense bfloat16 product; in brackets "
        "what the roofline allows, from the copy bandwidth and the peaks of XLA's own products in the same run."
    )
    return "\n\n".join([about, *tables])


def all_products() -> str:
    """Every shape and number of tokens of the same result."""
    data = read("matmul")
    about = (
        f"# One linear layer on one {data['environment']['device']}\n\nTimes as fast as XLA's dense bfloat16 product "
        "of the same shape in the same process; `python -m bench.matmul`, this page by `python -m bench.readme`. "
        "Rows of several runs may stand in one table, each against the dense product of its own run; the first line is "
        "that of the last row. Bytes, bandwidth, errors and ceilings are in matmul.json."
    )
    tokens = sorted({row["m"] for row in data["rows"]})
    shapes = dict.fromkeys(row["shape"] for row in data["rows"])
    tables = [f"{shape[0].upper()}{shape[1:]}\n\n{products(data, shape, tokens, False)}" for shape in shapes]
    return "\n\n".join([about, *tables]) + "\n"


def products(data: dict[str, Any], shape: str, tokens: Sequence[int], ceilings: bool) -> str:
    """A table of ratios by the number of tokens, a line a kind of product."""
    rows = [row for row in data["rows"] if row["shape"] == shape and "ratio" in row]
    dense = {row["m"]: row["dense_us"] for row in rows}
    lines = [("dense bfloat16, us", *(f"{dense[m]:.0f}" for m in tokens))]
    for op in dict.fromkeys(row["op"] for row in rows):
        found = {row["m"]: row for row in rows if row["op"] == op}
        lines.append((op, *(cell(found[m], ceilings) if m in found else "" for m in tokens)))
    return markdown((f"N={rows[0]['n']}, K={rows[0]['k']}; tokens:", *map(str, tokens)), lines)


def cell(row: dict[str, Any], ceiling: bool) -> str:
    return f"{row['ratio']:.2f}" + (f" ({row['ceiling']:.2f})" if ceiling else "")


def speed() -> str:
    data = read("speed-cpu")
    rows = [(r["spec"], f"{r['tokens_per_second']:.1f}", f"{r['speedup']:.2f}") for r in data["decode"]]
    headers = ("decoding, batch 1", "tokens/s", "against the faster dense")
    about = (
        f"Two cores of a CPU ({data['environment']['device']}), the same model, everything in one run. Evaluation "
        f"takes {data['evaluation']['ratio']:.2f} times as long as transformers (torch, float32, sdpa) on the same "
        "windows."
    )
    return f"{about}\n\n{markdown(headers, rows)}"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, numbers aligned right."""
    lines = ["| " + " | ".join(headers) + " |", "|---|" + "---:|" * (len(headers) - 1)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def put(name: str, text: str) -> None:
    """Replaces what stands between `<!-- name:begin -->` and `<!-- name:end -->`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    page = README.read_text()
    if begin not in page or end not in page:
        raise ValueError(f"README.md has no place marked {begin} ... {end}")
    README.write_text(page.split(begin)[0] + f"{begin}\n{text}\n{end}" + page.split(end)[1])


if __name__ == "__main__":
    main()
