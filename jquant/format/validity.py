"""Whether a packed weight is what it says: every array's shape and type against the static fields."""

from typing import Any

from jquant.format.activations import validate_activation
from jquant.format.semistructured import SparseAffineWeight, validate_semistructured
from jquant.format.weights import CodebookWeight, QuantizedLinear, Weight, is_snapped, shape_of
from pallas_kernels.packing import num_words


def validate(weight: Weight, path: str) -> None:
    """Checks every array's shape and type against the static fields; ValueError names the field and the path."""
    if isinstance(weight, QuantizedLinear):
        validate(weight.weight, path)
        for name, array in (
            ("outliers.index", weight.outliers and weight.outliers.index),
            ("residual.values", weight.residual and weight.residual.values),
        ):
            if array is not None and len(array.shape) != 1:
                raise ValueError(f"{path}: {name} has shape {tuple(array.shape)}; expected one axis")
        rows, columns = shape_of(weight)
        if weight.outliers is not None:
            kept = weight.outliers.index.shape[0]
            _expect(path, "outliers.index", weight.outliers.index, (kept,), "int32")
            _expect(path, "outliers.weight", weight.outliers.weight, (rows, kept), None)
        if weight.residual is not None:
            rest, count = weight.residual, weight.residual.values.shape[0]
            if rest.shape != (rows, columns):
                raise ValueError(f"{path}: residual.shape is {rest.shape}; expected {(rows, columns)}")
            if rest.rows is not None:
                raise ValueError(f"{path}: residual.rows is present; a checkpoint holds residual.row_pointer only")
            _expect(path, "residual.values", rest.values, (count,), None)
            _expect(path, "residual.columns", rest.columns, (count,), "uint16" if columns <= 65536 else "int32")
            _expect(path, "residual.row_pointer", rest.row_pointer, (rows + 1,), "int32")
        if weight.bias is not None:
            _expect(path, "bias", weight.bias, (rows,), None)
        if weight.activation is not None:
            validate_activation(weight.activation, path)
        if weight.transform is not None and weight.transform.size != columns:
            raise ValueError(f"{path}: transform.size is {weight.transform.size}; expected the {columns} inputs")
        return
    if isinstance(weight, SparseAffineWeight):
        return validate_semistructured(weight, path)
    rows, columns = weight.shape
    if not 2 <= weight.bits <= 8:
        raise ValueError(f"{path}: bits is {weight.bits}; expected 2 to 8")
    if weight.layout != "stream":
        raise ValueError(f"{path}: layout is {weight.layout!r}; a checkpoint holds 'stream' only")
    _expect(path, "codes", weight.codes, (rows, num_words(columns, weight.bits)), "uint32")
    if isinstance(weight, CodebookWeight):
        if weight.codebook.shape[:1] not in ((1,), (rows,)):
            raise ValueError(f"{path}: codebook has {weight.codebook.shape[:1]} rows; expected 1 or {rows}")
        table_type = "int8" if is_snapped(weight) else None
        _expect(path, "codebook", weight.codebook, (weight.codebook.shape[0], 2**weight.bits), table_type)
        if is_snapped(weight) and (weight.scales is None or weight.nested is not None):
            raise ValueError(f"{path}: codebook is int8; expected scales beside it, and nothing nested")
        if weight.scales is not None:
            _expect(path, "scales", weight.scales, (rows,), None)
        if weight.nested is not None:
            allowed = [2**weight.bits - 2**narrowest for narrowest in range(2, weight.bits)]
            count = weight.nested.shape[-1]
            if count not in allowed:
                raise ValueError(f"{path}: nested has {count} entries a row; expected one of {allowed}")
            _expect(path, "nested", weight.nested, (rows, count), None)
        return
    for name in ("fits_half", "multiples", "steps"):
        if getattr(weight, name) is not None:
            raise ValueError(f"{path}: {name} is present; `jquant.prepare` adds it, a checkpoint has none")
    if weight.group_axis not in ("in", "out") or weight.group_size < 1:
        raise ValueError(f"{path}: group_axis {weight.group_axis!r}, group_size {weight.group_size} make no groups")
    along, across = (columns, rows) if weight.group_axis == "in" else (rows, columns)
    groups = -(-along // weight.group_size)
    _expect(path, "scales", weight.scales, (rows, groups) if weight.group_axis == "in" else (groups, columns), None)
    if weight.zeros is not None:
        _expect(path, "zeros", weight.zeros, (groups, num_words(across, weight.bits)), "uint32")


def _expect(path: str, name: str, array: Any, shape: tuple[int, ...], dtype: str | None) -> None:
    """Raises unless the array has the shape, and the type (None: any of the float types)."""
    if tuple(array.shape) != shape:
        raise ValueError(f"{path}: {name} has shape {tuple(array.shape)}; expected {shape}")
    wanted = (dtype,) if dtype else ("float32", "float16", "bfloat16")
    if str(array.dtype) not in wanted:
        raise ValueError(f"{path}: {name} is {array.dtype}; expected {' or '.join(wanted)}")
