"""What `bench.quality` compares: every method at 4, 3 and 2 bits, and with quantized activations.

`reference` names the row of the authors' own code on the same work, as (bits a weight, perplexity over the first 16
windows): its protocol is that of `bench.quality`, groups of 64, 32 kept columns in every layer.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jquant.quantize.passes.transforms import Kind

NONE: Mapping[str, Any] = MappingProxyType({})


class Row(NamedTuple):
    """A way to quantize: a spec, and a Recipe as method and options; without a method, not at all.

    transforms: what is done to the model first. rules: specs of layers that differ, as on the command line.
    budget: mean bits a weight that each layer's bits are chosen for.
    """

    label: str
    group: str
    method: str | None
    spec: str | None
    options: Mapping[str, Any] = NONE
    transforms: tuple[Kind, ...] = ()
    rules: tuple[str, ...] = ()
    budget: float | None = None
    reference: tuple[float, float] | None = None


# authors' own code: (bits, perplexity)
REFERENCE = {
    "RTN w4-g64": (4.31, 27.34),
    "RTN w4-g64-out": (4.31, 27.23),
    "GPTQ w4-g64": (4.31, 25.79),
    "GPTQ w4-g64, original inputs": (4.31, 26.71),
    "AdaDim-RTN w4-g64": (4.31, 25.77),
    "AdaDim-GPTQ w4-g64": (4.31, 23.88),
    "SqueezeLLM w4": (4.38, 23.39),
    "SqueezeLLM w4 + 0.45 %": (4.59, 22.77),
    "RTN w3-g64": (3.30, 70.33),
    "RTN w3-g64-out": (3.30, 126.3),
    "GPTQ w3-g64": (3.30, 48.14),
    "GPTQ w3-g64, original inputs": (3.30, 61.96),
    "AdaDim-RTN w3-g64": (3.30, 66.00),
    "AdaDim-GPTQ w3-g64": (3.30, 42.81),
    "SqueezeLLM w3": (3.19, 40.47),
    "SqueezeLLM w3 + 0.45 %": (3.40, 33.74),
    "QUIK W8A8": (8.42, 20.79),
    "QUIK W4A4, down_proj 8 bits": (5.59, 27.25),
    "QUIK W4A4, all 4 bits": (4.61, 49.98),
}


def _row(label: str, group: str, method: str | None, spec: str | None, **more: Any) -> Row:
    return Row(label, group, method, spec, reference=REFERENCE.get(label), **more)


def _weights(b: int) -> list[Row]:
    def row(label: str, method: str, spec: str, **more: Any) -> Row:
        return _row(label, f"weights-{b}", method, spec, **more)

    return [
        row(f"RTN w{b}", "rtn", f"w{b}"),
        row(f"RTN w{b}-g64", "rtn", f"w{b}-g64"),
        row(f"RTN w{b}-g64-out", "rtn", f"w{b}-g64-out"),
        row(f"GPTQ w{b}", "gptq", f"w{b}"),
        row(f"GPTQ w{b}-g64, original inputs", "gptq", f"w{b}-g64", options={"sequential": False}),
        row(f"GPTQ w{b}-g64", "gptq", f"w{b}-g64"),
        row(f"GPTQ w{b}-g64, guided", "gptq", f"w{b}-g64", options={"guided": True}),
        row(f"GPTQ w{b}-g64, guided, clip search", "gptq", f"w{b}-g64", options={"guided": True, "clip_search": True}),
        row(f"GPTQ w{b}-g64, rotated", "gptq", f"w{b}-g64", transforms=("rotate",)),
        row(f"AdaDim-RTN w{b}-g64", "adadim-rtn", f"w{b}-g64"),
        row(f"AdaDim-GPTQ w{b}-g64", "adadim", f"w{b}-g64"),
        row(f"AdaDim-GPTQ w{b}-g64, guided", "adadim", f"w{b}-g64", options={"guided": True}),
        row(f"SqueezeLLM w{b}", "squeezellm", f"w{b}-codebook"),
        row(f"SqueezeLLM w{b}, exact", "squeezellm", f"w{b}-codebook", options={"exact": True}),
        row(f"SqueezeLLM w{b} + 0.05 %", "squeezellm", f"w{b}-codebook+s0.05%"),
        row(f"SqueezeLLM w{b} + 0.45 %", "squeezellm", f"w{b}-codebook+s0.45%"),
        row(f"SqueezeLLM w{b}, int8 tables", "squeezellm", f"w{b}-codebook-int8"),
        row(f"SqueezeLLM w{b} + 0.45 %, int8 tables", "squeezellm", f"w{b}-codebook-int8+s0.45%"),
        row(f"LNQ w{b}", "lnq", f"w{b}-codebook"),
        row(f"LNQ w{b}, original inputs", "lnq", f"w{b}-codebook", options={"sequential": False}),
        row(f"LNQ w{b} + 0.45 %", "lnq", f"w{b}-codebook+s0.45%"),
        row(f"LNQ w{b}, int8 tables", "lnq", f"w{b}-codebook-int8"),
        row(f"KLLM w{b}, one table a matrix", "kllm", f"w{b}-codebook-shared"),
        row(f"KLLM w{b}, one int8 table a matrix", "kllm", f"w{b}-codebook-shared-int8"),
    ]


def _activations() -> list[Row]:
    def row(label: str, method: str, spec: str, **more: Any) -> Row:
        return _row(label, "activations", method, spec, **more)

    rotated: Any = {"transforms": ("rotate",)}
    guided: Any = {"options": {"guided": True}}
    mixed, tables = ("*.down_proj.weight=w8a8-sym+o32",), "-codebook-actcodebook+k0.5%"
    sims = ("*.down_proj.weight=w8a8-sym-actsim+o32",)
    return [
        row("RTN W8A8", "rtn", "w8a8-sym"),
        row("QUIK W8A8", "quik", "w8a8-sym-actsim+o32"),
        row("RTN W4A8", "rtn", "w4a8-sym"),
        row("GPTQ W4A8-g64", "gptq", "w4a8-g64"),
        row("GPTQ W4A8-g64, symmetric", "gptq", "w4a8-g64-sym"),
        row("GPTQ W4A8-g64, two levels", "gptq", "w4a8-g64-sym-twolevel"),
        row("QUIK W4A8", "quik", "w4a8-sym+o32"),
        row("QUIK W4A8, guided", "quik", "w4a8-sym+o32", **guided),
        row("SqueezeLLM W4A8, int8 tables", "squeezellm", "w4a8-codebook-int8"),
        row("SqueezeLLM W3A8, int8 tables", "squeezellm", "w3a8-codebook-int8"),
        row("KLLM W4A8, one int8 table a matrix", "kllm", "w4a8-codebook-shared-int8"),
        row("RTN W4A4", "rtn", "w4a4-sym"),
        row("RTN W4A4, rotated", "rtn", "w4a4-sym", **rotated),
        row("QUIK W4A4, no columns kept", "quik", "w4a4-sym"),
        row("QUIK W4A4, all 4 bits", "quik", "w4a4-sym-actsim+o32"),
        row("QUIK W4A4, all 4 bits, kernel form", "quik", "w4a4-sym+o32"),
        row("QUIK W4A4, all 4 bits, guided", "quik", "w4a4-sym+o32", **guided),
        row("QUIK W4A4, all 4 bits, act order", "quik", "w4a4-sym-actsim+o32", options={"act_order": True}),
        row("QUIK W4A4, all 4 bits, rotated", "quik", "w4a4-sym+o32", **rotated),
        row("QUIK W4A4, all 4 bits, rotated, guided", "quik", "w4a4-sym+o32", **rotated, **guided),
        row("QUIK W4A4, down_proj 8 bits", "quik", "w4a4-sym-actsim+o32", rules=sims),
        row("QUIK W4A4, down_proj 8 bits, kernel form", "quik", "w4a4-sym+o32", rules=mixed),
        row("QUIK W4A4, down_proj 8 bits, guided", "quik", "w4a4-sym+o32", rules=mixed, **guided),
        row("QUIK W4A4, down_proj 8 bits, smoothed", "quik", "w4a4-sym+o32", rules=mixed, transforms=("smooth",)),
        row("QUIK W4A4, down_proj 8 bits, rotated", "quik", "w4a4-sym+o32", rules=mixed, **rotated),
        row("QUIK W4A4, down_proj 8 bits, rotated, guided", "quik", "w4a4-sym+o32", rules=mixed, **rotated, **guided),
        row("QUIK W4A8 2:4", "quik", "w4a8-sym-2:4+o32"),
        row("QUIK W8A8 2:4", "quik", "w8a8-sym-2:4+o32"),
        row("KLLM W4A4, one table a matrix", "kllm", "w4a4-codebook-shared-actcodebook+k0.5%"),
        row("KLLM W4A4", "kllm", f"w4a4{tables}"),
        row("KLLM W4A4, static thresholds", "kllm", "w4a4-codebook-actcodebook+t0.5%"),
        row("KLLM W4A4, no entries exact", "kllm", "w4a4-codebook-actcodebook"),
        row("KLLM W4A3", "kllm", f"w4a3{tables}"),
        row("KLLM W4A4, LNQ weights", "lnq", f"w4a4{tables}"),
        row("KLLM W4A3, LNQ weights", "lnq", f"w4a3{tables}"),
        row("KLLM W4A4, rotated", "kllm", f"w4a4{tables}", **rotated),
        row("KLLM W4A3, rotated", "kllm", f"w4a3{tables}", **rotated),
    ]


def _budgets() -> list[Row]:
    return [
        _row("GPTQ g64, 3.3 bits spread", "budget", "gptq", "w3-g64", budget=3.30),
        _row("GPTQ g64, 4.31 bits spread", "budget", "gptq", "w4-g64", budget=4.31),
        _row("SqueezeLLM, 3.19 bits spread", "budget", "squeezellm", "w3-codebook", budget=3.195),
        _row("LNQ, 3.19 bits spread", "budget", "lnq", "w3-codebook", budget=3.195),
        _row("LNQ, 2.7 bits spread", "budget", "lnq", "w3-codebook", budget=2.7),
    ]


ROWS = (
    _row("unquantized", "reference", None, None),
    *_weights(4),
    *_weights(3),
    *_weights(2),
    *_activations(),
    *_budgets(),
)
