"""Reading nested codebooks at any width they hold (Any-Precision LLM, arXiv 2402.10517).

    code at b bits = code at B bits >> (B - b)

A `CodebookWeight` of B bits with `nested` [N, 2**B - 2**b0] also holds the tables of b0 .. B - 1 bits, side by side,
narrowest first: table b begins at entry 2**b - 2**b0. One file serves every width from b0 to B.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jquant.format.weights import CodebookWeight, QuantizedLinear, canonical, codebook_weight, is_quantized, unpack


def widths(weight: CodebookWeight) -> range:
    """The widths that a weight can be read at, in bits; its own only if nothing is nested."""
    if weight.nested is None:
        return range(weight.bits, weight.bits + 1)
    return range((2**weight.bits - weight.nested.shape[1]).bit_length() - 1, weight.bits + 1)


def at_bits(weight: CodebookWeight, bits: int) -> CodebookWeight:
    """The weight read at one of its `widths`, packed anew without the other tables; ValueError for any other width."""
    held = widths(weight)
    if bits not in held:
        wanted = f"{held[0]}" if len(held) == 1 else f"{held[0]} to {held[-1]}"
        raise ValueError(f"the weight can be read at {wanted} bits, not at {bits}")
    weight = canonical(weight)  # pyright: ignore[reportAssignmentType]
    if bits == weight.bits:
        return dataclasses.replace(weight, nested=None)
    assert weight.nested is not None
    start = 2**bits - 2 ** held[0]
    table = weight.nested[:, start : start + 2**bits]
    return codebook_weight(unpack(weight) >> (weight.bits - bits), jnp.asarray(table), bits, weight.scales)


def narrow(tree: Any, bits: int) -> Any:
    """A whole model with every nested weight read at `bits`. ValueError if there is none, or the width is not held."""
    found = []

    def read(leaf: Any) -> Any:
        base = leaf.weight if isinstance(leaf, QuantizedLinear) else leaf
        if not isinstance(base, CodebookWeight) or base.nested is None:
            return leaf
        found.append(leaf)
        read_at = at_bits(base, bits)
        return dataclasses.replace(leaf, weight=read_at) if isinstance(leaf, QuantizedLinear) else read_at

    narrowed = jax.tree.map(lambda leaf: read(leaf) if is_quantized(leaf) else leaf, tree, is_leaf=is_quantized)
    if not found:
        raise ValueError("the model holds no nested codebooks: it has one width; quantize with --nested-from")
    return narrowed
