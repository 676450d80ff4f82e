"""Checkpoints: exact round trips, the same bytes for the same content, a named reason for everything that is off."""

import errno
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.format import array_store, checkpoint
from jquant.format.layouts import with_layout
from jquant.format.leaves import leaf_arrays, leaf_from_arrays
from jquant.format.weights import (
    AffineWeight,
    CodebookWeight,
    OutlierColumns,
    QuantizedLinear,
    SparseResidual,
    affine_weight,
    codebook_weight,
)

HEADER = {"method": "rtn", "seed": 3, "model_config": {"rope_theta": 10000.0, "name": "läma"}, "report": [1, 2.5, None]}


def _affine(rows: int = 4, columns: int = 10, bits: int = 3, axis: Any = "in") -> AffineWeight:
    rng = np.random.default_rng(bits)
    groups = (rows, 3) if axis == "in" else (2, columns)
    size = 4 if axis == "in" else 3
    codes, zeros = (jnp.asarray(rng.integers(0, 2**bits, shape), jnp.uint8) for shape in ((rows, columns), groups))
    return affine_weight(codes, jnp.asarray(rng.normal(size=groups), jnp.float16), zeros, bits, size, axis)


def _codebook(rows: int = 4, columns: int = 10, bits: int = 2) -> CodebookWeight:
    rng = np.random.default_rng(bits)
    codes = jnp.asarray(rng.integers(0, 2**bits, (rows, columns)), jnp.uint8)
    return codebook_weight(codes, jnp.asarray(rng.normal(size=(rows, 2**bits)), jnp.bfloat16), bits)


def _int8_table() -> CodebookWeight:
    table = jnp.asarray(np.random.default_rng(7).integers(-127, 128, (4, 8)), jnp.int8)
    return codebook_weight(jnp.ones((4, 10), jnp.uint8), table, 3, jnp.ones(4, jnp.float16))


def _residual(columns: int, entries: int) -> SparseResidual:
    pointer = jnp.asarray([0, entries, entries, entries, entries], jnp.int32)
    return SparseResidual(
        jnp.arange(entries, dtype=jnp.float32), jnp.arange(entries).astype(jnp.uint16), pointer, (4, columns)
    )


def _model() -> dict[str, Any]:
    """One leaf of every kind; the second residual has no entry at all."""
    kept = OutlierColumns(jnp.asarray([1, 5], jnp.int32), jnp.ones((4, 2), jnp.float16))
    return {
        "embed.weight": jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.bfloat16),
        "layers.0.a.weight": QuantizedLinear(_codebook(), kept, _residual(12, 3), jnp.ones(4, jnp.float32)),
        "layers.0.b.weight": QuantizedLinear(_affine(), residual=_residual(10, 0)),
        "layers.0.c.weight": _affine(axis="out"),
        "layers.0.d.weight": _codebook(),
        "layers.0.e.weight": _int8_table(),
        "norm.weight": np.ones(6, np.float32),
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "model", _model(), HEADER)
    return tmp_path / "model"


def _edit(saved: Path, change: Any, rehash: bool = True) -> None:
    """Alters jquant.json as somebody would who also knows how to mend its checksum."""
    document = json.loads((saved / "jquant.json").read_text())
    change(document)
    if rehash:
        document["sha256"] = checkpoint._document_hash(document)
    (saved / "jquant.json").write_text(json.dumps(document))


def _rewrite_arrays(saved: Path, change: Any) -> None:
    """Replaces weights/ by an altered but healthy Orbax store."""
    model = _model()
    arrays = {
        f"{path}/{name}": np.asarray(array)
        for path, leaf in model.items()
        for name, array in leaf_arrays(leaf)[0].items()
        if array.size
    }
    change(arrays)
    (saved / "weights").rename(saved.parent / "old")
    array_store.write_arrays(saved / "weights", arrays)


def _files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _assert_same_leaf(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_round_trip_is_exact_for_every_kind(saved: Path) -> None:
    leaves, header = checkpoint.load(saved)
    assert header == HEADER == checkpoint.read_header(saved)
    model = _model()
    assert set(leaves) == set(model)
    for path, leaf in model.items():
        _assert_same_leaf(leaves[path], leaf)


def test_every_float_type_comes_back_bit_for_bit(tmp_path: Path) -> None:
    bits = np.arange(2**16, dtype=np.uint16)  # every bfloat16 and float16 there is, NaNs included
    given: dict[str, Any] = {str(dtype): bits.view(jnp.dtype(dtype)) for dtype in ("bfloat16", "float16")}
    given["scalar"] = np.float32(0.1).reshape(())
    checkpoint.save(tmp_path / "x", given, {})
    leaves: dict[str, Any] = checkpoint.load(tmp_path / "x")[0]
    for name, array in given.items():
        assert str(leaves[name].dtype) == str(array.dtype) and np.asarray(leaves[name]).tobytes() == array.tobytes()


def test_same_content_gives_the_same_bytes_in_every_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", _model(), HEADER)
    backwards = dict(reversed(_model().items()))
    checkpoint.save(tmp_path / "b", backwards, dict(reversed(HEADER.items())))
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


def test_plain_orbax_reads_the_weights(saved: Path) -> None:
    import orbax.checkpoint as ocp
    from etils import epath

    tree: Any = ocp.PyTreeCheckpointHandler(use_ocdbt=False).restore(epath.Path(saved / "weights"))
    np.testing.assert_array_equal(tree["norm.weight/array"], np.ones(6, np.float32))


def test_leaf_arrays_and_back_is_the_identity() -> None:
    for path, leaf in _model().items():
        arrays, static = leaf_arrays(leaf)
        _assert_same_leaf(leaf_from_arrays(arrays, json.loads(json.dumps(static)), path), leaf)
    arrays, static = leaf_arrays(_model()["layers.0.a.weight"])
    assert static["kind"] == "quantized_linear" and static["weight"]["kind"] == "codebook"
    assert {"weight.codes", "outliers.index", "residual.values", "bias"} <= set(arrays)


def test_int8_tables_need_scales_and_nothing_nested() -> None:
    arrays, static = leaf_arrays(_int8_table())
    nested = jnp.zeros((4, 4), jnp.float16)
    for changed in ({k: v for k, v in arrays.items() if k != "scales"}, arrays | {"nested": nested}):
        with pytest.raises(ValueError, match="codebook is int8; expected scales beside it, and nothing nested"):
            leaf_from_arrays(changed, static, "a")
    with pytest.raises(ValueError, match="codebook is int16; expected float32"):
        leaf_from_arrays(arrays | {"codebook": arrays["codebook"].astype(jnp.int16)}, static, "a")
    with pytest.raises(ValueError, match="has no scales"):
        codebook_weight(jnp.ones((4, 10), jnp.uint8), arrays["codebook"], 3)


def test_extra_files_travel_and_may_not_take_our_names(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", {}, {}, lambda folder: (folder / "tokenizer.json").write_text("{}"))
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}"
    assert checkpoint.load(tmp_path / "a") == ({}, {})
    with pytest.raises(ValueError, match="extra_files wrote jquant.json"):
        checkpoint.save(tmp_path / "b", {}, {}, lambda folder: (folder / "jquant.json").write_text("{}"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_nothing_reaches_the_terminal(tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np; from jquant.format import checkpoint as c;"
        "c.save(sys.argv[1], {'a.b': np.ones((2, 3), np.float32)}, {}); c.load(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "x"], capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == ""


# --- saving that must not happen, or not halfway ----------------------------------------------------------------


def test_existing_directory_is_refused_and_untouched(saved: Path) -> None:
    before = _files(saved)
    with pytest.raises(ValueError, match="model exists already; name a new directory"):
        checkpoint.save(saved, {}, {})
    assert _files(saved) == before


@pytest.mark.parametrize(
    ("leaves", "header", "message"),
    [
        ({"a.b": np.ones(3)}, {}, "a.b: array array is float64; expected one of"),
        ({"../evil": np.ones(3, np.float32)}, {}, "'../evil' cannot be stored"),
        ({"": np.ones(3, np.float32)}, {}, "the name '' cannot be stored"),
        ({}, {"loss": float("nan")}, "header cannot be written as JSON"),
        ({}, {"config": object()}, "header cannot be written as JSON"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_writing(
    tmp_path: Path, leaves: dict[str, Any], header: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path / "x", leaves, header)
    assert not list(tmp_path.iterdir())


def test_device_layouts_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a.weight: layout is 'stream_t'"):
        checkpoint.save(tmp_path / "x", {"a.weight": with_layout(_codebook(), "stream_t")}, {})


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("No space left on device")]
)
def test_full_disk_leaves_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(folder: Path, arrays: Any) -> None:
        folder.mkdir()
        (folder / "half").write_bytes(b"x")
        raise error

    monkeypatch.setattr(checkpoint, "write_arrays", full)
    with pytest.raises(OSError, match="no space left on the disk for .*MiB; nothing was written") as caught:
        checkpoint.save(tmp_path / "x", _model(), {})
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_disk_known_to_be_too_small_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="no space left on the disk"):
        checkpoint.save(tmp_path / "x", _model(), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["_flush", "write_arrays"])
def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "x", _model(), {})
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_save_do_no_harm(saved: Path) -> None:
    stale = saved.parent / "model.tmp-1-0"
    stale.mkdir()
    (stale / "weights").mkdir()
    checkpoint.load(saved)
    with pytest.raises(ValueError, match="has no jquant.json: it is not a jquant checkpoint, or only part of one"):
        checkpoint.load(stale)


# --- loading what is not right ----------------------------------------------------------------------------------


def test_header_is_read_without_arrays(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "read_arrays", None)
    assert checkpoint.read_header(saved)["method"] == "rtn"
    assert checkpoint.is_checkpoint(saved) and not checkpoint.is_checkpoint(saved.parent)


@pytest.mark.parametrize("part", ["weights", "jquant.json"])
def test_missing_part_is_named(saved: Path, part: str) -> None:
    (saved / part).rename(saved.parent / "elsewhere")
    with pytest.raises(ValueError, match=f"has no {part}"):
        checkpoint.load(saved)
    assert checkpoint.is_checkpoint(saved)


def _set(*keys: Any) -> Any:
    *where, last, value = keys

    def change(document: Any) -> None:
        for key in where:
            document = document[key]
        document[last] = value

    return change


_B = ("leaves", "layers.0.b.weight")
_STATIC = (*_B, "static")
_NORM = ("leaves", "norm.weight", "arrays", "array")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format_version", 2), "format_version 2, written by jquant .*upgrade"),
        (_set("format_version", True), "no whole-number format_version"),
        (_set("pickle", "x"), r"missing keys \[\], unknown keys \['pickle'\]"),
        (lambda document: document.pop("header"), r"missing keys \['header'\]"),
        (_set("leaves", []), "leaves is not a JSON object"),
        (_set("leaves", "../x", {}), "'../x' cannot be stored"),
        (_set(*_B, {}), r"layers.0.b.weight: missing keys \['arrays', 'static'\]"),
        (_set(*_STATIC, "kind", "os.system"), "layers.0.b.weight: leaf has the kind 'os.system'; expected one of"),
        (_set(*_STATIC, "weight", "bits", 4), "layers.0.b.weight: codes has shape"),
        (_set(*_STATIC, "weight", "bits", "3"), "layers.0.b.weight: weight.bits is '3'; expected int"),
        (_set(*_STATIC, "weight", "bits", True), "layers.0.b.weight: weight.bits is True; expected int"),
        (_set(*_STATIC, "weight", "bits", 99), "layers.0.b.weight: bits is 99; expected 2 to 8"),
        (_set(*_STATIC, "weight", "group_axis", "up"), "weight.group_axis is 'up'; expected .*in"),
        (_set(*_STATIC, "weight", "group_size", 2), "layers.0.b.weight: scales has shape"),
        (_set(*_STATIC, "weight", "shape", [4, 10, 1]), "weight.shape is"),
        (_set(*_STATIC, "weight", "layout", "stream_t"), "layout is 'stream_t'"),
        (_set(*_STATIC, "weight", "speed", 1), r"layers.0.b.weight: weight has the unknown static fields \['speed'\]"),
        (lambda d: d["leaves"]["layers.0.b.weight"]["static"]["weight"].pop("bits"), "weight.bits is missing"),
        (lambda d: d["leaves"]["layers.0.b.weight"]["arrays"].pop("weight.scales"), "weight.scales is missing"),
        (_set(*_B, "arrays", "extra", {"shape": [1], "dtype": "int8", "sha256": ""}), r"unknown arrays \['extra'\]"),
        (_set(*_B, "arrays", "weight.scales", "dtype", "int8"), "layers.0.b.weight: scales is int8; expected"),
        (_set(*_B, "arrays", "weight.scales", "dtype", "object"), "array weight.scales has dtype 'object'"),
        (_set(*_B, "arrays", "weight.scales", "shape", [4, -3]), r"array weight.scales has shape \[4, -3\]"),
        (_set(*_B, "arrays", "residual.values", "shape", []), "residual.values has shape"),
        # healthy in itself, but not what is stored
        (_set(*_NORM, "shape", [2, 3]), r"norm.weight: array array is stored with shape \[6\]"),
        (_set(*_NORM, "dtype", "float16"), "norm.weight: array array is stored with dtype float32"),
        (_set(*_NORM, "sha256", "0"), "norm.weight: array array .* does not match its checksum"),
    ],
)
def test_altered_json_is_refused_by_name(saved: Path, change: Any, message: str) -> None:
    _edit(saved, change)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(saved)


def test_json_that_nothing_else_catches_is_caught_by_its_checksum(saved: Path) -> None:
    _edit(saved, _set("header", "seed", 4), rehash=False)
    with pytest.raises(ValueError, match="does not match its own checksum"):
        checkpoint.read_header(saved)
    (saved / "jquant.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        checkpoint.load(saved)


def test_damaged_bytes_name_the_leaf(saved: Path) -> None:
    victim = saved / "weights" / "layers.0.b.weight" / "weight.codes" / "0.0"
    data = bytearray(victim.read_bytes())
    data[3] ^= 1
    victim.write_bytes(data)
    with pytest.raises(ValueError, match="layers.0.b.weight: array weight.codes .* does not match its checksum"):
        checkpoint.load(saved)
    victim.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="layers.0.b.weight: array weight.codes has 15 bytes on the disk; expected 16"):
        checkpoint.load(saved)


@pytest.mark.parametrize(("file", "message"), [("0.0", "has 0 bytes"), (".zarray", "is not in")])
def test_missing_array_file_names_the_leaf(saved: Path, file: str, message: str) -> None:
    (saved / "weights" / "layers.0.b.weight" / "weight.codes" / file).unlink()
    with pytest.raises(ValueError, match=f"layers.0.b.weight: array weight.codes {message}"):
        checkpoint.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("norm.weight/array"), "norm.weight: array array is not in"),
        (lambda a: a.update({"x/array": np.ones(1, np.int8)}), r"missing \[\], unknown \['x/array'\]"),
        (lambda a: a.update({"norm.weight/array": np.ones(6, np.float16)}), "stored with dtype float16"),
        (lambda a: a.update({"norm.weight/array": np.ones(7, np.float32)}), r"stored with shape \[7\]"),
        (lambda a: a.update({"norm.weight/array": np.zeros(6, np.float32)}), "does not match its checksum"),
    ],
)
def test_other_arrays_than_listed_are_refused(saved: Path, change: Any, message: str) -> None:
    _rewrite_arrays(saved, change)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(saved)
