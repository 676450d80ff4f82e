"""Rotary settings of a Hugging Face config.json -> `rope_theta` and `RopeScaling`.

Two spellings exist. transformers 4 writes `rope_theta` and `rope_scaling` (null, or an object with "type" or
"rope_type"); transformers 5 writes `rope_parameters` with all of it inside. Both are read, a name or a kind that is not
known is refused, and what an absent entry means follows transformers' `modeling_rope_utils`:
`original_max_position_embeddings` defaults to the model's `max_position_embeddings`, a null yarn `factor` to the ratio
of the two.
"""

from typing import Any

from jquant.models import RopeScaling

_SCALE = {"factor": "factor"}
_ORIGINAL = {"original_max_position_embeddings": "original_positions"}
# For each kind: config.json's name -> our field. Nothing else may stand beside them.
_FIELDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": _SCALE,
    "dynamic": _SCALE | _ORIGINAL,
    "llama3": _SCALE | _ORIGINAL | {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
    "yarn": _SCALE
    | _ORIGINAL
    | {name: name for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")},
}
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}
_NOT_SCALING = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def rope_from_json(
    values: dict[str, Any], default_theta: float, max_positions: int, errors: list[str]
) -> tuple[float, RopeScaling]:
    """(rope_theta, scaling) from the attributes `rope_theta`, `rope_scaling`, `rope_parameters` that config.json has.

    Appends to `errors`, naming the attribute and its value, instead of raising.
    """
    parameters = values.get("rope_scaling") or values.get("rope_parameters") or {}
    where = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    if not isinstance(parameters, dict):
        errors.append(f"{where} = {parameters!r} is not an object")
        return default_theta, RopeScaling()
    if any(isinstance(value, dict) for value in parameters.values()):
        errors.append(f"{where} = {parameters!r} differs between kinds of layers, which is not supported")
        return default_theta, RopeScaling()
    theta = parameters.get("rope_theta", values.get("rope_theta", default_theta))
    if not _is_number(theta) or theta <= 0:
        errors.append(f"rope_theta = {theta!r} is not a positive number")
        theta = default_theta
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        errors.append(
            f"{where}.partial_rotary_factor = {parameters['partial_rotary_factor']!r} is not supported; only 1.0 is"
        )
    return float(theta), _scaling(parameters, where, max_positions, errors)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scaling(parameters: dict[str, Any], where: str, max_positions: int, errors: list[str]) -> RopeScaling:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _FIELDS:
        errors.append(f"{where}.rope_type = {kind!r} is not supported; supported: {', '.join(_FIELDS)}")
        return RopeScaling()
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        if name in _NOT_SCALING:
            continue
        field = _FIELDS[kind].get(name)
        if field is None:
            errors.append(f"{where}.{name} = {value!r} is not known for rope_type {kind!r}")
        elif value is not None and not (isinstance(value, bool) if name == "truncate" else _is_number(value)):
            errors.append(f"{where}.{name} = {value!r} is not {'a boolean' if name == 'truncate' else 'a number'}")
        elif value is not None:
            found[field] = value if name == "truncate" else float(value)
    for name in _REQUIRED[kind]:
        if name not in found:
            errors.append(f"{where}.{name} is missing; rope_type {kind!r} needs it")
    if kind in ("llama3", "yarn"):
        found["original_positions"] = int(found.get("original_positions", max_positions))
    if kind == "dynamic":
        # transformers takes the model's own max_position_embeddings for this kind, whatever stands here.
        found["original_positions"] = max_positions
    if kind == "yarn":
        found.setdefault("factor", max_positions / max(found["original_positions"], 1))
    if found.get("factor", 1.0) < 1.0:
        errors.append(f"{where}.factor = {found['factor']!r} is below 1, which would shrink the context")
    return RopeScaling(kind=kind, **found)
