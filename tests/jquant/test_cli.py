"""The commands as a user meets them: words, outputs, exit codes, and that nothing is lost on bad input."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jquant.cli import main
from jquant.format import checkpoint


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *words: object) -> str:
    """The one line of a refusal; asserts that it is one."""
    code, out, err = run(capsys, *words)
    lines = [line for line in err.splitlines() if line.startswith("jquant: ")]
    assert code == 2 and out == "" and len(lines) == 1, (code, out, err)
    assert "Traceback" not in err
    return lines[0]


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "quantized"
    words = ["quantize", tiny_checkpoint, "--out", out, "--method", "squeezellm", "--bits", 3]
    assert main([str(w) for w in [*words, "--samples", 4, "--seq-len", 24, "--json"]]) == 0
    return out


def test_quantize_eval_generate_inspect_work_in_turn(capsys, quantized, tiny_checkpoint, text_file) -> None:
    code, out, _ = run(capsys, "eval", quantized, "--text", text_file, "--seq-len", 64, "--max-windows", 3, "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 0
    assert set(result) == {"perplexity", "tokens", "windows", "bits_per_weight", "seconds"}
    assert result["windows"] == 3 and result["tokens"] == 3 * 63
    code, out, _ = run(
        capsys, "eval", tiny_checkpoint, "--text", text_file, "--seq-len", 64, "--max-windows", 3, "--json"
    )
    assert abs(np.log(json.loads(out)["perplexity"] / result["perplexity"])) < 1.0
    code, out, err = run(
        capsys, "generate", quantized, "--prompt", "the", "--prompt", "fox", "--max-new-tokens", 5, "--json"
    )
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and len(result["texts"]) == 2 and "tokens/s" in err
    code, out, _ = run(capsys, "inspect", quantized, "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and len(result["layers"]) == 29 and result["size_bytes"] > 0
    assert 3 < result["bits_per_weight"] < 16
    code, out, _ = run(capsys, "inspect", tiny_checkpoint)
    assert code == 0 and "layers.0.mlp.down_proj" in out


def test_eval_compares_with_a_reference(capsys, quantized, tiny_checkpoint, text_file) -> None:
    words = ["--text", text_file, "--seq-len", 64, "--max-windows", 3, "--reference", tiny_checkpoint]
    code, out, err = run(capsys, "eval", quantized, *words, "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and len(out.splitlines()) == 1
    added = {"kl", "top1", "reference_perplexity"}
    assert set(result) == {"perplexity", "tokens", "windows", "bits_per_weight", "seconds"} | added
    assert 0.001 < result["kl"] < 1.0 and 0.5 < result["top1"] < 1.0
    code, out, _ = run(capsys, "eval", tiny_checkpoint, *words, "--json")
    same = json.loads(out.splitlines()[-1])
    assert same["kl"] <= 1e-6 and same["top1"] == 1.0  # float32
    assert same["perplexity"] == pytest.approx(result["reference_perplexity"], rel=1e-6)
    code, out, _ = run(capsys, "eval", quantized, *words)
    assert code == 0 and "KL" in out


def test_every_way_to_quantize_is_a_few_words_away(capsys, tiny_checkpoint, text_file, tmp_path) -> None:
    calibration = ["--calibration", text_file, "--samples", 3, "--seq-len", 24]
    ways = {
        "quik": ["--method", "quik", "--outliers", "6.25%", "--act-bits", 8, "--transform", "rotate"],
        "kllm": ["--method", "kllm", "--table", "matrix", "--act-exact", 4],
        "budget": ["--method", "rtn", "--group-size", 16, "--target-bpw", 5.2],
        "nested": ["--method", "squeezellm", "--bits", 5, "--nested-from", 3],
    }
    results = {}
    for name, words in ways.items():
        out = tmp_path / name
        code, text, err = run(capsys, "quantize", tiny_checkpoint, "--out", out, *words, *calibration, "--json")
        assert code == 0, err
        results[name] = json.loads(text.splitlines()[-1])
    assert results["budget"]["bits_per_weight"] <= 5.2
    words = ["--bits", 3, "--text", text_file, "--seq-len", 64, "--max-windows", 3, "--json"]
    code, text, err = run(capsys, "eval", tmp_path / "nested", *words)
    narrow = json.loads(text.splitlines()[-1])
    assert code == 0 and np.isfinite(narrow["perplexity"]), err
    assert narrow["bits_per_weight"] < results["nested"]["bits_per_weight"]
    header = json.loads((tmp_path / "quik" / checkpoint.SIDECAR).read_text())["header"]
    assert header["config"]["tie_embeddings"] is False and header["calibration"]["transforms"] == ["rotate"]
    specs = {layer["path"]: layer["spec"] for layer in header["report"]["layers"]}
    assert specs["layers.0.mlp.down_proj.weight"] == "w8a8-sym+o3"


def test_chat_form_and_sampling_options_are_accepted(capsys, quantized) -> None:
    words = ["generate", quantized, "--prompt", "the", "--max-new-tokens", 4, "--chat"]
    code, out, _ = run(capsys, *words, "--temperature", 0.7, "--top-k", 5, "--top-p", 0.9, "--seed", 3)
    assert code == 0
    assert out == run(capsys, *words, "--temperature", 0.7, "--top-k", 5, "--top-p", 0.9, "--seed", 3)[1]


def test_two_runs_write_the_same_bytes(tiny_checkpoint, quantized, tmp_path) -> None:
    out = tmp_path / "again"
    words = ["quantize", tiny_checkpoint, "--out", out, "--method", "squeezellm", "--bits", 3]
    assert main([str(w) for w in [*words, "--samples", 4, "--seq-len", 24]]) == 0
    for file in sorted(p for p in quantized.rglob("*") if p.is_file()):
        assert file.read_bytes() == (out / file.relative_to(quantized)).read_bytes(), file


def test_interrupt_and_resume_write_the_same_bytes(capsys, monkeypatch, tiny_checkpoint, text_file, tmp_path) -> None:
    import jquant.cli.quantize as command

    words = [tiny_checkpoint, "--method", "gptq", "--bits", 3, "--group-size", 16]
    words += ["--calibration", text_file, "--samples", 4, "--seq-len", 24]
    assert run(capsys, "quantize", *words, "--out", tmp_path / "whole")[0] == 0
    describe = command.describe

    def interrupt(step):
        if step.done == 10:
            raise KeyboardInterrupt
        return describe(step)

    monkeypatch.setattr(command, "describe", interrupt)
    code, _, err = run(capsys, "quantize", *words, "--out", tmp_path / "out")
    assert code == 130 and "--resume" in err and not (tmp_path / "out").exists()
    monkeypatch.setattr(command, "describe", describe)
    assert "--resume" in refused(capsys, "quantize", *words, "--out", tmp_path / "out")
    other = [tiny_checkpoint, "--method", "gptq", "--bits", 4, *words[5:]]
    assert "different run" in refused(capsys, "quantize", *other, "--out", tmp_path / "out", "--resume")
    assert run(capsys, "quantize", *words, "--out", tmp_path / "out", "--resume")[0] == 0
    for file in sorted(p for p in (tmp_path / "whole").rglob("*") if p.is_file()):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(tmp_path / "whole")).read_bytes(), file
    assert not (tmp_path / "out.partial").exists()


def test_dry_run_prices_and_writes_nothing(capsys, tiny_checkpoint, tmp_path) -> None:
    code, out, err = run(
        capsys, "quantize", tiny_checkpoint, "--out", tmp_path / "o", "--method", "gptq", "--dry-run", "--json"
    )
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and not list(tmp_path.iterdir())
    assert {"bits_per_weight", "output_bytes", "peak_bytes", "seconds", "plan"} <= set(result)
    assert "forecast" in err


def test_bad_arguments_are_refused(capsys, tiny_checkpoint, quantized, text_file, tmp_path) -> None:
    start = ["quantize", tiny_checkpoint, "--out", tmp_path / "o"]
    assert "exists already" in refused(capsys, *start[:2], "--out", tmp_path, "--method", "rtn")
    assert "--sparse does not go" in refused(capsys, *start, "--method", "rtn", "--sparse", 1)
    assert "--group-size does not go" in refused(capsys, *start, "--method", "squeezellm", "--group-size", 8)
    assert "GLOB=SPEC" in refused(capsys, *start, "--method", "rtn", "--rule", "x")
    assert "matches no layer" in refused(capsys, *start, "--method", "rtn", "--rule", "zz*=w4")
    assert "percent" in refused(capsys, *start, "--method", "squeezellm", "--sparse", 100)
    assert "positions" in refused(capsys, *start, "--method", "gptq", "--seq-len", 4096)
    assert "nowhere" in refused(capsys, *start, "--method", "gptq", "--calibration", tmp_path / "nowhere.txt")
    assert "quantized already" in refused(capsys, "quantize", quantized, "--out", tmp_path / "o", "--method", "rtn")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    words = ["--method", "gptq", "--calibration", short, "--samples", 4, "--seq-len", 24]
    assert "enough for 0 samples" in refused(capsys, *start, *words)
    assert not (tmp_path / "o.partial").exists(), "a refused command leaves nothing for the next one to trip over"
    assert "less than one window" in refused(capsys, "eval", quantized, "--text", short, "--seq-len", 64)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\x01" * 50)
    assert "UTF-8" in refused(capsys, "eval", quantized, "--text", binary)
    for words in (
        ["--bits", 1],
        ["--bits", "many"],
        ["--group-size", -3],
        ["--samples", 0],
        ["--method", "magic"],
    ):
        code, out, err = run(capsys, *start, "--method", "rtn", *words)
        assert code == 2 and out == "" and "Traceback" not in err
    assert not (tmp_path / "o").exists()


def test_options_that_a_method_does_not_take_are_named(capsys, tiny_checkpoint, tmp_path) -> None:
    words = ["quantize", tiny_checkpoint, "--out", tmp_path / "out", "--method"]
    for method, option in (
        ("gptq", ["--outliers", 4]),
        ("gptq", ["--sparse", 1]),
        ("quik", ["--group-size", 64]),
        ("adadim", ["--group-axis", "out"]),
        ("squeezellm", ["--symmetric"]),
        ("kllm", ["--table", "matrix", "--sparse", 1]),
        ("lnq", ["--nested-from", 3]),
        ("rtn", ["--exact"]),
        ("gptq", ["--int8-tables"]),
        ("adadim", ["--two-level"]),
        ("squeezellm", ["--two-level"]),
    ):
        assert option[-2 if len(option) > 1 else -1] in refused(capsys, *words, method, *option)
    assert "has no Hessian to guide" in refused(capsys, *words, "rtn", "--guided")
    assert "has 32 inputs" in refused(capsys, *words, "quik", "--outliers", 40)
    code, out, err = run(capsys, *words, "quik", "--outliers", "101%")
    assert code == 2 and out == "" and "'101%' is not a percentage from 0 to 100" in err


def test_int8_tables_show_what_they_add_to_the_error(capsys, tiny_checkpoint, tmp_path) -> None:
    words = ["quantize", tiny_checkpoint, "--out", tmp_path / "o", "--method", "squeezellm", "--int8-tables"]
    assert "not snapped to int8" in refused(capsys, *words, "--nested-from", 3, "--sparse", 0)
    words += ["--act-bits", 8, "--sparse", 0, "--samples", 2, "--seq-len", 16]
    words += ["--rule", "*.mlp.*=none", "--rule", "*.[kvo]_proj.weight=none"]  # layers of one shape: compiled once
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    snapping = json.loads(out)["int8_tables"]
    assert 0 < snapping["mean_error_before"] <= snapping["mean_error"] * (1 + 1e-3) < 1
    assert snapping["layer"].startswith("layers.") and snapping["layer_error"] > snapping["layer_error_before"]
    code, out, _ = run(capsys, "inspect", tmp_path / "o", "--json")
    row = next(row for row in json.loads(out)["layers"] if row["path"] == snapping["layer"])
    assert code == 0 and row["kind"] == "codebook 4-bit, int8 table" and row["spec"] == "w4a8-codebook-int8"
    assert row["float_table_error"] == snapping["layer_error_before"]
    code, out, _ = run(capsys, "inspect", tmp_path / "o")
    assert code == 0 and "before int8 tables" in out and f"{snapping['layer_error_before']:.2e}" in out


def test_two_level_scales_are_one_word_away(capsys, tiny_checkpoint, text_file, tmp_path) -> None:
    words = ["quantize", tiny_checkpoint, "--out", tmp_path / "o", "--method", "gptq", "--two-level", "--act-bits", 8]
    assert "5 bits, whose multiples leave int8" in refused(capsys, *words, "--bits", 5)
    assert "one scale a row" in refused(capsys, *words, "--group-size", -1)
    assert "groups of outputs" in refused(capsys, *words, "--group-axis", "out")
    words += ["--bits", 4, "--group-size", 16, "--calibration", text_file, "--samples", 3, "--seq-len", 24]
    code, out, err = run(capsys, *words, "--json")
    assert code == 0 and "w4a8-g16-sym-twolevel" in err
    assert json.loads(out)["notes"] == []
    code, out, _ = run(capsys, "inspect", tmp_path / "o", "--json")
    rows = [row for row in json.loads(out)["layers"] if row["spec"] is not None]
    assert code == 0 and len(rows) == 21 and {row["spec"] for row in rows} == {"w4a8-g16-sym-twolevel"}
    words = ["eval", tmp_path / "o", "--text", text_file, "--seq-len", 64, "--max-windows", 2, "--json"]
    code, out, err = run(capsys, *words)
    assert code == 0 and np.isfinite(json.loads(out)["perplexity"]), err


def test_bad_sources_are_refused(capsys, tiny_checkpoint, tmp_path) -> None:
    def changed(name: str, change) -> Path:
        copy = tmp_path / name
        shutil.copytree(tiny_checkpoint, copy)
        change(copy)
        return copy

    def edit_config(**values):
        def change(copy: Path) -> None:
            config = json.loads((copy / "config.json").read_text()) | values
            (copy / "config.json").write_text(json.dumps(config))

        return change

    def poison(copy: Path) -> None:
        tensors = load_file(copy / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"] = np.full_like(
            tensors["model.layers.1.mlp.up_proj.weight"], np.nan
        )
        save_file(tensors, copy / "model.safetensors")

    def truncate(copy: Path) -> None:
        file = copy / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    def see(source: object) -> str:
        return refused(capsys, "quantize", source, "--out", tmp_path / "out", "--method", "rtn")

    assert "does not exist" in see(tmp_path / "nowhere")
    assert "mamba" in see(changed("a", edit_config(model_type="mamba", architectures=["MambaForCausalLM"])))
    assert "spiral" in see(changed("b", edit_config(rope_scaling={"rope_type": "spiral", "factor": 2.0})))
    assert "surprise" in see(changed("c", edit_config(surprise=1)))
    assert "layers.1.mlp.up_proj.weight" in see(changed("d", poison))
    assert "model.safetensors" in see(changed("e", truncate))
    assert "safetensors" in see(changed("f", lambda copy: (copy / "model.safetensors").unlink()))
    assert not (tmp_path / "out").exists()


def test_altered_checkpoints_are_refused(capsys, quantized, text_file, tmp_path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy)
    document = json.loads((copy / checkpoint.SIDECAR).read_text())
    document["format_version"] = 99
    (copy / checkpoint.SIDECAR).write_text(json.dumps(document))
    assert "99" in refused(capsys, "eval", copy, "--text", text_file)
    (copy / checkpoint.SIDECAR).unlink()
    assert checkpoint.SIDECAR in refused(capsys, "inspect", copy)


def test_no_space_left_writes_nothing(capsys, monkeypatch, tiny_checkpoint, tmp_path) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28), "weights")

    monkeypatch.setattr(checkpoint, "write_arrays", full)
    code, out, err = run(capsys, "quantize", tiny_checkpoint, "--out", tmp_path / "o", "--method", "rtn")
    assert code == 1 and "no space left" in err.lower() and "Traceback" not in err
    assert not (tmp_path / "o").exists()


def test_json_is_the_last_line_and_progress_goes_to_standard_error(capsys, tiny_checkpoint, tmp_path) -> None:
    code, out, err = run(capsys, "quantize", tiny_checkpoint, "--out", tmp_path / "o", "--method", "rtn", "--json")
    assert code == 0 and len(out.splitlines()) == 1
    assert json.loads(out)["layers"] == 21 and "loading" in err


def test_plot_is_a_picture(capsys, quantized, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    code, _, _ = run(capsys, "inspect", quantized, "--plot", tmp_path / "p.png")
    assert code == 0 and (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
