"""The layers, checked from the import statements of every file: who may import whom, and which outside package where.

    bench, tests -> jquant.cli -> convert -> jquant -> pallas_kernels -> jax
    in jquant:            cli -> api -> runtime, quantize -> models (runtime only) -> linear -> format
    in jquant.quantize:   journal -> pipeline -> forward -> backward -> run -> plan -> matrix -> calibrate, passes
                          -> two_level -> grid, codebook

`jquant.api` (with `jquant` itself) may import convert, but inside a function only: convert imports jquant.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jquant", "convert", "pallas_kernels")

_SEAM = {"jquant.linear", "jquant.format"}
_LIBRARY = _SEAM | {"jquant.models", "jquant.runtime", "jquant.quantize"}
MAY_IMPORT = {
    "pallas_kernels": set[str](),
    "jquant.format": {"pallas_kernels"},
    "jquant.linear": {"jquant.format", "pallas_kernels"},
    "jquant.models": _SEAM,
    "jquant.runtime": _SEAM | {"jquant.models", "pallas_kernels"},
    "jquant.quantize": _SEAM,
    "jquant.api": _LIBRARY | {"convert"},
    "convert": _LIBRARY | {"jquant.api"},
    "jquant.cli": _LIBRARY | {"jquant.api", "convert"},
}
# a module of jquant.quantize imports modules of earlier levels only
QUANTIZE_LEVELS = (
    {"grid", "codebook", "allocate"},
    {"two_level"},
    {"calibrate", "passes"},
    {"matrix"},
    {"plan"},
    {"run"},
    {"backward"},
    {"forward"},
    {"pipeline"},
    {"budget", "journal"},
)
QUANTIZE_ORDER = {part: level for level, parts in enumerate(QUANTIZE_LEVELS) for part in parts}
CALLS_KERNELS = {
    "jquant.linear",
    "jquant.format.activations",  # its top-k
    "jquant.format.layouts",
    "jquant.format.weights",
    "jquant.format.semistructured",  # bit packing, as weights
    "jquant.format.validity",
    "jquant.runtime.kvcache",
}
# outside packages that only these places import; an empty set: none
OUTSIDE = {
    "torch": set[str](),
    "sklearn": set[str](),
    "pickle": set[str](),
    "transformers": {"convert.tokenizer"},
    "tokenizers": {"convert"},
    "gguf": {"convert"},
    "huggingface_hub": {"convert"},
    "flax": {"jquant.models", "jquant.api"},
    "orbax": {"jquant.format.array_store"},
    "rich": {"jquant.cli"},
    "matplotlib": {"jquant.cli"},
}


class Import(NamedTuple):
    target: str
    line: int
    lazy: bool  # inside a function
    typing_only: bool  # under `if TYPE_CHECKING:`, never executed


def _imports(text: str, package: str, modules: set[str]) -> Iterator[Import]:
    """Every import of a file that lies in `package`; `modules` tells `from a import b` the module from the name."""

    def visit(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, lazy, typing_only)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parent = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join(parent + ([base] if base else []))
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    yield Import(full if full in modules else base, child.lineno, lazy, typing_only)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from visit(child, lazy or function, typing_only or checking)

    return visit(ast.parse(text), False, False)


def _layer(module: str) -> str:
    """The row of MAY_IMPORT that a module of ours belongs to."""
    top, _, rest = module.partition(".")
    if top != "jquant":
        return top
    second = rest.partition(".")[0]
    return "jquant." + {"": "api", "__main__": "cli"}.get(second, second)


def _quantize_part(module: str) -> str:
    return module.split(".")[2] if module.startswith("jquant.quantize.") else ""


def _inside(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


def _broken_rule(module: str, found: Import) -> str | None:
    """The rule that an import breaks, in words."""
    target = found.target
    outside = target.partition(".")[0]
    if outside not in (*PACKAGES, "tests", "bench"):
        if outside in OUTSIDE and not found.typing_only and not _inside(module, OUTSIDE[outside]):
            return f"{outside} is imported only by {sorted(OUTSIDE[outside]) or 'tests and bench'}"
        if _layer(module) == "pallas_kernels" and outside not in {"jax", "numpy", *sys.stdlib_module_names}:
            return "pallas_kernels imports jax only (and numpy, which is always beside it)"
        return None
    own, other = _layer(module), _layer(target)
    if own not in MAY_IMPORT:
        return f"{own} has no row in tests/test_layers.py: decide what it may import"
    if own != other and other not in MAY_IMPORT[own]:
        return f"{own} may import {sorted(MAY_IMPORT[own]) or 'nothing of ours'}"
    if other == "pallas_kernels" and own != other and not _inside(module, CALLS_KERNELS):
        return f"only {sorted(CALLS_KERNELS)} import pallas_kernels"
    if own == "jquant.api" and other == "convert" and not (found.lazy or found.typing_only):
        return "jquant.api imports convert inside a function only"
    part, needed = _quantize_part(module), _quantize_part(target)
    if part and needed and part != needed:
        for name in (part, needed):
            if name not in QUANTIZE_ORDER:
                return f"jquant.quantize.{name} has no place in QUANTIZE_LEVELS of tests/test_layers.py"
        if QUANTIZE_ORDER[needed] >= QUANTIZE_ORDER[part]:
            return f"in jquant.quantize, {part} does not import {needed}"
    return None


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_every_import_keeps_the_layers() -> None:
    modules = {_module(path) for path in _files()}
    broken = []
    for path in _files():
        module = _module(path)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for found in _imports(path.read_text(encoding="utf-8"), package, modules):
            if rule := _broken_rule(module, found):
                broken.append(f"{path.relative_to(ROOT)}:{found.line} imports {found.target}: {rule}")
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "text", "rule"),
    [
        ("jquant.models.layers", "import jquant.quantize.grid", "jquant.models may import"),
        ("jquant.models.layers", "from jquant import runtime", "jquant.models may import"),
        ("jquant.models.layers", "def f():\n    from jquant import quantize_array", "jquant.models may import"),
        ("jquant.quantize.plan", "from jquant.models import Decoder", "jquant.quantize may import"),
        ("jquant.runtime.generate", "from ..quantize import plan", "jquant.runtime may import"),
        ("jquant.quantize.grid", "from jquant.quantize.passes import rtn", "grid does not import passes"),
        ("jquant.quantize.passes.rtn", "from jquant.quantize import calibrate", "passes does not import calibrate"),
        ("jquant.quantize.grid", "from jquant.quantize.two_level import x", "grid does not import two_level"),
        ("jquant.quantize.grid", "from jquant.quantize.other import x", "other has no place"),
        ("jquant.format.tree", "from pallas_kernels.packing import pack_codes", "only .* import pallas_kernels"),
        ("jquant.api", "import convert", "inside a function only"),
        ("jquant", "from convert import open_source", "inside a function only"),
        ("jquant.linear", "from tests import helpers", "jquant.linear may import"),
        ("jquant.newcomer", "import jquant.format", "has no row"),
        ("convert.mapping", "from jquant.cli import main", "convert may import"),
        ("convert.mapping", "import torch.nn", "tests and bench"),
        ("convert.mapping", "import transformers", r"only by \['convert.tokenizer'\]"),
        ("jquant.format.weights", "from flax import nnx", "flax is imported only by"),
        ("jquant.runtime.generate", "import pickle", "pickle"),
        ("pallas_kernels.packing", "import ml_dtypes", "pallas_kernels imports jax only"),
        ("pallas_kernels.packing", "from jquant.format import weights", "may import nothing of ours"),
    ],
)
def test_forbidden_import_is_caught(module: str, text: str, rule: str) -> None:
    modules = {"jquant.runtime", "jquant.quantize.passes.rtn", "jquant.quantize.calibrate", "jquant.quantize.plan"}
    broken = [_broken_rule(module, found) for found in _imports(text, module.rpartition(".")[0], modules)]
    assert re.search(rule, broken[0] or ""), broken


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("jquant.api", "def load():\n    import convert"),
        ("jquant.runtime.generate", "from jquant.models import Decoder"),
        ("jquant.runtime.kvcache", "from pallas_kernels import packing"),
        ("jquant.quantize.passes.gptq", "from jquant.quantize.passes.rtn import rtn"),
        ("convert.source", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers"),
        ("pallas_kernels.packing", "import functools\nimport jax.numpy"),
    ],
)
def test_allowed_import_passes(module: str, text: str) -> None:
    assert not any(_broken_rule(module, found) for found in _imports(text, module.rpartition(".")[0], set()))
