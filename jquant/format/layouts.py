"""Layouts: the orders in which the arrays of a packed weight may lie, and the way between them.

    "stream"     codes uint32 [N, ceil(K*bits/32)], scales [N, G] ("in") or [G, K] ("out"), codebook [N or 1, 2**bits]:
                 the canonical order, the only one in a checkpoint (`pallas_kernels.packing` draws it)
    "stream_t"   codes, scales and codebook transposed: consecutive output rows in consecutive lanes, for a CPU
    "fragments"  codes uint32 [ceil(N/64), ceil(K/64), bits, 128] as the tensor core of a Hopper GPU takes them
                 (`pallas_kernels.fragments` draws it); scales [G, N'], zeros uint8 [G, N'] unpacked, N' = N rounded up
                 to 64, and multiples are laid out like scales. Groups of inputs only

`jquant.prepare` chooses; a layout is made once, after loading. Everything that reads a packed weight asks here.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from pallas_kernels.fragments import TILE, fragments_from_stream, stream_from_fragments
from pallas_kernels.packing import pack_codes, unpack_codes

if TYPE_CHECKING:
    from jquant.format.weights import AffineWeight, CodebookWeight

LAYOUTS = ("stream", "stream_t", "fragments")


def words(weight: "AffineWeight | CodebookWeight") -> jax.Array:
    """The codes as stream words [N, W], whatever the layout."""
    if weight.layout == "fragments":
        return stream_from_fragments(weight.codes, weight.bits, _order(weight), weight.shape)
    return weight.codes if weight.layout == "stream" else weight.codes.T


def grid_scales(weight: "AffineWeight") -> jax.Array:
    """scales in their canonical orientation: [N, G] for "in", [G, K] for "out"."""
    if weight.layout == "fragments":
        return weight.scales[:, : weight.shape[0]].T
    return weight.scales if weight.layout == "stream" else weight.scales.T


def affine_zeros(weight: "AffineWeight") -> jax.Array | None:
    """Integer zeros, uint8, shaped like `grid_scales`; None when symmetric."""
    rows, columns = weight.shape
    if weight.zeros is None:
        return None
    if weight.layout == "fragments":
        return weight.zeros[:, :rows].T
    if weight.group_axis == "in":
        return unpack_codes(weight.zeros, weight.bits, rows).T
    return unpack_codes(weight.zeros, weight.bits, columns)


def with_layout(weight: Any, layout: str) -> Any:
    """The same AffineWeight or CodebookWeight in another layout. ValueError for fragments where there are none."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; expected one of {', '.join(LAYOUTS)}")
    if weight.layout == layout:
        return weight
    if weight.layout != "stream":
        weight = _canonical(weight)
    if layout == "stream":
        return weight
    if layout == "stream_t":
        return dataclasses.replace(weight, layout=layout, codes=weight.codes.T, **_transposed(weight))
    codes = fragments_from_stream(weight.codes, weight.bits, _order(weight), weight.shape[1])
    if _is_codebook(weight):
        return dataclasses.replace(weight, layout=layout, codes=codes)
    if weight.group_axis != "in":
        raise ValueError("a weight with groups of outputs has no fragments; only groups of inputs do")
    zeros, multiples = affine_zeros(weight), weight.multiples
    return dataclasses.replace(
        weight,
        layout=layout,
        codes=codes,
        scales=_whole_tiles(weight.scales.T),
        zeros=None if zeros is None else _whole_tiles(zeros.T),
        multiples=None if multiples is None else _whole_tiles(multiples.T),
    )


def _canonical(weight: Any) -> Any:
    if weight.layout == "stream_t":
        return dataclasses.replace(weight, layout="stream", codes=weight.codes.T, **_transposed(weight))
    codes = words(weight)
    if _is_codebook(weight):
        return dataclasses.replace(weight, layout="stream", codes=codes)
    zeros = affine_zeros(weight)
    packed = None if zeros is None else pack_codes(zeros.T, weight.bits)
    return dataclasses.replace(weight, layout="stream", codes=codes, scales=grid_scales(weight), zeros=packed)


def _transposed(weight: "AffineWeight | CodebookWeight") -> dict[str, jax.Array]:
    name = "codebook" if _is_codebook(weight) else "scales"
    return {name: getattr(weight, name).T}


def _whole_tiles(values: jax.Array) -> jax.Array:
    return jnp.pad(values, ((0, 0), (0, -values.shape[1] % TILE)))


def _is_codebook(weight: "AffineWeight | CodebookWeight") -> bool:
    return hasattr(weight, "codebook")  # the classes themselves import this module


def _order(weight: "AffineWeight | CodebookWeight"):
    return "rows" if _is_codebook(weight) else "pairs"
