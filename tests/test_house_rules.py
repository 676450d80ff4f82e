"""Rules of the house that a linter does not know. CONTRIBUTING.md gives the reasons."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("jquant", "convert", "pallas_kernels", "bench")


def _calls(text: str) -> list[tuple[str, ast.Call]]:
    """(last part of the called name, call)."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            found.append((name, node))
    return found


def _bare_pallas_call(text: str) -> list[str]:
    return [
        f"line {call.lineno}: pallas_call without compiler_params, whose backend changes with the JAX version"
        for name, call in _calls(text)
        if name == "pallas_call" and "compiler_params" not in {keyword.arg for keyword in call.keywords}
    ]


def _evaluation(text: str) -> list[str]:
    return [
        f"line {call.lineno}: {call.func.id} runs text as code"
        for _, call in _calls(text)
        if isinstance(call.func, ast.Name) and call.func.id in ("eval", "exec", "compile", "__import__")
    ]


def _length(text: str) -> list[str]:
    lines = text.count("\n")
    return [f"{lines} lines; a file has one concept and at most 600"] if lines > 600 else []


def _unfinished(text: str) -> list[str]:
    words = ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error")
    return [f"line {i}: unfinished" for i, line in enumerate(text.splitlines(), 1) if any(w in line for w in words)]


RULES = [_bare_pallas_call, _evaluation, _length, _unfinished]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__.strip("_"))
def test_files_keep_the_rule(rule: Callable[[str], list[str]]) -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {problem}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for problem in rule(path.read_text(encoding="utf-8"))
    ]
    assert not broken, "\n" + "\n".join(broken)


def test_rules_catch_what_they_are_for() -> None:
    assert _bare_pallas_call("pl.pallas_call(kernel, out_shape=s)(x)")
    assert not _bare_pallas_call("pl.pallas_call(kernel, out_shape=s, compiler_params=p)(x)")
    assert _evaluation("eval('1')") and not _evaluation("re.compile('x'); model.eval()")
    assert _length("\n" * 601) and _unfinished("x = 1  # TO" + "DO")
