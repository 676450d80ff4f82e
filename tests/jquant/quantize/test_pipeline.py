"""The pipeline on a tiny model: what each method promises, and that every way through it gives the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.format import tree as trees
from jquant.format.weights import QuantizedLinear, dequantize, is_quantized, residual_rows
from jquant.linear import linear
from jquant.quantize.calibrate import FisherStats, HessianStats
from jquant.quantize.matrix import Recipe, quantize_siblings
from jquant.quantize.pipeline import Progress, quantize
from jquant.quantize.plan import Rule, forecast, make_plan, stored_bits


def decoded(model):
    """The model with dense leaves that equal its packed ones."""
    dense = {path: dequantize(leaf) for path, leaf in trees.leaves(model).items() if is_quantized(leaf)}
    return trees.replace(model, dense)


def packed_bytes(model) -> bytes:
    return b"".join(np.asarray(array).tobytes() for array in jax.tree.leaves(model))


@pytest.fixture(scope="module")
def squeezed(model, sequences):
    return quantize(model, "w3-codebook+s2%", sequences)


def test_quantized_model_computes_what_its_decoded_weights_compute(squeezed, sequences) -> None:
    quantized, _ = squeezed
    tokens = jnp.asarray(sequences[:2])
    ours, _ = jax.jit(lambda m, t: m(t))(quantized, tokens)
    oracle, _ = jax.jit(lambda m, t: m(t))(decoded(quantized), tokens)
    # Same numbers summed in another order: float32 rounding through three layers.
    np.testing.assert_allclose(ours, oracle, atol=2e-4 * float(jnp.max(jnp.abs(oracle))))


def test_the_argument_is_left_as_it_was_and_every_linear_is_replaced(model, squeezed) -> None:
    quantized, report = squeezed
    assert not any(is_quantized(leaf) for leaf in trees.leaves(model).values())
    replaced = [path for path, leaf in trees.leaves(quantized).items() if is_quantized(leaf)]
    assert len(replaced) == 7 * 3 == len(report.layers)
    assert [layer.path for layer in report.layers] == replaced


def test_kept_entries_are_exact(model, squeezed) -> None:
    originals = trees.leaves(model)
    for path, leaf in trees.leaves(squeezed[0]).items():
        if not is_quantized(leaf):
            continue
        rest = leaf.residual
        rows = np.asarray(residual_rows(rest))
        place = (rows, np.asarray(rest.columns).astype(int))
        W = np.asarray(originals[path])
        # values are float16, which rounds w - table by at most 2**-11 of it; the rest is float32
        limit = 2**-11 * np.abs(np.asarray(rest.values, np.float32)).max() + 2**-22 * np.abs(W).max()
        np.testing.assert_allclose(np.asarray(dequantize(leaf))[place], W[place], rtol=0, atol=limit)


def test_sparse_share_is_what_was_asked_for(model, squeezed) -> None:
    kept = sum(layer.kept for layer in squeezed[1].layers)
    total = sum(leaf.size for path, leaf in trees.leaves(model).items() if path.endswith("_proj.weight"))
    # each layer rounds its share of sensitive entries to a whole number
    assert abs(kept - 0.02 * total) <= len(squeezed[1].layers)


def test_gptq_lowers_the_output_error_where_the_weight_error_rises(model, sequences) -> None:
    _, plain = quantize(model, "w3-g16", method="rtn")
    _, better = quantize(model, "w3-g16", sequences, method="gptq")
    assert sum(layer.weight_error for layer in better.layers) > sum(layer.weight_error for layer in plain.layers)
    assert np.mean([layer.objective_error < layer.weight_error for layer in better.layers]) > 0.9


def test_streamed_and_stored_fisher_agree(model, sequences, squeezed) -> None:
    stats = jq.calibrate(model, [sequences[:4], sequences[4:]], "fisher")
    again, _ = quantize(model, "w3-codebook+s2%", stats)
    streamed = trees.leaves(squeezed[0])
    for path, leaf in trees.leaves(again).items():
        if is_quantized(leaf):
            np.testing.assert_array_equal(leaf.weight.codes, streamed[path].weight.codes)


def test_streamed_fisher_equals_the_plain_gradient(model, sequences) -> None:
    paths = [path for path in trees.leaves(model) if path.endswith("_proj.weight")]

    def loss(weights, sequence):
        full = trees.replace(model, weights)
        return full.loss(full.hidden(sequence[None])[0], sequence[None])[0]

    weights = {path: trees.leaves(model)[path] for path in paths}
    plain = jq.diagonal_fisher(loss, weights, [jnp.asarray(row) for row in sequences[:3]])
    streamed = jq.calibrate(model, [sequences[:2], sequences[2:3]], "fisher")
    for path in paths:
        expected = np.asarray(plain[path].finalize())
        np.testing.assert_allclose(streamed[path].finalize(), expected, rtol=1e-3, atol=1e-6 * expected.max())
        stat = streamed[path]
        assert isinstance(stat, FisherStats) and float(stat.count) == 3


def test_hessian_statistics_merge_in_any_order(model, sequences) -> None:
    halves = [jq.calibrate(model, [part], "hessian") for part in (sequences[:2], sequences[2:])]
    whole = jq.calibrate(model, [sequences], "hessian")
    path = "layers.1.mlp.down_proj.weight"
    first, second = (half[path] for half in halves)
    assert isinstance(first, HessianStats) and isinstance(second, HessianStats)
    merged = second.merge(first)
    np.testing.assert_allclose(merged.finalize(), whole[path].finalize(), rtol=1e-4, atol=1e-5)
    assert float(merged.count) == sequences.size


def test_layers_with_one_input_are_quantized_as_if_alone(model, sequences) -> None:
    spec = jq.QuantSpec.parse("w3-g16")
    leaves = trees.leaves(model)
    kernels = {name: leaves[f"layers.0.self_attn.{name}_proj.weight"] for name in "qkv"}
    hessian = jq.calibrate(model, [sequences], "hessian")["layers.0.self_attn.q_proj.weight"].finalize()
    together = quantize_siblings(kernels, spec, Recipe("gptq"), hessian)
    for name, kernel in kernels.items():
        alone, _ = jq.quantize_array(kernel, spec, hessian)
        same = np.asarray(dequantize(together[name][0])) == np.asarray(dequantize(alone))
        assert same.mean() > 0.99  # the products behind a rounding decision may sum in another order


def test_the_same_seed_gives_the_same_bytes(model, sequences, squeezed) -> None:
    again, _ = quantize(model, "w3-codebook+s2%", sequences)
    assert packed_bytes(again) == packed_bytes(squeezed[0])


def test_interrupted_runs_continue_with_the_same_bytes(model, sequences, tmp_path) -> None:
    from jquant.quantize.journal import DirectoryJournal

    for spec, method in (("w3-codebook+s2%", "squeezellm"), ("w3-g16", "gptq")):
        whole, _ = quantize(model, spec, sequences, method=method)

        def stop(step: Progress) -> None:
            if step.done == 10:  # in the second of three blocks
                raise KeyboardInterrupt

        place = tmp_path / method
        with pytest.raises(KeyboardInterrupt):
            quantize(
                model,
                spec,
                sequences,
                method=method,
                journal=DirectoryJournal(place, {"a": 1}, resume=False),
                progress=stop,
            )
        journal = DirectoryJournal(place, {"a": 1}, resume=True)
        assert 1 <= journal.finished_blocks() <= 2
        resumed, report = quantize(model, spec, sequences, method=method, journal=journal)
        assert packed_bytes(resumed) == packed_bytes(whole)
        assert len(report.layers) == 21


def test_journal_refuses_another_run_and_a_run_without_resume(tmp_path) -> None:
    from jquant.quantize.journal import DirectoryJournal

    DirectoryJournal(tmp_path / "run", {"bits": 3}, resume=False)
    with pytest.raises(ValueError, match="--resume"):
        DirectoryJournal(tmp_path / "run", {"bits": 3}, resume=False)
    with pytest.raises(ValueError, match="bits was 3, is 4"):
        DirectoryJournal(tmp_path / "run", {"bits": 4}, resume=True)


def test_a_damaged_journal_file_counts_as_unfinished(model, tmp_path) -> None:
    from jquant.quantize.journal import DirectoryJournal

    journal = DirectoryJournal(tmp_path / "run", {}, resume=False)
    quantize(model, "w4-g16", journal=journal)
    assert journal.load(1) is not None
    file = tmp_path / "run" / "block-0001.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert journal.load(1) is None


def test_rules_give_layers_their_own_spec(model) -> None:
    rules = [Rule.parse("*.down_proj.weight=w8"), Rule.parse("layers.0.*=none")]
    plan = make_plan(model, jq.QuantSpec.parse("w4-g16"), "rtn", rules)
    assert str(plan["layers.1.mlp.down_proj.weight"]) == "w8"
    assert not any(path.startswith("layers.0.") for path in plan)
    quantized, report = quantize(model, plan, method="rtn")
    assert len(report.layers) == len(plan) == 14
    assert trees.leaves(quantized)["layers.1.mlp.down_proj.weight"].weight.bits == 8


def test_forecast_counts_the_bits_that_come_out(model) -> None:
    for text in ("w3-g16", "w4-g20-sym", "w4-g20-sym-twolevel", "w4-g16-out", "w5", "w3-codebook", "w3-codebook-int8"):
        spec = jq.QuantSpec.parse(text)
        method = "squeezellm" if spec.grid == "codebook" else "rtn"
        kernel = trees.leaves(model)["layers.0.mlp.down_proj.weight"]
        packed, report = jq.quantize_array(kernel, spec)
        assert stored_bits(spec, kernel.shape) / kernel.size == pytest.approx(report.bits_per_weight), text
        plan = make_plan(model, spec, method)
        priced = forecast(
            model, plan, Recipe(method), samples=4, seq_len=16, self_calibrated=True, stored_dtype=jnp.float32
        )
        assert priced.layers == 21 and priced.seconds > 0 and priced.peak_bytes > priced.output_bytes


@pytest.mark.parametrize(
    ("spec", "method", "message"),
    [
        ("w3-codebook", "gptq", "codebook"),
        ("w3", "squeezellm", "w3-codebook"),
        ("w3+s1%", "rtn", "sparse"),
        ("w3+o4", "gptq", "outlier columns"),
        ("w3", "magic", "rtn, gptq, adadim"),
        ("w3", "gptq", "needs calibration"),
    ],
)
def test_senseless_combinations_are_refused(model, spec, method, message) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(model, spec, method=method)


def test_weights_that_are_not_finite_are_named(model) -> None:
    path = "layers.1.self_attn.k_proj.weight"
    broken = trees.replace(model, {path: trees.leaves(model)[path].at[0, 0].set(jnp.nan)})
    with pytest.raises(ValueError, match=path):
        quantize(broken, "w4")


def test_unusable_hessian_falls_back_and_says_so(model, sequences) -> None:
    stats = jq.calibrate(model, [sequences], "hessian")
    path = "layers.2.mlp.gate_proj.weight"
    stat = stats[path]
    assert isinstance(stat, HessianStats)
    stats[path] = dataclasses.replace(stat, total=stat.total.at[0, 0].set(jnp.nan))
    quantized, report = quantize(model, "w4-g16", stats)
    layer = next(layer for layer in report.layers if layer.path == path)
    assert layer.method == "rtn" and "not finite" in (layer.note or "")
    assert np.isfinite(np.asarray(dequantize(trees.leaves(quantized)[path]))).all()


def test_a_bare_matrix_can_be_quantized_and_used(key) -> None:
    kernel = jax.random.normal(key, (24, 40))
    x = jax.random.normal(key, (3, 40))
    packed, report = jq.quantize_array(kernel, "w8-g16")
    assert isinstance(packed, QuantizedLinear) and report.bits_per_weight < 10
    error = linear(x, packed) - x @ kernel.T
    assert float(jnp.linalg.norm(error) / jnp.linalg.norm(x @ kernel.T)) < 0.01  # 8-bit steps over +-3 sigma


def test_quantizing_twice_is_refused(squeezed) -> None:
    with pytest.raises(ValueError, match="quantized already"):
        quantize(squeezed[0], "w4")
