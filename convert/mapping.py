"""One engine that moves any checkpoint into our parameters, or says everything that is wrong with it.

Three things meet here:

- a *target*: the abstract tree of the model (`jax.eval_shape`), flattened to `{path: ShapeDtypeStruct}` with paths such
  as `layers.0.self_attn.q_proj.weight`;
- a *table* of `Rule`s: source name -> our path, with an optional transform; `{}` stands for the layer's number, so a
  table reads both ways (a missing parameter can be named as the source would have called it);
- a *reader*: what the file's headers say (`infos`) and one tensor at a time (`read`).

`match` compares names, shapes and dtypes from the headers, before any tensor is read, and collects every error into
one ValueError. `load_into` then streams: read -> transform -> cast -> check finite -> hand to JAX -> drop, so the host
holds the model plus one tensor's temporaries. Matrices are [N, K] (out, in) on both sides; transforms reorder entries
and never change a shape, which is what lets the headers decide.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import ml_dtypes
import numpy as np

Model = TypeVar("Model")

_MAX_LINES = 20
# Elements looked at in one go when values are checked: bounds the temporary to 2 MiB whatever the tensor's size.
_CHUNK = 1 << 18
# JAX takes a host buffer with this alignment over instead of copying it, where the device is the host.
_ALIGNMENT = 64
# The bits of the exponent; a float is inf or NaN exactly when all of them are set.
_EXPONENT = {
    np.dtype(np.float64): (np.uint64, 0x7FF0000000000000),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor: shape with [N, K] order, the source's name of its type, bytes stored.

    `is_float` is False for integers, booleans and 8-bit floats: no converter here takes those for weights.
    """

    shape: tuple[int, ...]
    dtype: str
    stored_bytes: int
    is_float: bool = True


class TensorReader(Protocol):
    """One opened checkpoint, of any file format."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its source name, from headers alone."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor, in the shape `infos` told; float16, bfloat16, float32 or float64."""
        ...

    def sample(self, name: str, count: int) -> bytes:
        """The first `count` stored bytes of the tensor (fewer where it is smaller)."""
        ...


@dataclasses.dataclass(frozen=True)
class Rule:
    """`source` becomes `target` through `transform` (same shape in and out); `{}` is the layer's number in both.

    A rule with `target` None names a tensor that is dropped on purpose. Two rules may share a target: then the second
    tensor is a copy (a tied output head stored anyway) and must equal the first.
    """

    source: str
    target: str | None
    transform: Callable[[np.ndarray], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One tensor to read: where from, where to. `is_copy`: compare with what is there instead of writing it."""

    source: str
    target: str
    transform: Callable[[np.ndarray], np.ndarray] | None
    is_copy: bool


def path_string(key_path: Iterable[Any]) -> str:
    """JAX key path -> `layers.0.self_attn.q_proj.weight` (the trailing `.value` of a Param is dropped)."""
    parts = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in key_path]
    return ".".join(parts[:-1] if parts and parts[-1] == "value" else parts)


def raise_all(what: str, errors: list[str]) -> None:
    """Raises one ValueError of at most 20 error lines under a heading, when there are errors at all."""
    if not errors:
        return
    lines = errors[:_MAX_LINES]
    if len(errors) > _MAX_LINES:
        lines.append(f"... and {len(errors) - _MAX_LINES} more")
    raise ValueError(f"{what}:\n  " + "\n  ".join(lines))


def _expand(rules: Iterable[Rule], num_layers: int) -> dict[str, Rule]:
    table = {}
    for rule in rules:
        for layer in range(num_layers) if "{}" in rule.source else (0,):
            target = None if rule.target is None else rule.target.replace("{}", str(layer))
            source = rule.source.replace("{}", str(layer))
            table[source] = Rule(source, target, rule.transform)
    return table


def match(
    target: Mapping[str, jax.ShapeDtypeStruct],
    infos: Mapping[str, TensorInfo],
    rules: Iterable[Rule],
    num_layers: int,
    name: str,
) -> list[Assignment]:
    """Pairs every parameter with its source tensor, from headers alone.

    Raises one ValueError that lists every missing, unexpected, misshaped and non-float tensor of `name`.
    """
    table = _expand(rules, num_layers)
    sources_of: dict[str, list[Rule]] = {}
    for rule in table.values():
        if rule.target is not None and rule.target in target:
            sources_of.setdefault(rule.target, []).append(rule)
    errors, assignments = [], []
    for path, leaf in target.items():
        candidates = sources_of.get(path, [])
        present = [rule for rule in candidates if rule.source in infos]
        if not present:
            known = " or ".join(rule.source for rule in candidates) or "no source name is known for it"
            errors.append(f"missing: {path} {list(leaf.shape)} ({known})")
        for position, rule in enumerate(present):
            info = infos[rule.source]
            if info.shape != tuple(leaf.shape):
                errors.append(f"misshaped: {rule.source} is {list(info.shape)}, expected {list(leaf.shape)}")
            if not info.is_float:
                errors.append(f"not a float type: {rule.source} is {info.dtype}; only unquantized weights are read")
            assignments.append(Assignment(rule.source, path, rule.transform, is_copy=position > 0))
    for source in infos:
        rule = table.get(source)
        if rule is None or (rule.target is not None and rule.target not in target):
            errors.append(f"unexpected: {source} {list(infos[source].shape)}")
    raise_all(f"{name} does not fit its own configuration", errors)
    return assignments


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array for a tensor on its way into a model, aligned so that the CPU backend need not copy it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def read_array(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of a file, from byte `offset` on, in memory of its own. ValueError where the file ends too early."""
    out = empty(shape, dtype)
    with path.open("rb") as file:
        file.seek(offset)
        if file.readinto(out.reshape(-1).view(np.uint8).data) != out.nbytes:
            raise ValueError(f"{path} ends before byte {offset + out.nbytes}; was it changed while it was read?")
    return out


def count_nonfinite(array: np.ndarray) -> int:
    """How many entries are NaN or infinite; memory beyond the array is bounded by 2 MiB."""
    word, mask = _EXPONENT[array.dtype]
    bits = np.ascontiguousarray(array).reshape(-1).view(word)
    mask = word(mask)
    return sum(
        int(np.count_nonzero((bits[start : start + _CHUNK] & mask) == mask)) for start in range(0, bits.size, _CHUNK)
    )


def _cast(array: np.ndarray, dtype: np.dtype, source: str, errors: list[str]) -> np.ndarray:
    """To `dtype`; notes NaN and infinity, telling what the file holds from what the cast made."""
    bad = count_nonfinite(array)
    if bad:
        errors.append(f"not finite: {source} has {bad} NaN or infinite values of {array.size}")
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        out = empty(array.shape, dtype)
        out[...] = array
    if not bad and (bad := count_nonfinite(out)):
        errors.append(f"too large for {dtype.name}: {source} has {bad} values beyond its range; use a wider dtype")
    return out


def load_into(
    abstract: Model, reader: TensorReader, rules: Iterable[Rule], num_layers: int, dtype: Any, name: str
) -> Model:
    """Fills an abstract model (any pytree of ShapeDtypeStruct) from a checkpoint, tensor by tensor, in `dtype`.

    Raises ValueError as `match` does, and, after all tensors were read, one that names every tensor with NaN or
    infinite values (and how many), every value too large for `dtype`, and every copy that differs from its original.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    target = {path_string(path): leaf for path, leaf in flat}
    assignments = match(target, reader.infos(), rules, num_layers, name)
    dtype = np.dtype(dtype)
    leaves: dict[str, jax.Array] = {}
    errors: list[str] = []
    for item in sorted(assignments, key=lambda item: item.is_copy):
        array = reader.read(item.source)
        if item.transform is not None:
            array = item.transform(array)
        array = _cast(array, dtype, item.source, errors)
        if not item.is_copy:
            # device_put may keep an aligned buffer where jnp.asarray copies. Waiting keeps one transfer in flight:
            # they are asynchronous and hold their host buffers until done.
            leaves[item.target] = jax.block_until_ready(jax.device_put(array))
        elif not np.array_equal(np.asarray(leaves[item.target]), array):
            errors.append(
                f"differs: {item.source} should be a copy of {item.target} because the configuration ties them "
                "(tie_word_embeddings); set it to false if the two are really separate"
            )
        del array
    raise_all(f"{name} holds values that cannot be used", errors)
    return jax.tree_util.tree_unflatten(treedef, [leaves[path] for path in target])
