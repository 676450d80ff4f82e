"""y = x . W^T for affine weights in packed codes, on the tensor core of a Hopper GPU, for any number of tokens.

    W[n, k] = scales[g(k), n] * (codes[n, k] - zeros[g(k), n])          zeros None: 2**(bits - 1)

    16-bit x:   y[m, n] = sum_k x[m, k] * W[n, k]  (* x_scales[m])       float32 sums, weights exact
    8-bit x:    y[m, n] = x_scales[m] * sum_k x[m, k] * W[n, k] + x_offsets[m] * row_sums[n],
                row_sums[n] = sum_k W[n, k]; sums of codes are exact, and scaled in float32
                of one token, the kernel itself can make x and x_scales, or three rows of x that stand for it

    kept columns, inputs and weights of 16 bits apart from those, are added to either before y is rounded:
                y[m, n] += sum_c kept_x[m, c] * kept_W[n, c]

The same packed words serve all of them: `pallas_kernels.fragments`, order "pairs"; 8-bit x comes in `slot_order`.
The weights are decoded in registers, so the tensor core reads no decoded weight from memory (the idea of Marlin,
arXiv 2408.11743, with `wgmma`, whose register operand they are: outputs are the rows of the product, tokens its
columns, and few tokens waste nothing).

Scales of groups may come in two levels: whole multiples of a step a row (`two_level`). Then the codes are multiplied by
them, exactly, and sums are of the whole row.

With groups and more tokens than a warpgroup can keep group sums of, weights are scaled in the type of x, which rounds
them: by up to 2**-8 in bfloat16, 2**-11 in float16, for which few scales are too large or too small (`fits_half`).

`affine_matmul` is the product, `supported` says whether a shape has it, `choose` which configuration it gets.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.affine_matmul.choice import choose as choose, rounds_weights as rounds_weights
from pallas_kernels.affine_matmul.config import (
    Config as Config,
    Problem as Problem,
    no_own_token as no_own_token,
    supported as supported,
    supported_config as supported_config,
)
from pallas_kernels.affine_matmul.half_range import entries_fit_half as entries_fit_half, fits_half as fits_half
from pallas_kernels.affine_matmul.launch import (
    Kept as Kept,
    check_entries,
    check_kept,
    check_own_token,
    check_tokens,
    launch,
)
from pallas_kernels.affine_matmul.two_level import split_scales as split_scales
from pallas_kernels.fragments import fragments_shape
from pallas_kernels.sparse_matmul import EntryTiles


def affine_matmul(
    x: jax.Array,
    words: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    bits: int,
    outputs: int,
    group_size: int | None = None,
    x_scales: jax.Array | None = None,
    x_offsets: jax.Array | None = None,
    row_sums: jax.Array | None = None,
    entries: EntryTiles | None = None,
    kept: Kept | None = None,
    quantize: int | None = None,
    pieces: int = 1,
    steps: jax.Array | None = None,
    out_dtype: Any = None,
    config: Config | None = None,
) -> jax.Array:
    """y [M, outputs], of `out_dtype` (that of 16-bit x; bfloat16 for 8-bit x); equations in the module.

    x [M, K] bfloat16, float16, or int8 codes in slot order; words uint32 [ceil(N/64), ceil(K/64), bits, 128];
    scales [G, N] float32, bfloat16 or float16, zeros [G, N] whole numbers 0..255; G = ceil(K / group_size), 1 for
    None. With 8-bit x, zeros are at most 2**bits and scales of groups below 2**27. x_offsets [M] or [M, 1] and row_sums
    [N] float32 go with 8-bit x, x_scales [M] or [M, 1] float32 with any. entries, with 16-bit x: sparse entries added
    to W, each divided by the scale of its place, of the type of x. kept: inputs [M, k] of kept columns and their
    weights, from `pallas_kernels.kept_columns`, of the same type; x_scales are not theirs. quantize: the kernel itself
    makes 8-bit x of one 16-bit token, symmetric codes of so many bits and their scale, and nothing else goes with the
    token; those of `pallas_kernels.activation_quantize`, without a launch of its own. pieces, 3: it becomes three rows
    of digits, as `codebook_matmul.split_row` makes them, whose sums are of 24 bits. steps [N]: then scales of groups
    are uint8 multiples of these, 16 at most; both from `split_scales`. Rows of `scales` and `zeros` of
    groups that are no multiple of 64 long are padded here, a copy: pad them once beforehand.
    ValueError with the reason where there is no kernel, or `config` does not fit.
    """
    tokens, inputs = x.shape
    groups = 1 if group_size is None else -(-inputs // group_size)
    if (steps is not None) != (scales.dtype == jnp.uint8) or (steps is not None and steps.shape != (outputs,)):
        shape = None if steps is None else list(steps.shape)
        raise ValueError(f"scales are {scales.dtype}, steps {shape}; expected uint8 with steps [{outputs}], or floats")
    _check(inputs, words, scales, zeros, bits, outputs, groups)
    check_tokens(tokens, outputs, x_scales, x_offsets, row_sums)
    if zeros is not None and group_size is None:  # zeros belong to groups: the row is one, longer than any block
        group_size = 1 << max(inputs - 1, 2**14).bit_length()
    words_each, columns = check_entries(entries, outputs, x), check_kept(kept, tokens, outputs)
    kinds = x.dtype.name, scales.dtype.name
    problem = Problem(tokens, outputs, inputs, bits, group_size, zeros is not None, *kinds, words_each, **columns)
    if quantize is not None or pieces > 1:
        problem = dataclasses.replace(problem, pieces=pieces, **check_own_token(x, x_scales, x_offsets, quantize))
    if reason := supported(problem):
        raise ValueError(f"no affine kernel: {reason}")
    config = choose(problem) if config is None else config
    if reason := supported_config(problem, config):
        raise ValueError(f"{config} does not fit: {reason}")
    out_dtype = jnp.dtype(out_dtype or (jnp.bfloat16 if x.dtype == jnp.int8 else x.dtype))

    weight = {"words": words}
    if steps is not None:
        weight |= {"scales": _whole_tiles(scales), "row_scales": steps}
    elif group_size is None:
        # As they are, padded or not: the kernel reads any type of float, and a conversion is a launch of its own.
        weight["row_scales"] = scales.reshape(-1)
    else:
        weight["scales"] = _whole_tiles(scales)
        if zeros is not None:
            weight["zeros"] = _whole_tiles(zeros.astype(jnp.uint8))
    if entries is not None:
        weight |= {"slots": entries.slots, "overflow": entries.overflow}
    return launch(problem, config, x, weight, x_scales, x_offsets, row_sums, out_dtype, kept=kept)


def _whole_tiles(values: jax.Array) -> jax.Array:
    return jnp.pad(values, ((0, 0), (0, -values.shape[1] % 64)))


def _check(
    inputs: int, words: jax.Array, scales: jax.Array, zeros: jax.Array | None, bits: int, outputs: int, groups: int
) -> None:
    shape = fragments_shape((outputs, inputs), bits)
    if words.shape != shape:
        raise ValueError(f"words has shape {list(words.shape)}; expected {list(shape)}")
    padded = -(-outputs // 64) * 64
    for name, array in (("scales", scales), ("zeros", zeros)):
        if array is not None and (array.shape[0] != groups or array.shape[1] not in (outputs, padded)):
            raise ValueError(
                f"{name} has shape {list(array.shape)}; expected [{groups}, {outputs}] or padded, [{groups}, {padded}]"
            )
