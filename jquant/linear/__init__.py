"""The seam: y = linear(x, w), whatever w is. Nothing else chooses a kernel.

    y = decode(weight) . q(transform(x))  +  outliers  +  residual  +  bias

x [..., K]; w a dense array [N, K] or a packed pytree of `jquant.format.weights`; y [..., N] in x's type. Sums are
float32. q quantizes activations where the weight says so; kept columns and residual see transform(x) unquantized.
`implementation` None takes the best supported path, "xla" or "pallas" demands one; a demand that cannot be met is a
ValueError with the reason, never a silent fallback.

XLA paths, by device and tokens M:
    cpu, M <= 8     the packed words are streamed lane by lane, nothing decoded is stored (`dequant_matmul.streaming`)
    cpu, M > 8      one decoded matrix at a time, then a dense product
    gpu, tpu        decode and product in one expression, fused as far as XLA does
    integers        8-bit or narrower activations and affine codes: an int8 product summed in int32 (`int_matmul`)
The decode is tied to x by an optimization barrier: it depends on nothing but the weights, and XLA would otherwise
decode every layer at the start of the program, or once outside a generation loop, and hold all of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jquant.format import tree as trees
from jquant.format.activations import ActivationQuant, fake_quantize, quantize_tokens
from jquant.format.rotation import Transformed, rotate
from jquant.format.semistructured import SparseAffineWeight
from jquant.format.weights import (
    AffineWeight,
    CodebookWeight,
    QuantizedLinear,
    SparseResidual,
    affine_zeros,
    base_columns,
    bits_per_weight,
    canonical,
    dequantize,
    grid_scales,
    is_quantized,
    residual_rows,
    shape_of,
    size_bytes,
    transposed,
    with_rows,
    words,
)
from pallas_kernels import dequant_matmul, int_matmul, sparse_matmul
from pallas_kernels.device import platform
from pallas_kernels.packing import unpack_codes

Implementation = Literal["xla", "pallas"] | None
STREAMING_TOKENS = 8  # a guess, not tuned: work grows with tokens here, beyond it a decode pays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tap:
    """A dense weight that shows what passes: `linear(x, Tap(w, observe))` calls observe(x, y), y = x w^T without bias.

    `shift` [..., N] is added to y: its gradient is that of the layer's output. A tap lives inside one traced function,
    put there by whoever collects statistics, and never in a stored model.
    """

    weight: jax.Array
    observe: Callable[[jax.Array, jax.Array], None] = dataclasses.field(metadata={"static": True})
    shift: jax.Array | None = None


class Choice(NamedTuple):
    """The path that `linear` takes, and why."""

    implementation: str
    reason: str


def linear(
    x: jax.Array,
    w: Any,
    bias: jax.Array | None = None,
    *,
    implementation: Implementation = None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """x [..., K] times w [N, K] transposed, plus bias [N]: [..., N] in x's type, or in `out_dtype`.

    Sums are float32, so out_dtype float32 loses nothing more (logits want it, however narrow the model).
    Raises ValueError if K differs, or if `implementation` is demanded and does not support this layer.
    """
    if isinstance(w, Transformed):
        x, w = rotate(x, w.transform), w.value
    shape = shape_of(w) if is_quantized(w) else w.weight.shape if isinstance(w, Tap) else w.shape
    if x.shape[-1] != shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features, the weight [N, K] = {list(shape)} takes {shape[1]}")
    if isinstance(w, Tap):
        y = _dense(x, w.weight)
        y = y if w.shift is None else y + w.shift.astype(y.dtype)
        w.observe(x, y)
    elif not is_quantized(w):
        choose(w, 1, implementation)
        y = _dense(x, w)
    else:
        choose(w, x.size // max(x.shape[-1], 1), implementation)
        layer = w if isinstance(w, QuantizedLinear) else QuantizedLinear(w)
        y = _quantized(x.reshape(-1, shape[1]), layer).reshape(*x.shape[:-1], shape[0])
        if layer.bias is not None:
            y = y + layer.bias.astype(y.dtype)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y.astype(x.dtype if out_dtype is None else out_dtype)


def choose(w: Any, tokens: int, implementation: Implementation = None) -> Choice:
    """Which path serves this weight with so many tokens; a pure function of shapes, types and the device."""
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"implementation is {implementation!r}; expected None, 'xla' or 'pallas'")
    reason = _no_pallas(w)
    if implementation == "pallas" and reason is not None:
        raise ValueError(f"implementation='pallas' cannot serve this layer: {reason}; use None or 'xla'")
    if not is_quantized(w):
        return Choice("xla dense", "not quantized")
    if (how := _quantized_inputs(w)) is not None:
        return Choice(*how)
    if _base(w, SparseAffineWeight):
        return Choice("xla decode+dot", "a 2:4 pattern is decoded before the product")
    if platform() == "cpu":
        if tokens <= STREAMING_TOKENS:
            return Choice("xla streaming", f"{tokens} tokens <= {STREAMING_TOKENS} on a CPU")
        return Choice("xla decode+dot", f"{tokens} tokens > {STREAMING_TOKENS} on a CPU")
    return Choice("xla fused", reason or "")


def explain(model: Any, tokens: int) -> str:
    """A table, a row a packed layer: path, bits a weight, bytes, what `linear` takes for so many tokens, the reason."""
    rows: list[tuple[str, ...]] = [("path", "bits/weight", "bytes", "implementation", "reason")]
    for path, leaf in trees.leaves(model).items():
        if is_quantized(leaf):
            choice = choose(leaf, tokens)
            rows.append((path, f"{bits_per_weight(leaf):.3f}", str(size_bytes(leaf)), *choice))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def prepare(tree: Any) -> Any:
    """The same model with every packed weight in the form this device reads fastest; once, after loading.

    On a CPU the base goes into the "stream_t" layout; everywhere a residual gets the row of each entry beside it.
    Weights are converted one at a time, so the extra memory is one weight's.
    """
    return jax.tree.map(lambda leaf: _prepared(leaf) if is_quantized(leaf) else leaf, tree, is_leaf=is_quantized)


def _prepared(w: Any) -> Any:
    if isinstance(w, QuantizedLinear):
        rest = None if w.residual is None else with_rows(w.residual)
        return dataclasses.replace(w, weight=_prepared(w.weight), residual=rest)
    return transposed(canonical(w)) if platform() == "cpu" else canonical(w)


def _base(w: Any, kind: type) -> bool:
    return isinstance(w.weight if isinstance(w, QuantizedLinear) else w, kind)


def _quantized_inputs(w: Any) -> Choice | None:
    """The path of a layer whose inputs are quantized, else None."""
    if not isinstance(w, QuantizedLinear) or w.activation is None:
        return None
    act, base = w.activation, w.weight
    if act.codebook is not None:
        return Choice("xla decode+dot", "activations by a table are decoded, kept ones exact")
    if not isinstance(base, AffineWeight):
        return Choice("xla decode+dot", "integer activations, but the weight has no integer grid")
    if base.group_axis == "out":
        return Choice("xla decode+dot", "integer activations, but scales differ along the sum (groups of outputs)")
    if act.outlier_percent:
        return Choice("xla decode+dot", "some activations are kept exactly in each token")
    return Choice("xla integer", f"{base.bits}-bit codes by {act.bits}-bit activations, summed in int32")


def _no_pallas(w: Any) -> str | None:
    """None if a Pallas kernel serves the weight, else the reason why none does."""
    if not is_quantized(w):
        return "the weight is dense"
    return "no Pallas kernel covers this kind of weight"


def _dense(x: jax.Array, w: jax.Array) -> jax.Array:
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w.astype(x.dtype), contract, preferred_element_type=jnp.float32)


def _quantized(x: jax.Array, layer: QuantizedLinear) -> jax.Array:
    """x [M, K] -> [M, N] float32, without the bias."""
    x, layer = jax.lax.optimization_barrier((x, layer))
    if layer.transform is not None:
        x = rotate(x, layer.transform)
    if layer.activation is not None or isinstance(layer.weight, SparseAffineWeight):
        return _quantized_activations(x, layer)
    few = x.shape[0] <= STREAMING_TOKENS
    if platform() == "cpu":
        return _stream_few(x.astype(jnp.float32), layer) if few else _decode_once(x, layer)
    rest = layer.residual if few else None  # for many tokens it costs less to put the entries into the decoded matrix
    base = dataclasses.replace(layer, bias=None, residual=None if few else layer.residual)
    y = _dense(x, dequantize(base).astype(x.dtype))
    return y if rest is None else y + _sparse(x.astype(jnp.float32), rest)


def _quantized_activations(x: jax.Array, layer: QuantizedLinear) -> jax.Array:
    """x [M, K] -> [M, N] float32: the base multiplies quantized inputs, what was kept beside it the inputs as given."""
    base, act, kept = layer.weight, layer.activation, layer.outliers
    inputs = x if kept is None else x[:, base_columns(kept.index, base.shape[1])]
    how = _quantized_inputs(layer)
    if act is not None and how is not None and how.implementation == "xla integer" and isinstance(base, AffineWeight):
        y = _integer_product(inputs, act, base)
    else:
        inputs = inputs if act is None else fake_quantize(inputs, act).astype(x.dtype)
        y = _dense(inputs, dequantize(base))
    if kept is not None:
        y = y + _dense(x[:, kept.index], kept.weight)
    return y if layer.residual is None else y + _sparse(x.astype(jnp.float32), layer.residual)


def _integer_product(x: jax.Array, act: ActivationQuant, base: AffineWeight) -> jax.Array:
    """x [M, K] quantized to integers, times the integer codes of the weight: QUIK's arithmetic, for any groups."""
    tokens = quantize_tokens(x, act)
    half = 2 ** (base.bits - 1)
    codes = (unpack_codes(words(base), base.bits, base.shape[1]).astype(jnp.int16) - half).astype(jnp.int8)
    zeros = affine_zeros(base)
    zeros = None if zeros is None else zeros.astype(jnp.float32) - half
    scales = grid_scales(base).astype(jnp.float32)
    x_codes, x_scales, x_offsets = tokens
    return int_matmul.quantized_matmul(x_codes, x_scales, x_offsets, codes, scales, zeros, base.group_size)


def _stream_few(x: jax.Array, layer: QuantizedLinear) -> jax.Array:
    y = jnp.zeros((x.shape[0], shape_of(layer)[0]), jnp.float32)
    assert not isinstance(layer.weight, SparseAffineWeight)  # goes another way
    inputs = x
    if layer.outliers is not None:
        kept = layer.outliers
        inputs = x[:, base_columns(kept.index, layer.weight.shape[1])]
        y = y + _dense(x[:, kept.index], kept.weight.astype(jnp.float32))
    y = y + dequant_matmul.matvec(inputs, _streamed(layer.weight))
    return y if layer.residual is None else y + _sparse(x, layer.residual)


def _decode_once(x: jax.Array, layer: QuantizedLinear) -> jax.Array:
    assert not isinstance(layer.weight, SparseAffineWeight)
    rows, columns = shape_of(layer)
    dense = dequant_matmul.decode(_streamed(layer.weight), jnp.dtype(jnp.float32))  # [K, N]
    if layer.outliers is not None:
        kept = layer.outliers
        full = jnp.zeros((columns, rows), jnp.float32)
        full = full.at[base_columns(kept.index, dense.shape[0])].set(dense)
        dense = full.at[kept.index].set(kept.weight.astype(jnp.float32).T)
    if layer.residual is not None:
        dense = _add_residual(dense, layer.residual)
    # float32 arithmetic whatever x is: a CPU has no bfloat16 product worth using
    return jnp.matmul(x.astype(jnp.float32), dense)


def _sparse(x: jax.Array, residual: SparseResidual) -> jax.Array:
    rows, shape = residual_rows(residual), residual.shape
    return sparse_matmul.gather_sum(x, residual.values, residual.columns, rows, shape[0])


def _add_residual(dense: jax.Array, residual: SparseResidual) -> jax.Array:
    place = (residual.columns.astype(jnp.int32), residual_rows(residual))
    return dense.at[place].add(residual.values.astype(jnp.float32))


def _streamed(w: AffineWeight | CodebookWeight) -> dequant_matmul.Affine | dequant_matmul.Codebook:
    """The kernel's view of a weight: everything transposed, a no-op for what `prepare` has seen."""
    if isinstance(w, CodebookWeight):
        table = w.codebook if w.layout == "stream_t" else w.codebook.T
        return dequant_matmul.Codebook(words(w).T, table, w.scales, w.bits, w.shape)
    zeros = affine_zeros(w)
    zeros = None if zeros is None else zeros.T
    return dequant_matmul.Affine(words(w).T, grid_scales(w).T, zeros, w.bits, w.group_size, w.group_axis, w.shape)
