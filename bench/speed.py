"""Evaluation beside transformers, and decoding beside dense models: `python -m bench.speed MODEL --text FILE`.

Both comparisons run in one process on the same cores. transformers (torch, float32, sdpa) gets the very parameters
that jquant loaded. Everything is run once to compile and warm up, then timed; the ratio is of medians.
Results go to bench/results/speed-<name>.json; `python -m bench.readme` makes the README's table of it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import jquant as jq
from bench import record
from jquant.api import load_text

SPECS = ("w8", "w4-g128", "w4-codebook", "w3-codebook+s0.45%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--name", default="cpu")
    options = parser.parse_args()

    source = jq.open_model(options.model)
    tokens = source.tokenizer()(load_text(options.text), add_special_tokens=False, verbose=False)["input_ids"]
    model = source.load(jnp.float32)
    rows = decode_rows(model, source, options.tokens)
    windows = np.asarray(tokens[: options.windows * options.seq_len]).reshape(options.windows, -1)
    ours = timed(lambda window: jq.perplexity(model, window, seq_len=len(window)).perplexity, windows)
    theirs = timed(transformers_perplexity(model), windows)
    evaluation = {
        "seconds_a_window": ours[0],
        "transformers_seconds_a_window": theirs[0],
        "ratio": ours[0] / theirs[0],
        "perplexities": [ours[1], theirs[1]],
    }
    print(
        f"eval: {ours[0]:.2f} s a window, transformers {theirs[0]:.2f} s, ratio {evaluation['ratio']:.2f}", flush=True
    )
    record.save(f"speed-{options.name}", {"decode": rows, "evaluation": evaluation})


def decode_rows(model: Any, source: Any, count: int) -> list[dict[str, Any]]:
    """tokens/s of greedy decoding at batch 1, dense in float32 and bfloat16, then quantized."""
    rows = [
        decode_row("float32", model, count),
        decode_row("bfloat16", source.load(jnp.bfloat16), count),
    ]
    fastest = max(row["tokens_per_second"] for row in rows)
    for spec in SPECS:
        quantized, _ = jq.quantize(model, spec)
        rows.append(decode_row(spec, jq.prepare(quantized), count))
    for row in rows:
        row["speedup"] = row["tokens_per_second"] / fastest
        print(f"{row['spec']:22s} {row['tokens_per_second']:7.1f} tokens/s  {row['speedup']:.2f}", flush=True)
    return rows


def decode_row(spec: str, model: Any, count: int) -> dict[str, Any]:
    """The median of three runs after one that compiles."""
    runs = [jq.generate(model, [[1, 2, 3, 4]], max_new_tokens=count) for _ in range(4)]
    return {
        "spec": spec,
        "tokens_per_second": statistics.median(run.decode_tokens_per_second for run in runs[1:]),
        "first_run_seconds": runs[0].seconds_prefill + runs[0].seconds_decode,
    }


def timed(run: Callable[[np.ndarray], float], windows: np.ndarray) -> tuple[float, list[float]]:
    """(median seconds a window, results), after one untimed run."""
    run(windows[0])
    seconds, results = [], []
    for window in windows:
        started = time.perf_counter()
        results.append(run(window))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), results


def transformers_perplexity(model: jq.Decoder) -> Callable[[np.ndarray], float]:
    """The same computation by transformers on the same parameters (Llama family)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=config.tie_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    ).eval()
    theirs.set_attn_implementation("sdpa")
    ours = {f"model.{path}": np.array(leaf) for path, leaf in jq.leaves(model).items()}
    if config.tie_embeddings:
        ours["lm_head.weight"] = ours["model.embed_tokens.weight"]
    else:
        ours["lm_head.weight"] = ours.pop("model.lm_head.weight")
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in ours.items()})

    def run(window: np.ndarray) -> float:
        ids = torch.from_numpy(window.astype(np.int64))[None]
        with torch.inference_mode():
            return float(torch.exp(theirs(ids, labels=ids).loss))

    return run


if __name__ == "__main__":
    main()
