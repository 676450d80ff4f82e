"""Each method through the pipeline on a tiny model: what it promises, what it stores, and what bad input gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.api import transformed
from jquant.format import tree as trees
from jquant.format.nested import at_bits, narrow, widths
from jquant.format.weights import dequantize, is_quantized
from jquant.linear import linear
from jquant.quantize.budget import spend_bits
from jquant.quantize.calibrate import FisherStats, HessianStats, HistogramStats, RangeStats
from jquant.quantize.matrix import Recipe
from jquant.quantize.pipeline import quantize
from jquant.quantize.plan import Rule, make_plan, quik_rules, stored_bits

Q_PROJ = "layers.1.self_attn.q_proj.weight"


def packed(model) -> dict:
    return {path: leaf for path, leaf in trees.leaves(model).items() if is_quantized(leaf)}


def output_error(model, other, tokens) -> float:
    """Relative difference of the logits."""
    run = jax.jit(lambda m, t: m(t)[0])
    y, z = (np.asarray(run(m, jnp.asarray(tokens)), np.float64) for m in (model, other))
    return float(np.linalg.norm(y - z) / np.linalg.norm(y))


@pytest.fixture(scope="module")
def everything(model, sequences):
    """All statistics of the unquantized model, from one call."""
    return jq.calibrate(model, [sequences[:4], sequences[4:]], ("fisher", "inputs", "guided", "range"), exact=4.0)


@pytest.fixture(scope="module")
def quik(model, sequences):
    return quantize(model, "w4a4-sym+o4", sequences, method="quik")


def test_statistics_come_together_as_they_come_alone(model, sequences, everything) -> None:
    kinds = [type(stat) for stat in everything[Q_PROJ]]
    assert kinds == [FisherStats, HistogramStats, HessianStats, RangeStats]
    alone = jq.calibrate(model, [sequences], "range")
    for path, stats in everything.items():
        np.testing.assert_allclose(stats[3].finalize(), alone[path].finalize(), rtol=1e-5)
    with pytest.raises(ValueError, match="both Hessians"):
        jq.calibrate(model, [sequences], ("hessian", "guided"))
    with pytest.raises(ValueError, match="statistic is 'amax'"):
        jq.calibrate(model, [sequences], "amax")  # pyright: ignore[reportArgumentType]


def test_equal_saliency_gives_the_plain_hessian() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 10, 6))
    plain = HessianStats.init(6).update(x).finalize()
    weighted = HessianStats.init(6).update(x, jnp.full((2, 10), 3.0)).finalize()
    np.testing.assert_allclose(plain, weighted, rtol=1e-5, atol=1e-6)  # float32 sums of 20 terms


def test_adadim_groups_a_loud_column_along_the_output_and_a_loud_row_along_the_input() -> None:
    rng = np.random.default_rng(0)
    W, H = rng.normal(size=(32, 32)).astype(np.float32), np.eye(32, dtype=np.float32)
    column, row = W.copy(), W.copy()
    column[:, 5] *= 6
    row[5] *= 6
    for method in ("adadim", "adadim-rtn"):
        for kernel, spec in ((column, "w3-g16-out"), (row, "w3-g16")):
            layer, report = jq.quantize_array(kernel, "w3-g16", jnp.asarray(H), recipe=method)
            assert report.spec == spec
            assert isinstance(layer.weight, jq.AffineWeight)
            assert layer.weight.group_axis == ("out" if spec.endswith("out") else "in")


def test_adadim_says_what_it_chose_and_is_no_worse_than_gptq(model, sequences) -> None:
    plain, _ = quantize(model, "w3-g16", sequences, method="gptq")
    chosen, report = quantize(model, "w3-g16", sequences, method="adadim")
    specs = {layer.path: layer.spec for layer in report.layers}
    assert set(specs.values()) == {"w3-g16", "w3-g16-out"}
    for path, leaf in packed(chosen).items():
        assert leaf.weight.group_axis == ("out" if specs[path].endswith("-out") else "in")
    # The choice is made layer by layer, so the whole may differ a little either way.
    assert output_error(model, chosen, sequences[:2]) < 1.1 * output_error(model, plain, sequences[:2])


def test_quik_keeps_the_inputs_of_largest_range_exactly_where_nothing_compensates(model, sequences, everything) -> None:
    W, amax = trees.leaves(model)[Q_PROJ], everything[Q_PROJ][3].finalize()
    layer, report = jq.quantize_array(W, "w4a4-sym+o4", jnp.eye(W.shape[1]), amax=amax, recipe="quik")
    kept = layer.outliers
    assert kept is not None and set(np.asarray(kept.index)) == set(np.argsort(-np.asarray(amax))[:4])
    # With H = I there is nothing to make up for; float16 rounds by 2**-11.
    np.testing.assert_allclose(kept.weight, W[:, kept.index], rtol=2**-11)
    assert report.spec == "w4a4-sym+o4" and layer.activation is not None and layer.activation.bits == 4


def test_quik_gains_by_bits_and_by_kept_columns(model, sequences, quik) -> None:
    errors = {"w4a4-sym+o4": output_error(model, quik[0], sequences[:2])}
    for spec in ("w4a4-sym", "w8a8-sym+o4"):
        errors[spec] = output_error(model, quantize(model, spec, sequences, method="quik")[0], sequences[:2])
    assert errors["w8a8-sym+o4"] < 0.1 * errors["w4a4-sym+o4"] < 0.1 * errors["w4a4-sym"]


def test_quik_policy_gives_down_proj_eight_bits_and_more_columns(model) -> None:
    spec = jq.QuantSpec.parse("w4a4-sym+o4")
    plan = make_plan(model, spec, "quik", quik_rules(model, spec))
    assert str(plan["layers.0.mlp.down_proj.weight"]) == "w8a8-sym+o4"  # 48 inputs, 32 wide: once
    assert str(plan[Q_PROJ]) == "w4a4-sym+o4"
    own = make_plan(model, spec, "quik", [*quik_rules(model, spec), Rule.parse("*.down_proj.weight=w4a8-sym")])
    assert str(own["layers.0.mlp.down_proj.weight"]) == "w4a8-sym"


def test_zero_outlier_rule_drops_columns_and_says_so(model, sequences) -> None:
    _, report = quantize(model, "w4a4-sym+o4", sequences, method=Recipe("quik", zero_outliers=1e6))
    assert {layer.spec for layer in report.layers} == {"w4a4-sym"}


def test_semistructured_layers_keep_two_of_four(model, sequences) -> None:
    quantized, report = quantize(model, "w4a8-sym-2:4+o4", sequences, method="quik")
    leaf = packed(quantized)[Q_PROJ]
    base = np.asarray(dequantize(leaf.weight))
    assert (base == 0).mean() >= 0.5
    plain = stored_bits(jq.QuantSpec.parse("w4a8-sym+o4"), (32, 32))
    assert stored_bits(jq.QuantSpec.parse("w4a8-sym-2:4+o4"), (32, 32)) < plain + 32 * 16
    assert np.isfinite(output_error(model, quantized, sequences[:1]))


def test_kllm_gives_every_distinct_input_one_table(model, sequences, everything) -> None:
    quantized, report = quantize(model, "w4a4-codebook-actcodebook+k4%", sequences, method="kllm")
    leaves = packed(quantized)
    tables = {path: np.asarray(leaf.activation.codebook) for path, leaf in leaves.items()}
    np.testing.assert_array_equal(tables[Q_PROJ], tables[Q_PROJ.replace("q_proj", "k_proj")])
    assert not np.array_equal(tables[Q_PROJ], tables["layers.1.mlp.down_proj.weight"])
    given, _ = quantize(model, "w4a4-codebook-actcodebook+k4%", everything, method="kllm")
    np.testing.assert_allclose(packed(given)[Q_PROJ].activation.codebook, tables[Q_PROJ], rtol=1e-3, atol=1e-4)
    rounded, _ = quantize(model, "w4a4-sym-actsym", method="rtn")
    assert output_error(model, quantized, sequences[:2]) < output_error(model, rounded, sequences[:2])
    assert {layer.spec for layer in report.layers} == {"w4a4-codebook-actcodebook+k4%"}


def test_shared_table_costs_fewer_bits_than_a_table_a_row(model, everything) -> None:
    shared, report = quantize(model, "w4-codebook-shared", everything, method="kllm")
    assert packed(shared)[Q_PROJ].weight.codebook.shape == (1, 16)
    _, rows = quantize(model, "w4-codebook", everything, method="kllm")
    assert all(a.bits_per_weight < b.bits_per_weight for a, b in zip(report.layers, rows.layers, strict=True))
    for layer in report.layers:
        shape = trees.leaves(model)[layer.path].shape
        assert stored_bits(jq.QuantSpec.parse("w4-codebook-shared"), shape) / np.prod(shape) <= layer.bits_per_weight


def test_lnq_lowers_its_objective_from_squeezellms_solution(model, everything) -> None:
    path = "layers.0.mlp.gate_proj.weight"
    fisher, hessian = everything[path][0].finalize(), everything[path][2].finalize()
    W = trees.leaves(model)[path]

    def objective(layer) -> float:
        E = np.asarray(W - dequantize(layer), np.float64)
        return float(np.sum((E @ np.asarray(hessian, np.float64)) * E))

    for spec in ("w3-codebook", "w3-codebook+s2%"):
        start, _ = jq.quantize_array(W, spec, fisher=fisher, recipe="squeezellm")
        refined, report = jq.quantize_array(W, spec, hessian, fisher, recipe="lnq")
        assert report.method == "lnq" and objective(refined) < objective(start)
        if refined.residual is not None and start.residual is not None:
            np.testing.assert_array_equal(refined.residual.columns, start.residual.columns)


def test_lnq_beats_squeezellm_and_both_ways_of_judging_work(model, sequences) -> None:
    start, _ = quantize(model, "w2-codebook", sequences, method="squeezellm")
    refined, report = quantize(model, "w2-codebook", sequences, method="lnq")
    assert {layer.method for layer in report.layers} == {"lnq"}
    assert output_error(model, refined, sequences[:2]) < output_error(model, start, sequences[:2])
    guided, _ = quantize(model, "w3-g16", sequences, method=Recipe("gptq", guided=True, sequential=False))
    assert output_error(model, guided, sequences[:2]) < 1.0


def test_transformed_model_quantizes_and_survives_a_checkpoint(model, sequences, tmp_path) -> None:
    rotated = transformed(model, "rotate")
    assert output_error(model, rotated, sequences[:2]) < 1e-5
    quantized, report = quantize(rotated, "w4a8-sym+o4", sequences, method="quik")
    down = packed(quantized)["layers.0.mlp.down_proj.weight"]
    assert down.transform is not None and down.transform.size == 48
    assert packed(quantized)[Q_PROJ].transform is None
    error = output_error(model, quantized, sequences[:2])
    assert error < 0.3  # 4-bit weights of a tiny model
    jq.save(tmp_path / "rotated", quantized, report)
    loaded = jq.load(tmp_path / "rotated")
    assert output_error(quantized, loaded, sequences[:2]) < 1e-5
    smoothed = transformed(model, "smooth", sequences)
    assert output_error(model, smoothed, sequences[:2]) < 1e-5
    with pytest.raises(ValueError, match="measures the layers' inputs"):
        transformed(model, "smooth")


def test_every_kind_of_layer_survives_a_checkpoint(model, sequences, everything, quik, tmp_path) -> None:
    kllm, report = quantize(model, "w3a4-codebook-actcodebook+t4%", everything, method="kllm")
    for name, (made, how) in {"kllm": (kllm, report), "quik": quik}.items():
        jq.save(tmp_path / name, made, how)
        loaded = packed(jq.load(tmp_path / name))
        for path, leaf in packed(made).items():
            np.testing.assert_array_equal(dequantize(loaded[path]), dequantize(leaf))
            assert loaded[path].activation.bits == leaf.activation.bits == 4


def test_the_same_calibration_gives_the_same_bytes(model, sequences, quik) -> None:
    again, _ = quantize(model, "w4a4-sym+o4", sequences, method="quik")
    for path, leaf in packed(again).items():
        same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), leaf, packed(quik[0])[path])
        assert all(jax.tree.leaves(same))


def test_bits_are_spent_within_the_budget_and_where_the_loss_feels_them(model, sequences) -> None:
    for method, spec, target in (("rtn", "w4-g16", 5.5), ("squeezellm", "w3-codebook", 8.0)):
        plan = make_plan(model, jq.QuantSpec.parse(spec), method)
        spent = spend_bits(model, plan, Recipe(method), [sequences], target)
        sizes = {path: trees.leaves(model)[path].shape for path in plan}
        total = sum(np.prod(shape) for shape in sizes.values())
        mean = sum(stored_bits(each, sizes[path]) for path, each in spent.items()) / total
        assert mean <= target and len({each.bits for each in spent.values()}) > 1
        with pytest.raises(ValueError, match="target"):
            spend_bits(model, plan, Recipe(method), [sequences], 1.0)


def test_two_level_scales_stay_within_their_widths_whatever_the_budget(model, sequences) -> None:
    rules = [Rule.parse("*.mlp.*=w4-g16")]
    plan = make_plan(model, jq.QuantSpec.parse("w4-g16-sym-twolevel"), "rtn", rules)
    spent = spend_bits(model, plan, Recipe("rtn"), [sequences], 6.0)
    assert {spec.bits for spec in spent.values() if spec.two_level} <= {2, 3, 4}
    assert max(spec.bits for spec in spent.values()) > 4
    assert all(spent[path].two_level == plan[path].two_level for path in plan)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_two_level_scales_reach_every_layer(model, sequences, tmp_path, method) -> None:
    quantized, report = quantize(model, "w4a8-g16-sym-twolevel", sequences, method=method)
    jq.save(tmp_path / "model", quantized, report)
    loaded = packed(jq.load(tmp_path / "model"))
    for path, leaf in packed(quantized).items():
        scales = np.asarray(leaf.weight.scales, np.float64)
        counts = np.arange(1, 17)[:, None, None]
        found = scales * counts / scales.max(axis=1, keepdims=True)  # of exact products: whole, or it is not
        assert np.all(np.any(np.all(found == np.rint(found), axis=2), axis=0)), path
        np.testing.assert_array_equal(dequantize(loaded[path]), dequantize(leaf))
    assert {layer.spec for layer in report.layers} == {"w4a8-g16-sym-twolevel"}
    free, _ = quantize(model, "w4a8-g16-sym", sequences, method=method)
    # Groups of 16 inputs differ most, in rows of 32 and 48: layers gain or lose a little by their multiples.
    ours, theirs = (output_error(model, each, sequences[:2]) for each in (quantized, free))
    assert ours < 1.15 * theirs


@pytest.mark.parametrize(
    ("spec", "method", "message"),
    [
        ("w4-sym+o33", "quik", "has 32 inputs"),
        ("w4-sym-2:4+o3", "quik", "multiple of 4"),
        ("w4-g16+o4", "quik", "one symmetric scale a row"),
        ("w4-g16-out", "adadim", "chooses the group axis"),
        ("w4-g16-sym-twolevel", "adadim", "groups of outputs, which have no two-level scales; .* use gptq"),
        ("w4-g16-sym-twolevel", "adadim-rtn", "use rtn"),
        ("w4-g16-sym-twolevel", "quik", "one symmetric scale a row"),
        ("w4-codebook-shared", "squeezellm", "a table a row"),
        ("w4-codebook-shared+s1%", "kllm", "no sparse entries"),
        ("w4-sym-2:4", "gptq", "no 2:4 pattern"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(model, spec, method, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(model, jq.QuantSpec.parse(spec), method)
    with pytest.raises(ValueError, match="needs calibration"):
        quantize(model, "w4-sym", method="quik")
    with pytest.raises(ValueError, match="no Hessian to guide"):
        Recipe("rtn", guided=True)


def test_bad_statistics_have_a_named_outcome(model, everything) -> None:
    W = trees.leaves(model)[Q_PROJ]
    K = W.shape[1]
    broken = jnp.full((K, K), jnp.inf)
    layer, report = jq.quantize_array(W, "w4-sym+o4", broken, amax=jnp.ones(K), recipe="quik")
    assert report.method == "rtn" and "not finite" in (report.note or "")
    assert np.isfinite(np.asarray(dequantize(layer))).all()
    for hessian in (broken, jnp.zeros((K, K))):
        layer, report = jq.quantize_array(W, "w3-codebook", hessian, jnp.ones_like(W), recipe="lnq")
        assert "not refined" in (report.note or "") and np.isfinite(np.asarray(dequantize(layer))).all()
    for fisher in (jnp.zeros_like(W), jnp.full_like(W, jnp.nan)):
        for spec in ("w3-codebook", "w3-codebook-shared"):
            layer, report = jq.quantize_array(W, spec, fisher=fisher, recipe="kllm")
            assert "Fisher" in (report.note or "") and np.isfinite(np.asarray(dequantize(layer))).all()
    unseen = HistogramStats.init(1.0)
    layer, report = jq.quantize_array(W, "w4a4-codebook-actcodebook+k1%", inputs=unseen, recipe="kllm")
    assert "no activations were seen" in (report.note or "")
    assert np.isfinite(np.asarray(linear(jnp.ones((2, K)), layer))).all()
    with pytest.raises(ValueError, match="need calibration"):
        jq.quantize_array(W, "w4a4-codebook-actcodebook", recipe="kllm")


def test_ranges_take_infinite_activations_for_outliers() -> None:
    x = jnp.asarray([[1.0, jnp.nan, 3.0], [-5.0, 2.0, -jnp.inf]])
    np.testing.assert_array_equal(RangeStats.init(3).update(x).finalize(), [5.0, jnp.inf, jnp.inf])


def test_a_table_of_few_distinct_values_is_exact() -> None:
    W = jnp.asarray(np.random.default_rng(0).choice([-1.0, 0.0, 2.0], (8, 64)), jnp.float32)
    for recipe in (Recipe("squeezellm"), Recipe("squeezellm", exact=True)):
        layer, _ = jq.quantize_array(W, "w4-codebook", recipe=recipe)
        np.testing.assert_array_equal(dequantize(layer), W)


def test_dead_inputs_and_odd_sizes_are_served() -> None:
    rng = np.random.default_rng(1)
    X = rng.normal(size=(200, 30)).astype(np.float32)
    X[:, 3] = 0
    W, H = rng.normal(size=(7, 30)).astype(np.float32), X.T @ X / 200
    for spec, recipe in (("w4-sym+o3", "quik"), ("w3-g16", "adadim"), ("w3-codebook", "lnq")):
        layer, report = jq.quantize_array(W, spec, jnp.asarray(H), recipe=recipe)
        error = X @ (W - np.asarray(dequantize(layer))).T
        assert np.linalg.norm(error) < 0.4 * np.linalg.norm(X @ W.T), spec
        assert dataclasses.asdict(report)["path"] == "weight"


def test_one_nested_file_is_read_at_every_width(model, sequences, everything, tmp_path) -> None:
    quantized, report = quantize(model, "w5-codebook-nested2", everything, method="squeezellm")
    leaf = packed(quantized)[Q_PROJ]
    assert list(widths(leaf.weight)) == [2, 3, 4, 5]
    shape = trees.leaves(model)[Q_PROJ].shape
    expected = stored_bits(jq.QuantSpec.parse("w5-codebook-nested2"), shape) / np.prod(shape)
    assert next(layer for layer in report.layers if layer.path == Q_PROJ).bits_per_weight == pytest.approx(expected)
    jq.save(tmp_path / "nested", quantized, report)
    errors = []
    for bits in (2, 3, 4, 5):
        narrowed = jq.load(tmp_path / "nested", bits=bits)
        assert packed(narrowed)[Q_PROJ].weight.bits == bits and packed(narrowed)[Q_PROJ].weight.nested is None
        errors.append(output_error(model, narrowed, sequences[:2]))
    assert errors == sorted(errors, reverse=True)
    alone, _ = quantize(model, "w2-codebook", everything, method="squeezellm")
    np.testing.assert_array_equal(dequantize(at_bits(leaf.weight, 2)), dequantize(packed(alone)[Q_PROJ].weight))
    with pytest.raises(ValueError, match="2 to 5 bits, not at 6"):
        narrow(quantized, 6)
    with pytest.raises(ValueError, match="no nested codebooks"):
        narrow(alone, 2)
