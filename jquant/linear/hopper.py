"""The products of the Pallas kernels on a Hopper GPU.

    y = base(q(transform(x)))  +  kept columns  +  sparse entries          [M, N]

The base is multiplied in packed form, in the layout "fragments" that `jquant.prepare` makes; nothing of the weight's
size is decoded to memory. Integer activations are quantized first, each token by itself, with the kept columns split
off in the same pass, and lie in the order of the 8-bit tensor-core operand. Kept columns are multiplied in the kernel
of the base, on top of its sums, if they were prepared for the type of the tokens. Sparse entries are added to the
decoded weights, or have a product of their own, beside kept columns and where they do not fit the units of the decoder;
what is added to the base is added to float32 sums. One 16-bit token is multiplied as three tokens of 8 bits, beside
which weights take fewer instructions. One token becomes integers in the kernel of the base, if its length is a multiple
of 16: without a launch before it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jquant.format.activations import ActivationQuant
from jquant.format.rotation import rotate
from jquant.format.semistructured import SparseAffineWeight
from jquant.format.spec import TWO_LEVEL_BITS
from jquant.format.weights import (
    AffineWeight,
    CodebookWeight,
    OutlierColumns,
    QuantizedLinear,
    base_columns,
    is_snapped,
)
from jquant.linear import xla
from pallas_kernels import activation_quantize, affine_matmul, codebook_matmul, half_tokens, sparse_matmul
from pallas_kernels.device import no_hopper

Packed = AffineWeight | CodebookWeight

# Up to so many tokens sparse entries have a product of their own. Measured on an H200, 28672 x 8192 and 0.45 % of them,
# microseconds over those of the base alone, 3 bits with tables, by themselves and inside its product, where one token
# has 16-bit operands:
#     tokens       1      8     16     64    256    2048
#     base        30.6   39.1   42.1   70.2   154   1179
#     by row       2.9   10.8   17.9   48.2   186   1452
#     inside      20.3   18.7   18.6   13.6     9     52
ROWS_TOKENS = 16
# Beyond so many tokens the tensor core multiplies 16-bit activations no faster by packed weights than by dense ones.
# Measured (bench/results/matmul.md): 0.70 to 1.17 of their speed at 256 tokens, 0.75 to 1.05 beyond, most near 1; the
# worst are small matrices with sparse entries. XLA alone gives 0.54 with groups and entries, 0.8 with a scale a row.
DENSE_TOKENS = 128
# Up to so many tokens scales in two levels gain nothing: multiplying group sums takes less time than multiplying codes.
# Measured, 28672 x 8192, microseconds at 1, 32, 64 and 2048 tokens of 8 bits: 29.2, 36.1, 37.9 and 742 for groups as
# they are, 31.2, 36.2, 35.5 and 599 in two levels; of 16 bits 29.5, 44.1, 53.7 and 1215, and 31.5, 44.6, 51.6 and 1177.
GROUPED_TOKENS = 32
# A 16-bit token of more inputs takes less time if a launch splits it than if every multiprocessor does for itself: 30.5
# and 32.8 us beside 3-bit tables of 8192 x 28672; and beside groups less in 16 bits, 33.6 and 34.2.
SPLIT_INPUTS = 16384


def no_fragments(layer: QuantizedLinear) -> str | None:
    """None if `jquant.prepare` gives the layer the layout of the kernels, else the reason why it does not."""
    base, act = layer.weight, layer.activation
    if isinstance(base, SparseAffineWeight):
        return "no kernel covers a 2:4 pattern"
    if isinstance(base, AffineWeight) and base.group_axis != "in":
        return "no kernel covers groups of outputs"
    if layer.residual is not None and layer.residual.values.dtype != jnp.float16:
        return f"sparse entries are {layer.residual.values.dtype}; the kernel takes float16"
    if layer.residual is not None and layer.residual.columns.dtype != jnp.uint16:
        return f"{layer.residual.shape[1]} inputs; the kernel of sparse entries takes 65536"
    if act is not None and act.codebook is not None:
        return "no kernel covers activations by a table"
    if act is not None and act.outlier_percent:
        return "no kernel keeps activations exactly in each token"
    if act is not None and isinstance(base, CodebookWeight) and not is_snapped(base):
        return (
            "no kernel multiplies integer activations by a table of 16-bit entries; "
            "a table of int8 entries has one (w4a8-codebook-int8)"
        )
    if not base.shape[1]:
        return "every input column is kept: there is no packed part"
    return _supported(base, act, 1, "bfloat16")


def takes_multiples(base: Packed) -> bool:
    """Whether the kernel multiplies codes by the scales of groups, if these are whole multiples of a step a row."""
    if isinstance(base, CodebookWeight) or _group_size(base) is None:
        return False
    return base.zeros is None and base.bits <= TWO_LEVEL_BITS


def no_tiles(layer: QuantizedLinear) -> str | None:
    """None if the kernel of the base can add the layer's sparse entries, else the reason for a product of their own."""
    if layer.outliers is not None:
        return "kept columns are no part of the base"
    assert not isinstance(layer.weight, SparseAffineWeight)
    return _supported(layer.weight, layer.activation, 1, "bfloat16", entry_words=32)


def entry_type(base: Packed, dtype: str) -> str:
    """The type of sparse entries that are added to the weights beside 16-bit tokens of `dtype`: of float16, where that
    serves, the sum with a weight keeps more."""
    return "float16" if is_snapped(base) or (isinstance(base, AffineWeight) and base.fits_half) else dtype


def operand_of(base: Packed, problem: affine_matmul.Problem) -> str:
    """The type in which the tensor core multiplies the tokens of a problem. bfloat16 tokens become float16 beside int8
    tables, and where weights are rounded, which costs an eighth in float16, if they fit: by the scales of groups, or
    with sparse entries added."""
    if problem.x_dtype != "bfloat16":
        return problem.x_dtype
    if is_snapped(base):
        return "float16"
    fits = isinstance(base, AffineWeight) and base.fits_half
    rounded = problem.entry_words or affine_matmul.rounds_weights(problem)
    return "float16" if fits and rounded else "bfloat16"


def table_scales(base: CodebookWeight, dtype: str) -> jax.Array | None:
    """The scale of every row that goes with the table beside tokens of `dtype`: with the factors of the prepared table
    in bfloat16, or without them where the table is made on the fly and exact."""
    return base.scales if dtype != "bfloat16" or base.table_scales is None else base.table_scales


def no_kernel(layer: QuantizedLinear, tokens: int, dtype: DTypeLike) -> str | None:
    """None if `product` serves the layer for so many tokens of such a type, else the reason why it does not."""
    if reason := no_hopper() or no_fragments(layer):
        return reason
    rest, name = layer.residual, jnp.dtype(dtype).name
    if layer.weight.layout != "fragments" or (rest is not None and rest.by_row is None and rest.by_tile is None):
        return "the weight is not in the kernels' layout: call jq.prepare(model) once after loading"
    if not tokens:
        return "there are no tokens"
    assert not isinstance(layer.weight, SparseAffineWeight)
    tiles = _tiles(layer, tokens, name)
    if tiles is not None and tiles.dtype != entry_type(layer.weight, name):
        return f"sparse entries were prepared for {tiles.dtype}, activations are {name}"
    return _supported(layer.weight, layer.activation, tokens, name, _words(tiles))


def describe(layer: QuantizedLinear, tokens: int, dtype: DTypeLike) -> str:
    """What `product` does, in words."""
    base, act, name = layer.weight, layer.activation, jnp.dtype(dtype).name
    assert not isinstance(base, SparseAffineWeight)
    tiles, inside = _tiles(layer, tokens, name), _columns_inside(layer, tokens, name)
    problem = _problem(base, act, tokens, name, _words(tiles), inside)
    own = _own_token(problem, act, layer.outliers, name)
    problem = own or problem
    if isinstance(base, CodebookWeight):
        config = codebook_matmul.choose(problem, 1 if is_snapped(base) else 2)
    else:
        config = affine_matmul.choose(problem)
    inputs = name if problem.x_dtype == name else f"{name} as {problem.x_dtype}"
    inputs = f"{name} in {problem.pieces} pieces of 8 bits" if problem.pieces > 1 else inputs
    inputs = inputs if act is None else f"{act.bits}-bit codes"
    inputs += " made in the kernel" if own else ""
    codes = f"{base.bits}-bit codes" + (" into an int8 table" if is_snapped(base) else "")
    codes += " times whole scales" if problem.two_level else ""
    columns = entries = ""
    if layer.outliers is not None:
        columns = ", kept columns " + ("inside the product" if inside else "beside it")
    if layer.residual is not None:
        entries = ", sparse entries " + ("by row" if tiles is None else "added to the weights")
    shared = ", the last ones shared" if config.stream_k or config.cluster > 1 else ""
    blocks = f"blocks of {config.rows} outputs x {config.block_m} tokens{shared}"
    bound = ""
    if problem.x_bytes == 2 and tokens > DENSE_TOKENS:
        bound = "; so many 16-bit tokens take about as long as by dense weights, on small matrices up to 1.4 times"
    elif problem.x_bytes == 1 and tokens > GROUPED_TOKENS and takes_multiples(base) and not problem.two_level:
        bound = "; with scales in two levels (-twolevel in the spec) groups would cost next to no time"
    return f"{codes} by {inputs}, {blocks}{columns}{entries}{bound}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, layer: QuantizedLinear, out_dtype: DTypeLike) -> jax.Array:
    """x [M, K] -> [M, N], without the bias; `no_kernel` must have been asked. Gradients are those of `xla.product`."""
    base, act, kept, rest = layer.weight, layer.activation, layer.outliers, layer.residual
    if layer.transform is not None:
        x = rotate(x, layer.transform)
    tiles = _tiles(layer, x.shape[0], x.dtype.name)
    by_row = None if rest is None or tiles is not None else rest.by_row
    inside = _columns_inside(layer, x.shape[0], x.dtype.name) > 0
    kind = out_dtype if (kept is None or inside) and by_row is None else jnp.float32
    assert not isinstance(base, SparseAffineWeight)
    inputs, beside = x, None
    more: dict[str, Any] = {"entries": tiles}
    if act is not None:
        inputs, beside, more = _integers(x, base, act, kept)
    elif kept is not None:
        inputs, beside = x[:, base_columns(kept.index, base.shape[1])], x[:, kept.index]
    if kept is not None and inside:
        more["kept"] = (beside, kept.fragments)
    y = _base(inputs, base, kind, **more)
    if kept is not None and beside is not None and not inside:
        y = y + xla.dense(beside, kept.weight)
    if by_row is not None:
        y = sparse_matmul.add_rows(y, x, by_row, out_dtype=out_dtype)
    return y.astype(out_dtype)


def _forward(x: jax.Array, layer: QuantizedLinear, out_dtype: DTypeLike):
    return product(x, layer, out_dtype), (x, layer)


def _backward(out_dtype: DTypeLike, saved: tuple[jax.Array, QuantizedLinear], cotangent: jax.Array):
    _, pull = jax.vjp(lambda x, layer: xla.product(x, layer).astype(out_dtype), *saved)
    return pull(cotangent)


product.defvjp(_forward, _backward)


def _integers(
    x: jax.Array, base: Packed, act: ActivationQuant, kept: OutlierColumns | None
) -> tuple[jax.Array, jax.Array | None, dict[str, Any]]:
    """The codes of quantized inputs, the inputs that were kept, and what the base's product must know of the codes."""
    columns, index = (None, None) if kept is None else (kept.slots, kept.index)
    count = 0 if kept is None else kept.index.shape[0]
    if _own_token(_problem(base, act, x.shape[0], x.dtype.name, 0), act, kept, x.dtype.name):
        return x, None, {"quantize": act.bits}
    in_one = activation_quantize.supported(x.shape[0], x.shape[1], count, x.dtype, act.bits) is None
    quantize = activation_quantize.quantize_rows if in_one else activation_quantize.quantize
    tokens = quantize(x, columns, index, bits=act.bits, symmetric=act.symmetric, mode=act.mode)
    more: dict[str, Any] = {"x_scales": tokens.scales}
    if tokens.offsets is not None:
        more |= {"x_offsets": tokens.offsets, "row_sums": base.row_sums}
    return tokens.codes, tokens.kept, more


def _base(x: jax.Array, base: Packed, out_dtype: DTypeLike, **more: Any) -> jax.Array:
    if isinstance(base, CodebookWeight):
        return _codebook(x, base, out_dtype, **more)
    return _affine(x, base, out_dtype, **more)


def _affine(x: jax.Array, base: AffineWeight, out_dtype: DTypeLike, **more: Any) -> jax.Array:
    problem = _problem(base, None, x.shape[0], x.dtype.name, _words(more.get("entries")), _columns(more.get("kept")))
    if "quantize" not in more:
        if problem.pieces > 1:
            more["pieces"] = problem.pieces
        elif problem.x_dtype != x.dtype.name:
            x, more["x_scales"] = half_tokens.convert(x)
    more |= {"bits": base.bits, "outputs": base.shape[0], "group_size": _group_size(base), "out_dtype": out_dtype}
    if problem.two_level:
        assert base.multiples is not None
        return affine_matmul.affine_matmul(x, base.codes, base.multiples, steps=base.steps, **more)
    return affine_matmul.affine_matmul(x, base.codes, base.scales, base.zeros, **more)


def _codebook(x: jax.Array, base: CodebookWeight, out_dtype: DTypeLike, **more: Any) -> jax.Array:
    dtype = "int8" if "quantize" in more else x.dtype.name
    tables, scales = base.tables, table_scales(base, dtype)
    problem = _problem(base, None, x.shape[0], dtype, _words(more.get("entries")), _columns(more.get("kept")))
    if problem.pieces > 1:
        more["pieces"] = problem.pieces
        if _own_token(problem, None, None, dtype) is None:
            x, more["x_scales"] = codebook_matmul.split_row(x)
        if not is_snapped(base):
            tables, scales = base.byte_tables, base.byte_scales
    elif problem.x_dtype != dtype:
        x, more["x_scales"] = half_tokens.convert(x)
    elif not is_snapped(base) and x.dtype != jnp.bfloat16:  # float16 entries are exact
        tables = codebook_matmul.prepare_tables(base.codebook, x.dtype)
    assert tables is not None
    more |= {"bits": base.bits, "outputs": base.shape[0], "out_dtype": out_dtype}
    return codebook_matmul.codebook_matmul(x, base.codes, tables, scales, **more)


def _group_size(base: AffineWeight) -> int | None:
    return None if base.group_size >= base.shape[1] else base.group_size


def _tiles(layer: QuantizedLinear, tokens: int, dtype: str) -> sparse_matmul.EntryTiles | None:
    """The sparse entries if the base's product is to add them."""
    rest = layer.residual
    if rest is None or rest.by_tile is None:
        return None
    assert not isinstance(layer.weight, SparseAffineWeight)
    other = rest.by_tile.dtype != entry_type(layer.weight, dtype)
    by_row = rest.by_row is not None and (tokens <= ROWS_TOKENS or other)
    return None if by_row else rest.by_tile


def _columns_inside(layer: QuantizedLinear, tokens: int, dtype: str) -> int:
    """The kept columns that the base's product is to add, 0 if they have a product of their own. A token in pieces is
    not what they multiply, and beside a table the pieces gain more."""
    kept = layer.outliers
    if kept is None or kept.fragments is None or kept.fragments.dtype != dtype:
        return 0
    base = layer.weight
    if isinstance(base, CodebookWeight) and _problem(base, layer.activation, tokens, dtype, 0).pieces > 1:
        return 0
    return kept.index.shape[0]


def _columns(kept: affine_matmul.Kept | None) -> int:
    return 0 if kept is None else kept[0].shape[1]


def _words(tiles: sparse_matmul.EntryTiles | None) -> int:
    return 0 if tiles is None else tiles.slots.shape[-1]


def _in_pieces(base: Packed, problem: affine_matmul.Problem) -> bool:
    """Whether a 16-bit token becomes three of 8 bits. Not with anything beside the base in its product."""
    if problem.entry_words or problem.kept_columns:
        return False
    if isinstance(base, AffineWeight):  # a launch for it would take longer than the pieces gain
        pieces = dataclasses.replace(problem, x_dtype="int8", pieces=codebook_matmul.PIECES)
        return _own_token(pieces, None, None, problem.x_dtype) is not None and affine_matmul.supported(pieces) is None
    if not is_snapped(base) and base.byte_tables is None:
        return False
    return codebook_matmul.supported_pieces(problem.tokens, problem.inputs, problem.x_dtype) is None


def _own_token(
    problem: affine_matmul.Problem, act: ActivationQuant | None, kept: OutlierColumns | None, dtype: str
) -> affine_matmul.Problem | None:
    """The same product of a token of `dtype` that the kernel itself quantizes or splits; None if it takes a launch."""
    if problem.tokens != 1 or problem.x_dtype != "int8" or dtype == "int8":
        return None
    if act is not None and (kept is not None or not act.symmetric):
        return None
    if problem.pieces > 1 and problem.inputs > SPLIT_INPUTS:
        return None
    own = dataclasses.replace(problem, token_dtype=dtype, token_bits=8 if act is None else act.bits)
    return own if affine_matmul.no_own_token(own) is None else None


def _supported(base: Packed, act: ActivationQuant | None, tokens: int, dtype: str, entry_words: int = 0) -> str | None:
    problem = _problem(base, act, tokens, dtype, entry_words)
    if isinstance(base, CodebookWeight):
        return codebook_matmul.supported(problem)
    return affine_matmul.supported(problem)


def _problem(
    base: Packed, act: ActivationQuant | None, tokens: int, dtype: str, entry_words: int, kept_columns: int = 0
) -> affine_matmul.Problem:
    table = isinstance(base, CodebookWeight)
    two_level = not table and base.multiples is not None and tokens > GROUPED_TOKENS
    problem = affine_matmul.Problem(
        tokens=tokens,
        outputs=base.shape[0],
        inputs=base.shape[1],
        bits=base.bits,
        group_size=None if table else _group_size(base),
        has_zeros=not table and base.zeros is not None,
        x_dtype=dtype if act is None else "int8",
        scale_dtype="float32" if table else "uint8" if two_level else base.scales.dtype.name,
        entry_words=entry_words,
        kept_columns=kept_columns,
    )
    if act is None and _in_pieces(base, problem):
        planes = 1 if is_snapped(base) else 2
        return dataclasses.replace(problem, x_dtype="int8", pieces=codebook_matmul.PIECES, planes=planes)
    return dataclasses.replace(problem, x_dtype=operand_of(base, problem))
