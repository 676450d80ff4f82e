"""One leaf taken apart into plain arrays and a JSON object, and put together again.

    leaf_arrays(leaf) -> ({"weight.codes": array, ...}, {"kind": "quantized_linear", "weight": {"kind": "affine", ...}})

The dataclasses of `jquant.format.weights` say all there is to know: an array-typed field is an array, a field of
another packed type is an object with a kind of its own, any other field is a static value. None is left out. A dense
array is the kind "dense" with one array named "array". Nothing in the object is ever evaluated: kinds come from a
fixed table, and every static value must have the type that its field declares.
"""

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jquant.format.activations import ActivationQuant
from jquant.format.rotation import Rotation
from jquant.format.semistructured import SparseAffineWeight
from jquant.format.validity import validate
from jquant.format.weights import (
    WEIGHT_TYPES,
    AffineWeight,
    CodebookWeight,
    OutlierColumns,
    QuantizedLinear,
    SparseResidual,
    Weight,
)

Leaf = Weight | jax.Array | np.ndarray

KINDS: dict[str, type] = {
    "affine": AffineWeight,
    "codebook": CodebookWeight,
    "outlier_columns": OutlierColumns,
    "sparse_affine": SparseAffineWeight,
    "sparse_residual": SparseResidual,
    "activation": ActivationQuant,
    "rotation": Rotation,
    "quantized_linear": QuantizedLinear,
}
_KIND_OF = {cls: kind for kind, cls in KINDS.items()}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")


def leaf_arrays(leaf: Leaf) -> tuple[dict[str, Any], dict[str, Any]]:
    """({dotted field: array}, static): `static` is JSON, has the "kind" and every static field."""
    if not dataclasses.is_dataclass(leaf):
        return {"array": leaf}, {"kind": "dense"}
    arrays: dict[str, Any] = {}
    return arrays, _take_apart(leaf, "", arrays)


def leaf_from_arrays(arrays: Mapping[str, Any], static: Any, path: str) -> Leaf:
    """The inverse of `leaf_arrays`. Arrays may be ShapeDtypeStructs: only shapes and types are looked at.

    ValueError names the path and the field that is missing, unknown, of the wrong type, or at odds with the others.
    """
    if isinstance(static, dict) and static.get("kind") == "dense":
        if set(static) != {"kind"} or set(arrays) != {"array"}:
            raise ValueError(f"{path}: a dense leaf has one array, 'array'; got {sorted(arrays)} and {static}")
        return arrays["array"]
    left = dict(arrays)
    leaf = _put_together(left, static, path, "", tuple(WEIGHT_TYPES))
    if left:
        raise ValueError(f"{path}: unknown arrays {sorted(left)} for the kind {static['kind']}")
    validate(leaf, path)
    return leaf


def check_name(name: str, path: str) -> None:
    """Names become directories: ValueError unless this one is a plain dotted name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            f"{path!r}: the name {name!r} cannot be stored; expected 1 to 200 letters, digits, '_', '-' and single dots"
        )


def _take_apart(node: Any, prefix: str, arrays: dict[str, Any]) -> dict[str, Any]:
    static: dict[str, Any] = {"kind": _KIND_OF[type(node)]}
    for name, (role, _) in _fields(type(node)).items():
        value = getattr(node, name)
        if value is None:
            continue
        if role == "array":
            arrays[prefix + name] = value
        elif role == "node":
            static[name] = _take_apart(value, f"{prefix}{name}.", arrays)
        else:
            static[name] = list(value) if isinstance(value, tuple) else value
    return static


def _put_together(arrays: dict[str, Any], static: Any, path: str, prefix: str, allowed: tuple[type, ...]) -> Any:
    """Takes what it uses out of `arrays`."""
    kinds = [_KIND_OF[cls] for cls in allowed]
    where = f"{path}: {prefix.rstrip('.') or 'leaf'}"
    if not isinstance(static, dict) or static.get("kind") not in kinds:
        kind = static.get("kind") if isinstance(static, dict) else static
        raise ValueError(f"{where} has the kind {kind!r}; expected one of {kinds + ['dense'] * (not prefix)}")
    cls = KINDS[static["kind"]]
    fields = _fields(cls)
    unknown = set(static) - {name for name, (role, _) in fields.items() if role != "array"} - {"kind"}
    if unknown:
        raise ValueError(f"{where} has the unknown static fields {sorted(unknown)}")
    values = {}
    for name, (role, hint) in fields.items():
        optional = type(None) in typing.get_args(hint)
        if role == "array":
            values[name] = arrays.pop(prefix + name, None)
        elif role == "node" and name in static:
            nested = tuple(option for option in (typing.get_args(hint) or (hint,)) if option in _KIND_OF)
            values[name] = _put_together(arrays, static[name], path, f"{prefix}{name}.", nested)
        else:
            values[name] = _static_value(static.get(name), hint, f"{path}: {prefix}{name}")
        if values[name] is None and not optional:
            raise ValueError(f"{path}: {prefix}{name} is missing; the kind {static['kind']} needs it")
    return cls(**values)


def _static_value(value: Any, hint: Any, where: str) -> Any:
    """The value as the field declares it; lists become tuples."""
    if value is None:
        return None
    if typing.get_origin(hint) is tuple:
        wanted = typing.get_args(hint)
        fits = isinstance(value, list) and len(value) == len(wanted)
        if fits and all(type(item) is kind for item, kind in zip(value, wanted, strict=True)):
            return tuple(value)
    elif typing.get_origin(hint) is typing.Literal:
        if value in typing.get_args(hint):
            return value
    else:
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if type(value) in options:  # exactly: a bool is not a whole number here
            return value
    raise ValueError(f"{where} is {value!r}; expected {_spelled(hint)}")


def _spelled(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


@functools.cache
def _fields(cls: type) -> dict[str, tuple[str, Any]]:
    """{field: (role, type)}, role "array", "node" (another packed type) or "static"."""
    roles = {}
    for name, hint in typing.get_type_hints(cls).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if jax.Array in options:
            roles[name] = ("array", hint)
        elif any(option in _KIND_OF for option in options if isinstance(option, type)):
            roles[name] = ("node", hint)
        else:
            roles[name] = ("static", hint)
    return roles
