"""The README's tables, made from bench/results: `python -m bench.readme`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.record import RESULTS

README = Path(__file__).parent.parent / "README.md"
MODEL = "smollm2-135m-instruct"


def main() -> None:
    put("quality", quality())
    put("speed", speed())


def quality() -> str:
    data = read(f"quality-{MODEL}")
    protocol = data["protocol"]
    rows = [(r["label"], f"{r['bits_per_weight']:.2f}", f"{r['perplexity']:.2f}") for r in data["rows"]]
    about = (
        f"SmolLM2-135M-Instruct, WikiText-2, {protocol['windows']} windows of {protocol['seq_len']} tokens; "
        f"calibration: {protocol['samples']} x {protocol['calibration_len']} tokens of C4. Its source is a GGUF file "
        "with 4-bit linears (Q4_1), so compare within this table only."
    )
    return f"{about}\n\n{markdown(('3 bits', 'bits a weight', 'perplexity'), rows)}"


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
