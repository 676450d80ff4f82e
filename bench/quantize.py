"""Time and memory of quantizing: `python -m bench.quantize --shape llama-2-7b --method squeezellm [--out FILE.json]`.

Random bfloat16 weights in the shape of a model, made on the device, and random tokens as calibration; nothing is read
or saved. Seconds are those of one `jq.quantize` call, compilation included. They are split as the call reports its
progress: the time since the step before goes to the stage that a step names (its first word), and in every stage the
first block, which waits for the compiler, is told from the later ones. A device works behind the host's back, so a
stage that waits for no result leaves its time to the next that does.

With --blocks N only N blocks exist; "projected" adds later blocks to the shape's full depth. Peak memory is the
device's since the process began: one method a process.
"""

import argparse
import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jquant as jq
from bench import record
from bench.quality import peak_bytes
from jquant.cli.quantize import compile_sooner
from jquant.format import tree as trees
from jquant.quantize.matrix import Recipe
from jquant.quantize.pipeline import Progress
from jquant.quantize.plan import quik_rules

LLAMA_2_7B = jq.ModelConfig(
    family="llama",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_positions=4096,
    windows=(None,) * 32,
    dtype="bfloat16",
)
SMOLLM2_135M = dataclasses.replace(
    LLAMA_2_7B,
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    windows=(None,) * 30,
    tie_embeddings=True,
)
SHAPES = {"llama-2-7b": LLAMA_2_7B, "smollm2-135m": SMOLLM2_135M}
# method: (spec, calibration sequences, their length, seconds that it may take on an H200 for Llama-2-7B)
METHODS: dict[str, tuple[str, int, int, float | None]] = {
    "rtn": ("w4-g128", 0, 0, None),
    "gptq": ("w4-g128", 128, 2048, 180.0),
    "adadim": ("w4-g128", 128, 2048, None),
    "quik": ("w4a4-sym+o256", 128, 2048, 240.0),
    "squeezellm": ("w4-codebook+s0.45%", 100, 512, 90.0),
    "kllm": ("w4a4-codebook-shared-actcodebook+k0.5%", 16, 2048, 120.0),
    "lnq": ("w4-codebook", 128, 2048, 1200.0),
}
EXTRA_MEMORY = 12e9  # bytes that may be needed beside the weights


class Stopwatch:
    """Progress callback that adds up seconds: {stage: [first block, later blocks]}."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.first: dict[str, str] = {}  # the block that was first to be told of in this kind of step
        self.last = time.perf_counter()

    def __call__(self, step: Progress) -> None:
        stage = step.stage if step.report is None else f"{step.stage} {step.report.path.split('.')[1]}"
        number = re.search(r"\d+", stage)
        kind, block = (stage, "") if number is None else (stage[: number.start()], number[0])
        later = self.first.setdefault(kind, block) != block
        self.add(re.split(r"\W", stage)[0], later)

    def add(self, stage: str, later: bool) -> None:
        now = time.perf_counter()
        self.seconds.setdefault(stage, [0.0, 0.0])[later] += now - self.last
        self.last = now


def main() -> None:
    compile_sooner()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--spec", help="(default: the method's)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON", help="of the Recipe: guided=true")
    parser.add_argument("--blocks", type=int, metavar="N", help="(default: all)")
    parser.add_argument("--samples", type=int, help="calibration sequences (default: the method's)")
    parser.add_argument("--seq-len", type=int, help="their length (default: the method's)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="(default: in bench/results)")
    options = parser.parse_args()
    spec, samples, seq_len, _ = METHODS[options.method]
    spec, samples, seq_len = options.spec or spec, options.samples or samples, options.seq_len or seq_len
    given = (text.split("=", 1) for text in options.option)
    recipe = Recipe(options.method, **{name: json.loads(value) for name, value in given})

    full = SHAPES[options.shape]
    blocks = options.blocks or full.num_layers
    config = dataclasses.replace(full, num_layers=blocks, windows=full.windows[:blocks])
    model = jq.Decoder(config, dtype=jnp.bfloat16, key=jax.random.key(0))
    jax.block_until_ready(jax.tree.leaves(model))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (samples, seq_len)).astype(np.int32)
    result = {
        "shape": options.shape,
        "blocks": blocks,
        "method": options.method,
        "spec": spec,
        "options": options.option,
        "samples": samples,
        "seq_len": seq_len,
        **measure(model, spec, recipe, tokens, full.num_layers),
    }
    if full is LLAMA_2_7B:
        result |= {"bar_seconds": METHODS[options.method][3], "bar_bytes": result["weight_bytes"] + EXTRA_MEMORY}
    print(table(result))
    if options.out is None:
        record.save(f"quantize-{options.shape}-{options.method}", result)
    else:
        options.out.write_text(json.dumps({"environment": record.environment(), **result}, indent=1) + "\n")


def measure(model: jq.Decoder, spec: str, recipe: Recipe, tokens: np.ndarray, depth: int) -> dict[str, Any]:
    """Quantizes once. `depth` is how many blocks the shape really has."""
    weights = sum(jq.size_bytes(leaf) for leaf in trees.leaves(model).values())
    before, blocks = peak_bytes(), len(model.layers)
    parsed = jq.QuantSpec.parse(spec)
    plan = jq.make_plan(model, parsed, recipe.method, quik_rules(model, parsed) if recipe.method == "quik" else ())
    watch = Stopwatch()
    started = time.perf_counter()
    quantized, report = jq.quantize(model, plan, tokens if tokens.size else None, method=recipe, progress=watch)
    jax.block_until_ready(jax.tree.leaves(quantized))
    watch.add("rest", False)
    seconds = time.perf_counter() - started
    first, later = (sum(each[i] for each in watch.seconds.values()) for i in (0, 1))
    return {
        "seconds": seconds,
        "first_block_seconds": first,
        "later_block_seconds": later / (blocks - 1) if blocks > 1 else None,
        "projected_seconds": first + later * (depth - 1) / (blocks - 1) if blocks > 1 else None,
        "stages": {name: {"first_block": each[0], "later_blocks": each[1]} for name, each in watch.seconds.items()},
        "weight_bytes": weights,
        "peak_bytes_before": before,
        "peak_bytes": peak_bytes(),
        "notes": sum(layer.note is not None for layer in report.layers),
    }


def table(result: dict[str, Any]) -> str:
    """What was measured, stage by stage, beside the bars."""
    blocks, seconds = result["blocks"], result["seconds"]
    head = f"{result['shape']}, {blocks} blocks, {result['method']} {result['spec']}, "
    lines = [head + f"{result['samples']} x {result['seq_len']} tokens", "", f"{'stage':14s} {'s':>8s}  first  later"]
    for name, stage in result["stages"].items():
        first, later = stage["first_block"], stage["later_blocks"]
        lines.append(f"{name:14s} {first + later:8.1f} {first:6.1f} {later:6.1f}")
    lines.append(f"{'all':14s} {seconds:8.1f} {result['first_block_seconds']:6.1f}")
    if result["later_block_seconds"] is not None:
        lines[-1] += (
            f" {result['later_block_seconds'] * (blocks - 1):6.1f}, {result['later_block_seconds']:.2f} a block"
        )
        lines.append(f"projected to the full depth {result['projected_seconds']:.1f} s")
    lines.append(f"peak {result['peak_bytes'] / 1e9:.1f} GB, weights {result['weight_bytes'] / 1e9:.1f} GB")
    if result.get("bar_seconds"):
        lines.append(f"bars: {result['bar_seconds']:.0f} s for all blocks, {result['bar_bytes'] / 1e9:.1f} GB")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
