"""y = x . W^T for weights that are entries of a table, on the tensor core of a Hopper GPU, for any number of tokens.

    W[n, k] = codebook[n, codes[n, k]] * scales[n]                      one table a row, or one for the matrix

    16-bit x:   y[m, n] = sum_k x[m, k] * W[n, k]                       float32 sums, entries exact, scales last;
                                                                        tables of 16 bits an entry, or int8
    8-bit x:    y[m, n] = x_scales[m] * sum_k x[m, k] * W[n, k] + x_offsets[m] * row_sums[n],
                row_sums[n] = sum_k W[n, k]; the codebook is int8 and its int32 sum exact
    one token in pieces:
                y[0, n] = sum_j x_scales[j] * sum_k x[j, k] * W[n, k], as 8-bit x of three rows; the codebook is int8,
                or in fixed point of two int8, 256 h + l

The kernel is that of `pallas_kernels.affine_matmul` with another decoder: byte look-ups in registers
(`pallas_kernels.codebook_matmul.decode`). Words: `pallas_kernels.fragments`, order "rows"; 8-bit x comes in
`slot_order`. The non-uniform weights are those of SqueezeLLM (arXiv 2306.07629), whose kernel looks every one up in
shared memory. Tables of int8 entries take fewer instructions a weight; beside 16-bit x their operand is float16, and
bfloat16 x becomes float16 with an exact power of two a token first (`pallas_kernels.half_tokens`): here by XLA; callers
with few tokens do it themselves by `half_rows`, in one launch, and give the powers as x_scales. Of one token they make
int8 pieces instead (`split_row`, `pallas_kernels.codebook_matmul.token_pieces`): 1.38 instructions of the integer pipe
a weight of 4 bits, where float16 takes 1.88.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.affine_matmul.config import Config, Problem, supported_config
from pallas_kernels.affine_matmul.launch import Kept, check_entries, check_kept, check_own_token, check_tokens, launch
from pallas_kernels.codebook_matmul.choice import choose as choose, supported as supported
from pallas_kernels.codebook_matmul.decode import table_planes, table_words
from pallas_kernels.codebook_matmul.fixed_point import fixed_point_tables as fixed_point_tables
from pallas_kernels.codebook_matmul.rounding import rounded_tables as rounded_tables
from pallas_kernels.codebook_matmul.tables import TableDecoder
from pallas_kernels.codebook_matmul.token_pieces import (
    PIECES as PIECES,
    split_row as split_row,
    split_token as split_token,
    supported_pieces as supported_pieces,
)
from pallas_kernels.fragments import TILE, fragments_shape
from pallas_kernels.half_tokens import half_tokens
from pallas_kernels.sparse_matmul import EntryTiles


def prepare_tables(codebook: jax.Array, dtype: Any) -> jax.Array:
    """Tables [N or 1, 2**bits] as the kernel reads them: uint32 [planes, N padded to 64, or 1].

    dtype: of an entry, that of 16-bit x, to which entries are rounded (`rounded_tables` first makes little of that); or
    int8, for a codebook that is int8 and has its scale apart. Such tables serve x of any type.
    """
    if jnp.dtype(dtype) == jnp.int8 and codebook.dtype != jnp.int8:
        raise ValueError(
            f"tables of 8-bit entries need an int8 codebook, got {codebook.dtype}; snap it to a grid a row first"
        )
    planes = table_planes(codebook.astype(dtype))
    return planes if planes.shape[1] == 1 else jnp.pad(planes, ((0, 0), (0, -planes.shape[1] % TILE)))


def codebook_matmul(
    x: jax.Array,
    words: jax.Array,
    tables: jax.Array,
    scales: jax.Array | None = None,
    *,
    bits: int,
    outputs: int,
    x_scales: jax.Array | None = None,
    x_offsets: jax.Array | None = None,
    row_sums: jax.Array | None = None,
    entries: EntryTiles | None = None,
    kept: Kept | None = None,
    pieces: int = 1,
    quantize: int | None = None,
    out_dtype: Any = None,
    config: Config | None = None,
    multiplier: bool | None = None,
) -> jax.Array:
    """y [M, outputs], of `out_dtype` (that of 16-bit x; bfloat16 for 8-bit x); equations in the module.

    x [M, K] bfloat16, float16, or int8 codes in slot order; words uint32 [ceil(N/64), ceil(K/64), bits, 128]; tables
    from `prepare_tables`, of the dtype of x or of int8; scales [N] of 16 or 32 bits. x_offsets [M] or [M, 1] and
    row_sums [N] go with 8-bit x, x_scales [M] or [M, 1] with any. entries, with 16-bit x: sparse entries added to the
    looked-up weights, so divided by the scale of their row, of the type of x, or of float16 beside int8 tables. kept:
    inputs [M, k] of kept columns and their weights, as `affine_matmul` takes them, not beside pieces.
    pieces: rows of 8-bit x that are one token, from `split_row` with its scales as x_scales; M is 1 then, and x may be
    padded with zeros to a multiple of 128; tables are of int8 entries, or of 16 bits from `fixed_point_tables`, whose
    scales belong to `scales`. 1: every row is a token. One 16-bit token beside such tables becomes 8-bit x in the
    kernel itself, without x_scales: by `pieces`, those of `split_row`, or by `quantize`, symmetric codes of so many
    bits.
    multiplier: shift selectors by multiplications; None decides by the number of tokens.
    ValueError with the reason where there is no kernel, or `config` does not fit.
    """
    rows, inputs = x.shape
    own = quantize is not None or (pieces > 1 and x.dtype.itemsize == 2 and rows == 1)
    token: dict[str, Any] = check_own_token(x, x_scales, x_offsets, quantize) if own else {}
    x_dtype = jnp.dtype(token.get("x_dtype", x.dtype))
    if pieces > 1 and not own:
        _check_pieces(x, pieces, x_scales, x_offsets)
        inputs -= TILE if inputs == TILE * (words.shape[1] + 1) else 0
    tokens = rows if own else rows // pieces
    sizes = (1, 2) if pieces > 1 else (1, x_dtype.itemsize)
    entry_bytes = _check((outputs, inputs), words, tables, scales, bits, sizes)
    check_tokens(rows, outputs, x_scales, x_offsets, row_sums)
    out_dtype = jnp.dtype(out_dtype or (jnp.bfloat16 if x.dtype == jnp.int8 else x.dtype))
    if x_dtype == jnp.bfloat16 and entry_bytes == 1:
        x, powers = half_tokens(x)
        x_scales = powers if x_scales is None else powers * x_scales.reshape(-1).astype(jnp.float32)
    words_each = check_entries(entries, outputs, x)
    planes = max(1, entry_bytes // (1 if own else x.dtype.itemsize))
    facts = tokens, outputs, inputs, bits, None, False, x.dtype.name, "float32", words_each, pieces, planes
    problem = dataclasses.replace(Problem(*facts, **check_kept(kept, rows, outputs)), **token)
    if reason := supported(problem):
        raise ValueError(f"no codebook kernel: {reason}")
    config = choose(problem, entry_bytes) if config is None else config
    if reason := supported_config(problem, config):
        raise ValueError(f"{config} does not fit: {reason}")
    # With many tokens a warpgroup has hardly a register to spare, and waits for the tensor core in any case.
    multiplier = tokens <= 64 if multiplier is None else multiplier
    decoder = TableDecoder(bits, entry_bytes, problem.x_bytes, tables.shape[1], multiplier)
    weight = {"words": words, "tables": tables}
    if scales is not None:
        weight["row_scales"] = scales
    if entries is not None:
        weight |= {"slots": entries.slots, "overflow": entries.overflow}
    return launch(problem, config, x, weight, x_scales, x_offsets, row_sums, out_dtype, decoder, kept)


def _check_pieces(x: jax.Array, pieces: int, x_scales: jax.Array | None, x_offsets: jax.Array | None) -> None:
    """ValueError unless x is one token in so many pieces."""
    if x.dtype != jnp.int8 or x.shape[0] != pieces or x_scales is None or x_offsets is not None:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}; expected int8 [{pieces}, K], a token in {pieces} pieces, with x_scales "
            "and without x_offsets"
        )


def _check(
    shape: tuple[int, int],
    words: jax.Array,
    tables: jax.Array,
    scales: jax.Array | None,
    bits: int,
    sizes: tuple[int, int],
) -> int:
    """Bytes of a table's entry, one of `sizes`; ValueError for shapes that disagree with a weight of `shape`."""
    outputs = shape[0]
    shapes = [("words", words, fragments_shape(shape, bits)), ("scales", scales, (outputs,))]
    for name, array, shape in shapes:
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {list(array.shape)}; expected {list(shape)}")
    padded = -(-outputs // TILE) * TILE
    for entry_bytes in sizes:
        planes = table_words(bits, entry_bytes)
        if tables.shape in ((planes, 1), (planes, padded)):
            return entry_bytes
    planes = table_words(bits, sizes[-1])
    raise ValueError(
        f"tables have shape {list(tables.shape)}; expected [{planes}, 1] or [{planes}, {padded}], what "
        f"prepare_tables gives for entries of {8 * sizes[-1]} bits, or [{table_words(bits, 1)}, ...] for int8"
    )
