"""Which spec each layer gets, decided and priced before anything is computed.

    plan = make_plan(model, spec, rules)        {path: QuantSpec}; a Plan is plain data, printable and stored as JSON
    forecast(plan, shapes, ...)                 bytes, bits a weight, peak memory and time, before a run

A rule is a glob over paths and a spec, or None to leave the layers dense; the last rule that matches wins.
"""

import dataclasses
import fnmatch
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jquant.format import tree as trees
from jquant.format.spec import QuantSpec
from jquant.format.weights import is_quantized, size_bytes
from jquant.quantize.calibrate import linear_paths
from jquant.quantize.matrix import Recipe, check_spec
from jquant.quantize.passes.quik import fraction_count, scaled_count

COMPILER_BYTES = 600_000_000  # XLA on a CPU, largest while programs of thirty blocks are compiled
HEAD_ROWS = 256  # tokens whose logits exist at once
SELF_BATCH = 16  # sequences sampled together
KMEANS_SECONDS = (
    6e-7  # a weight and core, all passes of squeezellm beside the gradients; two to six times what the fit takes
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """pattern: a glob over paths such as `*.down_proj.weight`; spec: what these layers get, None leaves them dense."""

    pattern: str
    spec: QuantSpec | None

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """`GLOB=SPEC`, or `GLOB=none`."""
        pattern, separator, spec = text.partition("=")
        if not separator or not pattern:
            raise ValueError(f"rule {text!r} has no form GLOB=SPEC, for example *.down_proj.weight=w8")
        return cls(pattern, None if spec.strip().lower() == "none" else QuantSpec.parse(spec))


Plan = Mapping[str, QuantSpec]


def make_plan(model: Any, spec: QuantSpec, method: str, rules: Sequence[Rule] = ()) -> dict[str, QuantSpec]:
    """{path: spec} for every linear layer inside the model's blocks. `model` may be abstract.

    Raises ValueError for a spec that the method cannot make, a layer that is quantized already, or a rule that
    matches nothing.
    """
    leaves = trees.leaves(model)
    paths = linear_paths(model)
    if not paths:
        raise ValueError("the model has no linear layers under layers.*; there is nothing to quantize")
    if done := [path for path in paths if is_quantized(leaves[path])]:
        raise ValueError(f"the model is quantized already ({done[0]} and {len(done) - 1} more); give the original")
    plan: dict[str, QuantSpec] = {}
    for path in paths:
        chosen: QuantSpec | None = spec
        for rule in rules:
            if fnmatch.fnmatchcase(path, rule.pattern):
                chosen = rule.spec
        if chosen is not None:
            check_spec(chosen, method)
            _check_columns(chosen, path, leaves[path].shape[1])
            plan[path] = chosen
    for rule in rules:
        if not any(fnmatch.fnmatchcase(path, rule.pattern) for path in paths):
            raise ValueError(f"rule {rule.pattern!r} matches no layer; layers look like {paths[0]}")
    return plan


def _check_columns(spec: QuantSpec, path: str, columns: int) -> None:
    """ValueError, before anything is computed, for what the layer's K input columns do not allow."""
    if spec.outliers > columns:
        raise ValueError(f"{path} has {columns} inputs, spec {spec} keeps {spec.outliers} of them; keep fewer")
    if spec.semistructured and (columns - spec.outliers) % 4:
        raise ValueError(
            f"{path} has {columns} inputs less {spec.outliers} kept ones, which are no groups of four; "
            f"spec {spec} needs a number of kept columns that leaves a multiple of 4"
        )


def quik_rules(model: Any, spec: QuantSpec, share: float | None = None) -> list[Rule]:
    """QUIK's policy for models with gated MLPs, as rules to put before the user's own.

    down_proj reads a product of two branches, whose range is far larger: 8 bits for its weights and inputs where the
    others have 4. Layers wider than the model keep columns in proportion: a `share` of their inputs if one is given,
    else spec.outliers times the whole part of inputs / model width, as the released code.
    """
    shapes = {path: leaf.shape for path, leaf in trees.leaves(model).items()}
    hidden = shapes["embed_tokens.weight"][1]
    wide = next((shapes[path][1] for path in linear_paths(model) if path.endswith(".down_proj.weight")), hidden)
    act = spec.activation and dataclasses.replace(spec.activation, bits=max(8, spec.activation.bits))
    count = fraction_count(share, wide) if share is not None else scaled_count(spec.outliers, wide, hidden)
    count = min(count, wide)
    return [Rule("*.down_proj.weight", dataclasses.replace(spec, bits=8, activation=act, outliers=count))]


def stored_bits(spec: QuantSpec, shape: tuple[int, int]) -> float:
    """Bits that a [N, K] matrix will take, counted as `bits_per_weight` counts them; exact but for the sparse part."""
    rows, columns = shape
    words = -(-columns * spec.bits // 32) * 32 * rows
    act = spec.activation
    table = 0 if act is None or act.grid == "affine" else 32 * (2**act.bits + 2 * act.static)
    if spec.grid == "codebook":
        column_bits = 16 if columns <= 65536 else 32
        kept = spec.sparse / 100 * rows * columns
        entries = 2**spec.bits + (0 if spec.nested_from is None else 2**spec.bits - 2**spec.nested_from)
        width = 8 if spec.int8_table else 16
        scales = 16 * rows if spec.shared or spec.int8_table else 0
        tables = width * entries * (1 if spec.shared else rows) + scales
        return words + tables + table + (kept * (16 + column_bits) + 32 * (rows + 1) if spec.sparse else 0)
    if spec.outliers:
        count = min(spec.outliers, columns)
        base = dataclasses.replace(spec, outliers=0)
        return stored_bits(base, (rows, columns - count)) + count * (16 * rows + 32)
    if spec.semistructured:
        halves = (-(-columns // 2 * spec.bits // 32) + -(-columns // 4 * 4 // 32)) * 32 * rows
        return halves + 16 * rows + columns * (16 if columns <= 65536 else 32)
    along, across = (columns, rows) if spec.group_axis == "in" else (rows, columns)
    groups = -(-along // (spec.group_size or along))
    zeros = 0 if spec.symmetric else groups * -(-across * spec.bits // 32) * 32
    return words + 16 * groups * across + zeros + table


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run will take; `seconds` is an estimate from a short measurement of this device."""

    layers: int
    bits_per_weight: float  # of the quantized layers
    output_bytes: int
    peak_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def forecast(
    model: Any, plan: Plan, recipe: Recipe, *, samples: int, seq_len: int, self_calibrated: bool, stored_dtype: Any
) -> Forecast:
    """Prices a plan. `model` may be abstract (`jax.eval_shape`): only shapes and types are read.

    stored_dtype: the type in which the layers left dense are saved.
    """
    leaves = trees.leaves(model)
    width = jnp.dtype(stored_dtype).itemsize
    quantized = sum(stored_bits(spec, leaves[path].shape) for path, spec in plan.items()) / 8
    dense = sum(leaf.size for path, leaf in leaves.items() if path not in plan) * width
    weights = sum(leaves[path].size for path in plan)
    params = sum(size_bytes(leaf) for leaf in leaves.values())
    depth = max((int(path.split(".")[1]) for path in plan), default=0) + 1
    block = sum(leaves[path].size for path in plan if path.startswith("layers.0."))
    features = leaves["embed_tokens.weight"].shape[1] if "embed_tokens.weight" in leaves else 0
    forward, backward = recipe.needs_hessian(), needs_gradients(plan, recipe)
    stream = 4 * samples * seq_len * features if forward or backward else 0
    copies = max(2 * forward, (2 * depth**0.5 + 2) * backward)
    widest = max((max(leaves[path].shape) for path in plan), default=0)
    statistics = max(4 * 4 * widest**2 * forward, 4 * 4 * block * backward)
    # besides the parameters: the stream, one block's statistics, and one layer in float32 with its pass's copies
    work = copies * stream + statistics + 8 * 4 * max((leaves[path].size for path in plan), default=0)
    if backward:
        work += 6 * 4 * HEAD_ROWS * max(leaf.shape[0] for leaf in leaves.values())  # logits and their gradients
    if self_calibrated and stream:
        kv = max((leaves[path].shape[0] for path in plan if path.endswith("k_proj.weight")), default=0)
        work += 2 * 2 * 4 * min(samples, SELF_BATCH) * seq_len * kv * depth  # keys and values, and those being written
    passes = 5 * forward + 6 * backward
    rate = measured_flops() if passes or self_calibrated else 1.0
    seconds = passes * 2 * weights * samples * seq_len / rate
    if self_calibrated and stream:
        # each step reads the weights once for a batch of sequences
        seconds += seq_len * -(-samples // SELF_BATCH) * params / 8e9
    if recipe.needs_fisher():
        seconds += weights * KMEANS_SECONDS / (1 if jax.default_backend() == "cpu" else 50)
    seconds += weights * 5e-8
    bits = 8 * quantized / max(weights, 1)
    peak = process_bytes() + params + quantized + work
    return Forecast(len(plan), bits, int(quantized + dense), int(peak), seconds)


def needs_gradients(plan: Plan, recipe: Recipe) -> bool:
    """Whether anything of the plan needs a backward pass."""
    tables = any(spec.activation is not None and spec.activation.grid == "codebook" for spec in plan.values())
    return recipe.needs_fisher() or recipe.needs_saliency() or tables


def process_bytes() -> int:
    """What this process holds already, and what XLA's compiler will: the floor under any run."""
    statm = Path("/proc/self/statm")
    resident = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 400_000_000
    return resident + COMPILER_BYTES


def measured_flops(size: int = 1024) -> float:
    """Floating-point operations a second of a square float32 product on this device, best of three."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(product(x, x))
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
