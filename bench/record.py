"""Raw results as JSON, with where they were measured."""

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


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
