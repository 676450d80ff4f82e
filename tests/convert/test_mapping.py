"""The engine: every error at once, nothing wrong let through, memory bounded."""

import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert.mapping import Rule, TensorInfo, count_nonfinite, load_into, match, path_string, raise_all

REPOSITORY = Path(__file__).parents[2]


class Dictionary:
    """Tensors in memory, as a reader."""

    def __init__(self, tensors):
        self.tensors = tensors

    def infos(self):
        return {
            name: TensorInfo(array.shape, array.dtype.name, array.nbytes, array.dtype.kind in "fV")
            for name, array in self.tensors.items()
        }

    def read(self, name):
        return self.tensors[name]

    def sample(self, name, count):
        return self.tensors[name].tobytes()[:count]


RULES = (
    Rule("a.{}.w", "layers.{}.w"),
    Rule("t", "head", lambda array: array[::-1]),
    Rule("copy", "head"),
    Rule("old.{}", None),
)
ABSTRACT = {
    "layers": [{"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}, {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}],
    "head": jax.ShapeDtypeStruct((4,), jnp.float32),
}


def tensors():
    return {
        "a.0.w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a.1.w": np.ones((2, 3), np.float32),
        "t": np.arange(4, dtype=np.float32),
    }


def load(source, dtype=jnp.float32):
    return load_into(ABSTRACT, Dictionary(source), RULES, 2, dtype, "it")


def test_tensors_arrive_renamed_transformed_and_cast():
    model = load(tensors() | {"old.1": np.zeros(9, np.float32)}, jnp.bfloat16)
    assert jax.tree.structure(model) == jax.tree.structure(ABSTRACT)
    np.testing.assert_array_equal(np.asarray(model["layers"][0]["w"], np.float32), np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(np.asarray(model["head"], np.float32), [3, 2, 1, 0])
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(model))


def test_every_error_is_in_one_message():
    source = tensors() | {"b": np.zeros(1, np.float32), "a.2.w": np.zeros((2, 3), np.float32)}
    del source["t"]
    source["a.0.w"] = np.zeros((3, 2), np.float32)
    source["a.1.w"] = np.zeros((2, 3), np.int8)
    with pytest.raises(ValueError) as caught:
        load(source)
    text = str(caught.value)
    for part in (
        "missing: head [4] (t or copy)",
        "misshaped: a.0.w is [3, 2], expected [2, 3]",
        "not a float type: a.1.w is int8",
        "unexpected: b [1]",
        "unexpected: a.2.w [2, 3]",
    ):
        assert part in text
    assert len(text.splitlines()) == 6


def test_nothing_is_read_when_headers_are_wrong():
    class Unreadable(Dictionary):
        def read(self, name):
            raise AssertionError("read before the headers were checked")

    with pytest.raises(ValueError, match="unexpected: b"):
        load_into(ABSTRACT, Unreadable(tensors() | {"b": np.zeros(1, np.float32)}), RULES, 2, jnp.float32, "it")


def test_long_lists_are_cut():
    with pytest.raises(ValueError) as caught:
        raise_all("wrong", [f"error {i}" for i in range(50)])
    assert len(str(caught.value).splitlines()) == 22
    assert str(caught.value).endswith("... and 30 more")


def test_nonfinite_values_are_named_with_their_count_in_every_tensor():
    source = tensors()
    source["a.0.w"][0, 1:] = np.nan, np.inf
    source["t"][0] = -np.inf
    with pytest.raises(ValueError, match="t has 1 NaN(.|\n)*a.0.w has 2 NaN or infinite values of 6"):
        load(source)


def test_values_beyond_the_wanted_type_are_named():
    source = tensors()
    source["t"][1] = 1e6
    with pytest.raises(ValueError, match="too large for float16: t has 1 values"):
        load(source, jnp.float16)
    assert float(load(source, jnp.bfloat16)["head"][2]) == pytest.approx(1e6, rel=2**-8)


def test_a_copy_must_equal_its_original():
    source = tensors()
    assert load(source | {"copy": source["t"][::-1].copy()})["head"].shape == (4,)
    with pytest.raises(ValueError, match="differs: copy should be a copy of head"):
        load(source | {"copy": source["t"] + 1})


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_count_nonfinite_agrees_with_isfinite(dtype):
    values = np.array([0, -0.0, 1, -1e30, np.inf, -np.inf, np.nan, -np.nan, 6e4], np.float64)
    with np.errstate(over="ignore"):
        array = values.astype(dtype)
    assert count_nonfinite(array) == np.count_nonzero(~np.isfinite(array.astype(np.float64)))
    assert count_nonfinite(np.asfortranarray(np.full((3, 4), np.nan, dtype))[:, ::2]) == 6


def test_path_string_drops_the_value_of_a_param():
    flat, _ = jax.tree_util.tree_flatten_with_path({"layers": [{"w": 1}]})
    assert path_string(flat[0][0]) == "layers.0.w"
    key = jax.tree_util.GetAttrKey
    assert path_string((key("norm"), key("weight"), key("value"))) == "norm.weight"


def test_match_names_the_source_of_what_is_missing():
    target = {"layers.0.w": ABSTRACT["head"], "extra": ABSTRACT["head"]}
    with pytest.raises(ValueError, match=r"layers.0.w \[4\] \(a.0.w\)(.|\n)*extra \[4\] \(no source name"):
        match(target, {}, RULES, 1, "it")


# VmHWM, not getrusage's ru_maxrss: the latter is inherited across exec, so a large parent would hide the growth.
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's VmHWM")
def test_host_memory_stays_below_the_model_and_one_shard(tmp_path):
    # Eight shards of 25 MB in float32: the peak must stay below the model (200 MB) plus a shard (25 MB) plus 15 MB for
    # the allocator, thread stacks and code paged in by the first load. Loading all shards first would take 400 MB.
    script = """
        import json, sys
        from pathlib import Path
        import numpy as np
        from safetensors.numpy import save_file

        directory, part = Path(sys.argv[1]), sys.argv[2]
        shapes = {f"a.{i}.w": (1250, 5000) for i in range(8)}
        if part == "write":
            for i, (name, shape) in enumerate(shapes.items()):
                data = np.random.default_rng(i).normal(size=shape).astype(np.float32)
                save_file({name: data}, directory / f"{i}.safetensors")
            index = {"weight_map": {name: f"{i}.safetensors" for i, name in enumerate(shapes)}}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            import jax, jax.numpy as jnp
            from convert.mapping import Rule, load_into
            from convert.safetensors_file import SafetensorsReader

            def peak():
                status = Path("/proc/self/status").read_text()
                return int(status.split("VmHWM:")[1].split()[0])

            jax.block_until_ready(jnp.asarray(np.ones(3, np.float32)))
            before = peak()
            abstract = {"layers": [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes.values()]}
            rules = (Rule("a.{}.w", "layers.{}"),)
            model = load_into(abstract, SafetensorsReader(directory), rules, 8, jnp.float32, "it")
            jax.block_until_ready(model)
            print((peak() - before) * 1024 / 1e6)
    """
    for part in ("write", "read"):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), part],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
    growth = float(done.stdout)
    assert 190 < growth < 200 + 25 + 15
