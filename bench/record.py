"""Raw results as JSON, and the README tables that are made from them."""

import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"


def environment() -> dict[str, str]:
    """Where a result was measured."""
    device = jax.devices()[0]
    name = platform.processor() or platform.machine()
    if device.platform == "cpu" and Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": name if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def save(name: str, data: dict[str, Any]) -> Path:
    """Writes results/<name>.json and returns its path."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps({"environment": environment(), **data}, indent=1) + "\n")
    return file


def markdown(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, numbers aligned right."""
    lines = ["| " + " | ".join(headers) + " |", "|---|" + "---:|" * (len(headers) - 1)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def put_into_readme(name: str, text: str) -> None:
    """Replaces what stands between `<!-- name:begin -->` and `<!-- name:end -->`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    page = README.read_text()
    if begin not in page or end not in page:
        raise ValueError(f"README.md has no place marked {begin} ... {end}")
    README.write_text(page.split(begin)[0] + f"{begin}\n{text}\n{end}" + page.split(end)[1])
