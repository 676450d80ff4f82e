"""Every exact re-parametrisation of a decoder in one place, and the usual combinations by name.

    "rotate"           the stream offline, inputs of o_proj and down_proj online          QuaRot, arXiv 2404.00456
    "rotate-offline"   the stream and the values, nothing added at run time               SpinQuant, arXiv 2405.16406
    "smooth"           what norms feed, by the measured range of the inputs               SmoothQuant, arXiv 2211.10438

Each returns other weights for the same outputs, before anything is quantized; `passes.rotate` and `passes.smooth` say
how. To have both kinds, rotate first, then measure the rotated model's inputs, then smooth.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from jquant.quantize.passes.decoder_paths import Model, rotations
from jquant.quantize.passes.rotate import fold_norms, rotate_inputs, rotate_residual, rotate_values
from jquant.quantize.passes.smooth import smooth

__all__ = [
    "Kind",
    "fold_norms",
    "rotate_inputs",
    "rotate_residual",
    "rotate_values",
    "rotations",
    "smooth",
    "transform",
]

Kind = Literal["rotate", "rotate-offline", "smooth"]


def transform(
    model: Model,
    kind: Kind,
    *,
    seed: int = 0,
    head_dim: int | None = None,
    amax: Mapping[str, Any] | None = None,
    alpha: float = 0.5,
) -> Model:
    """One of the usual combinations by name.

    "rotate": the stream offline, inputs of o_proj and down_proj online (QuaRot).
    "rotate-offline": the stream and the values (needs head_dim); nothing is added at run time.
    "smooth": what norms feed (needs amax, as `smooth` does).
    """
    if kind == "rotate":
        return rotate_inputs(rotate_residual(model, seed), seed=seed)
    if kind == "rotate-offline":
        if head_dim is None:
            raise ValueError("the transform 'rotate-offline' turns values head by head; give head_dim, the size of one")
        return rotate_values(rotate_residual(model, seed), head_dim, seed)
    if kind == "smooth":
        if amax is None:
            raise ValueError("the transform 'smooth' needs amax, the largest |input| of each channel by layer path")
        return smooth(model, amax, alpha)
    raise ValueError(f"unknown transform {kind!r}; expected one of {', '.join(get_args(Kind))}")
