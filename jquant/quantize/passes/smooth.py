"""SmoothQuant: part of the inputs' range moved into the weights, where a grid has room for it.

    W x = (W diag(s)) (x / s),     s_k = max|x_k|^alpha / max_n |W_nk|^(1 - alpha)          arXiv 2211.10438 eq. 4

x / s costs nothing at run time where whatever makes x can be divided instead: the gain of the norm before q, k, v or
gate, up; the rows of up_proj before down_proj, since the gate multiplies channel by channel; the rows of v_proj before
o_proj, since attention mixes tokens only. With alpha 1/2 and one reader, inputs and columns end with equal maxima.

A pure function of a concrete model (outside jit) with the paths of `decoder_paths`, nothing quantized yet. It computes
in float32 and rounds to the types of the leaves. Folding the norms undoes the smoothing of what they feed: to have
both, rotate first (`passes.rotate`), then measure, then smooth.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jquant.quantize.passes.decoder_paths import (
    DOWN,
    OUT,
    READERS,
    UP,
    VALUE,
    Model,
    scaled_columns,
    survey,
    with_leaves,
)

SMALLEST = 1e-5  # bounds s and the weights' maxima from below, as in the released code; its inverse bounds s from above


def smooth(
    model: Model,
    amax: Mapping[str, Any],
    alpha: float = 0.5,
    *,
    also: Sequence[Literal["o_proj", "down_proj"]] = (),
    head_dim: int | None = None,
) -> Model:
    """SmoothQuant: the range of each input channel shared out between the input and the weights that read it.

    amax: {path of a weight: max |x_k| over tokens, [K]}, measured on this very model; layers with a common input may
    all be there, or one of them. alpha 0 evens out the weights, 1 the inputs. What norms feed is always smoothed,
    through the gains. `also` smooths o_proj through v_proj's rows (one s for the query heads of a kv head; needs
    head_dim) and down_proj through up_proj's. A channel that never fires, amax 0, keeps s = 1.

    ValueError if an amax is missing, misshapen, negative or not finite, or a layer's input is rotated online.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; expected a number from 0 (all range stays in the inputs) to 1")
    if unknown := sorted(set(also) - {"o_proj", "down_proj"}):
        raise ValueError(f"also names {unknown}; expected o_proj, down_proj or nothing")
    if "o_proj" in also and head_dim is None:
        raise ValueError("smoothing o_proj ties the query heads of a kv head; give head_dim, the size of a head")
    view = survey(model)
    now = dict(view.leaves)

    def scales(consumers: Sequence[str], tie: tuple[int, int, int] | None = None) -> jax.Array:
        view.check_columns(consumers)
        heard = _loudest(amax, consumers, now[consumers[0]].shape[1])
        return _smoothing(heard, [now[path] for path in consumers], jnp.float32(alpha), tie)

    for prefix in view.blocks:
        # Rows first: dividing them changes the columns' maxima, by which the norms' readers are smoothed.
        if "down_proj" in also:
            s = scales([f"{prefix}{DOWN}.weight"])
            _divide_rows(now, prefix + UP, s)
            now[f"{prefix}{DOWN}.weight"] = scaled_columns(now[f"{prefix}{DOWN}.weight"], s)
        if "o_proj" in also and head_dim is not None:
            tie = view.heads(prefix, head_dim)
            s = scales([f"{prefix}{OUT}.weight"], tie)
            _divide_rows(now, prefix + VALUE, s)
            spread = jnp.repeat(s.reshape(tie[0], 1, tie[2]), tie[1], axis=1).reshape(-1)
            now[f"{prefix}{OUT}.weight"] = scaled_columns(now[f"{prefix}{OUT}.weight"], spread)
        for norm, readers in READERS.items():
            paths = [f"{prefix}{reader}.weight" for reader in readers]
            s = scales(paths)
            now[prefix + norm] = scaled_columns(now[prefix + norm], 1.0 / s)
            now |= {path: scaled_columns(now[path], s) for path in paths}
    return with_leaves(model, {path: leaf for path, leaf in now.items() if leaf is not view.leaves[path]})


@jax.jit
def _scaled_rows(W: jax.Array, scales: jax.Array) -> jax.Array:
    return (W.astype(jnp.float32).T * scales.astype(jnp.float32)).T.astype(W.dtype)


def _divide_rows(leaves: dict[str, jax.Array], layer: str, scales: jax.Array) -> None:
    """A layer's outputs divided by scales [N], its bias with them."""
    for name in (f"{layer}.weight", f"{layer}.bias"):
        if name in leaves:
            leaves[name] = _scaled_rows(leaves[name], 1.0 / scales)


def _loudest(amax: Mapping[str, Any], paths: Sequence[str], size: int) -> jax.Array:
    """The largest |input| [size] float32 of layers with a common input; ValueError unless it is one."""
    given = {path: np.asarray(amax[path], np.float32) for path in paths if path in amax}
    if not given:
        raise ValueError(f"amax has none of {list(paths)}; smoothing needs the largest |input| of each channel there")
    for path, values in given.items():
        if values.shape != (size,):
            raise ValueError(
                f"amax of {path} has shape {values.shape}; expected {(size,)}, one number an input channel"
            )
        if bad := int(np.sum(~np.isfinite(values) | (values < 0))):
            raise ValueError(
                f"amax of {path} has {bad} of {size} values that are negative or not finite; expected max |x| over "
                "tokens: calibrate again, in float32 if the activations overflow"
            )
    return jnp.asarray(np.max(list(given.values()), axis=0))


@partial(jax.jit, static_argnames=("tie",))
def _smoothing(
    heard: jax.Array, weights: list[jax.Array], alpha: jax.Array, tie: tuple[int, int, int] | None
) -> jax.Array:
    """s [K] float32 of inputs with maxima heard [K] read by weights [N, K]; [Hkv d] if channels of G heads are tied."""
    loud = jnp.max(jnp.stack([jnp.max(jnp.abs(W.astype(jnp.float32)), axis=0) for W in weights]), axis=0)
    if tie is not None:
        heard, loud = (jnp.max(values.reshape(tie), axis=1).reshape(-1) for values in (heard, loud))
    s = heard**alpha / jnp.maximum(loud, SMALLEST) ** (1.0 - alpha)
    return jnp.where(heard > 0, jnp.clip(s, SMALLEST, 1.0 / SMALLEST), 1.0)
