"""What every test gets: strict types, warnings as errors (pyproject.toml), a compile cache, and the optional inputs."""

import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent

jax.config.update("jax_numpy_dtype_promotion", "strict")
# A GPU would otherwise multiply float32 in tf32, three digits short of what the tolerances here are about.
jax.config.update("jax_default_matmul_precision", "highest")
# Tiny arrays gain nothing from LLVM's optimizer, in which compilation spends more than half of its time.
jax.config.update("jax_disable_most_optimizations", True)


def _machine() -> str:
    """Names this kind of processor: compiled code must not travel to another with the checkout."""
    cpu = Path("/proc/cpuinfo")
    flags = (
        [line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))]
        if cpu.exists()
        else []
    )
    text = f"{platform.machine()} {flags[:1]}"
    return f"jax-{jax.__version__}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


# A compile takes about a second; a second run of the suite takes them from here.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "xla" / _machine()))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if jax.default_backend() != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Compiled programs live as long as the process: after a thousand tests they exhaust its memory maps, and XLA dies
    of it. A module's own are enough."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _compile_well(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that compute for long, and those that a GPU runs, get LLVM's optimizer back."""
    if not any(request.node.get_closest_marker(name) for name in ("slow", "gpu")):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a .gguf file, where JQUANT_SMOLLM2 names one (`make test` fetches it)."""
    path = os.environ.get("JQUANT_SMOLLM2")
    if not path:
        pytest.skip("JQUANT_SMOLLM2 names no .gguf file")
    return Path(path)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of texts and models for measuring, where JQUANT_SHARED names one (CI does)."""
    path = os.environ.get("JQUANT_SHARED")
    if not path:
        pytest.skip("JQUANT_SHARED names no folder")
    return Path(path)
