"""A short run on a GPU: `python -m bench.gpu_smoke OUT.json`. Correctness of the seam, then decode speed, in one call.

Random weights in the shape of Llama-2-7B cut to 8 blocks (all its matrices, a quarter of its depth), batch 1, greedy,
the jitted while_loop of `generate`. Dense bfloat16 runs in the same process. Wall-clock of whole decodes, median of 5.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jquant as jq
from bench import record
from jquant.format import tree as trees

BLOCKS = 8
CONFIG = jq.ModelConfig(
    family="llama",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=BLOCKS,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_positions=4096,
    windows=(None,) * BLOCKS,
    dtype="bfloat16",
)
SPECS = ("w8", "w4-g128", "w4-codebook", "w3-codebook+s0.45%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    model = jq.Decoder(CONFIG, dtype=jnp.bfloat16, key=jax.random.key(0))
    rows = [measure("bfloat16", model, options.tokens, 0.0)]
    for spec in SPECS:
        started = time.perf_counter()
        quantized, _ = jq.quantize(model, spec)
        jax.block_until_ready(jax.tree.leaves(quantized))
        seconds = time.perf_counter() - started
        error = seam_error(quantized)
        rows.append(measure(spec, jq.prepare(quantized), options.tokens, seconds) | {"seam_error": error})
    for row in rows:
        row["speedup"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        print(row, flush=True)
    options.out.write_text(json.dumps({"environment": record.environment(), "blocks": BLOCKS, "rows": rows}, indent=1))


def measure(spec: str, model: Any, count: int, seconds: float) -> dict[str, Any]:
    """tokens/s of greedy decoding after one run that compiles."""
    runs = [jq.generate(model, [[1, 2, 3, 4]], max_new_tokens=count) for _ in range(6)]
    return {
        "spec": spec,
        "bytes": sum(jq.size_bytes(leaf) for leaf in trees.leaves(model).values()),
        "quantize_seconds": seconds,
        "first_run_seconds": runs[0].seconds_prefill + runs[0].seconds_decode,
        "tokens_per_second": statistics.median(run.decode_tokens_per_second for run in runs[1:]),
    }


def seam_error(model: Any) -> float:
    """Relative Frobenius error of linear against float64 NumPy on the decoded weight, the worst of a block's layers."""
    worst = 0.0
    for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"):
        packed = trees.leaves(model)[f"layers.0.{name}.weight"]
        for rows in (1, 16, 256):
            x = jax.random.normal(jax.random.key(rows), (rows, packed.weight.shape[1]), jnp.float32)
            y = np.asarray(jax.jit(jq.linear)(x.astype(jnp.bfloat16), packed), np.float64)
            exact = np.asarray(x.astype(jnp.bfloat16), np.float64) @ np.asarray(jq.dequantize(packed), np.float64).T
            worst = max(worst, float(np.linalg.norm(y - exact) / np.linalg.norm(exact)))
    return worst


if __name__ == "__main__":
    main()
