"""From a checked product to the kernel and back: padding, what goes with the tokens, and sums of split inputs."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.affine_matmul.config import Config, Problem
from pallas_kernels.affine_matmul.kernel import affine_kernel
from pallas_kernels.affine_matmul.warpgroup import Decoder
from pallas_kernels.kept_columns import KeptFragments, kept_shape
from pallas_kernels.sparse_matmul import EntryTiles, entry_tiles_shape

Kept = tuple[jax.Array, KeptFragments]  # inputs [M, k] of 16 bits, and their weights


def launch(
    problem: Problem,
    config: Config,
    x: jax.Array,
    weight: dict[str, jax.Array],
    x_scales: jax.Array | None,
    x_offsets: jax.Array | None,
    row_sums: jax.Array | None,
    out_dtype: Any,
    decoder: Decoder | None = None,
    kept: Kept | None = None,
) -> jax.Array:
    """y [M, N] in `out_dtype`. weight: the arrays of the weight, named as in `affine_kernel`; x as given, unpadded, and
    so the inputs of kept columns."""
    tokens, inputs = x.shape
    if x.dtype == jnp.int8 and inputs % 16:
        raise ValueError(
            f"8-bit x has {inputs} columns, slots come in blocks of 16; pad x with zeros before ordering it"
        )
    padding = -tokens % 8 if tokens > 8 else 0
    arrays = {
        "words": weight["words"],
        "x": x if problem.token_dtype else jnp.pad(x, ((0, padding), (0, -inputs % problem.x_columns))),
        **{name: array for name, array in weight.items() if name != "words"},
    }
    if kept is not None:
        beside, fragments = kept
        arrays["kept_words"] = fragments.words
        arrays["kept_x"] = jnp.pad(beside, ((0, padding), (0, -beside.shape[1] % 64)))
    if x_scales is not None:
        arrays["x_scales"] = x_scales.reshape(-1).astype(jnp.float32)
    offset = None
    if x_offsets is not None and row_sums is not None:
        offset = x_offsets.reshape(-1).astype(jnp.float32), row_sums.astype(jnp.float32)
        if config.splits == 1:
            arrays["x_offsets"], arrays["row_sums"] = offset
    if config.splits == 1:
        return affine_kernel(problem, config, arrays, out_dtype, decoder)[0]
    y = jnp.sum(affine_kernel(problem, config, arrays, jnp.dtype(jnp.float32), decoder), axis=0)
    if offset is not None:
        y = y + offset[0][:, None] * offset[1][None, :]
    return y.astype(out_dtype)


def check_own_token(
    x: jax.Array, x_scales: jax.Array | None, x_offsets: jax.Array | None, quantize: int | None
) -> dict[str, Any]:
    """What a `Problem` says of a token that the kernel quantizes to so many bits, or in pieces: None. ValueError if
    something else is said about it."""
    if x_scales is not None or x_offsets is not None:
        raise ValueError("the kernel makes the scale of the token that it quantizes, and no offset; give neither")
    more = {} if quantize is None else {"token_bits": quantize}
    return {"x_dtype": "int8", "token_dtype": x.dtype.name, **more}


def check_tokens(
    tokens: int,
    outputs: int,
    x_scales: jax.Array | None,
    x_offsets: jax.Array | None,
    row_sums: jax.Array | None,
) -> None:
    """ValueError unless what goes with 8-bit tokens has their number, and row sums that of the outputs."""
    for name, array in (("x_scales", x_scales), ("x_offsets", x_offsets)):
        if array is not None and array.size != tokens:
            raise ValueError(f"{name} has {array.size} entries; expected one for each of the {tokens} tokens")
    if row_sums is not None and row_sums.shape != (outputs,):
        raise ValueError(f"row_sums has shape {list(row_sums.shape)}; expected {[outputs]}")
    if (x_offsets is None) != (row_sums is None):
        raise ValueError("x_offsets and row_sums go together; give both or none")


def check_kept(kept: Kept | None, tokens: int, outputs: int) -> dict[str, Any]:
    """What a `Problem` says of kept columns. ValueError unless they are for so many tokens and outputs, of one type."""
    if kept is None:
        return {}
    x, fragments = kept
    if x.ndim != 2 or x.shape[0] != tokens or not x.shape[1]:
        raise ValueError(f"inputs of kept columns have shape {list(x.shape)}; expected [{tokens}, k], k at least 1")
    if x.dtype.name != fragments.dtype:
        raise ValueError(
            f"kept columns are {fragments.dtype} and their inputs {x.dtype}; expected one type, prepare them for it"
        )
    if fragments.words.shape != (shape := kept_shape((outputs, x.shape[1]))):
        raise ValueError(f"words of kept columns have shape {list(fragments.words.shape)}; expected {list(shape)}")
    return {"kept_columns": x.shape[1], "kept_dtype": fragments.dtype}


def check_entries(entries: EntryTiles | None, outputs: int, x: jax.Array) -> int:
    """Words of a block of sparse entries, 0 without any. ValueError unless they are for such a weight and such x."""
    if entries is None:
        return 0
    blocks = entry_tiles_shape((outputs, x.shape[1]))
    if entries.slots.ndim != 3 or entries.slots.shape[:2] != blocks:
        raise ValueError(f"slots of entries have shape {list(entries.slots.shape)}; expected {[*blocks, 'words']}")
    if x.dtype.itemsize == 2 and entries.dtype != x.dtype.name:  # other types have no kernel
        raise ValueError(
            f"entries are {entries.dtype} and x is {x.dtype}; expected one type, prepare them for that of x"
        )
    return entries.slots.shape[2]
