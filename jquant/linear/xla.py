"""The products that XLA compiles, for every packed type and device.

By device and tokens M:

    cpu, M <= 8     the packed words are streamed lane by lane, nothing decoded is stored (`dequant_matmul.streaming`)
    cpu, M > 8      one decoded matrix at a time, then a dense product
    gpu, tpu        decode and product in one expression, fused as far as XLA does
    integers        8-bit or narrower activations, and affine codes or a table of int8 entries: an int8 product summed
                    in int32 (`int_matmul`)

The decode is tied to x by an optimization barrier: it depends on nothing but the weights, and XLA would otherwise
decode every layer at the start of the program, or once outside a generation loop, and hold all of them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jquant.format.activations import ActivationQuant, fake_quantize, quantize_tokens
from jquant.format.layouts import affine_zeros, grid_scales, words
from jquant.format.rotation import rotate
from jquant.format.semistructured import SparseAffineWeight
from jquant.format.weights import (
    AffineWeight,
    CodebookWeight,
    QuantizedLinear,
    SparseResidual,
    base_columns,
    dequantize,
    is_snapped,
    residual_rows,
    shape_of,
    table_entries,
)
from pallas_kernels import dequant_matmul, int_matmul, sparse_matmul
from pallas_kernels.device import platform
from pallas_kernels.packing import unpack_codes

STREAMING_TOKENS = 8  # a guess, not tuned: work grows with tokens here, beyond it a decode pays


def path_of(layer: QuantizedLinear, tokens: int) -> tuple[str, str]:
    """(name, reason) of what `product` does."""
    act, base = layer.activation, layer.weight
    if act is not None:
        if act.codebook is not None:
            return "xla decode+dot", "activations by a table are decoded, kept ones exact"
        if isinstance(base, CodebookWeight) and not is_snapped(base):
            return "xla decode+dot", "integer activations, but the table is not snapped to int8"
        if isinstance(base, SparseAffineWeight):
            return "xla decode+dot", "integer activations, but the weight has a 2:4 pattern"
        if isinstance(base, AffineWeight) and base.group_axis == "out":
            return "xla decode+dot", "integer activations, but scales differ along the sum (groups of outputs)"
        if act.outlier_percent:
            return "xla decode+dot", "some activations are kept exactly in each token"
        what = "codes" if isinstance(base, AffineWeight) else "codes into an int8 table"
        return "xla integer", f"{base.bits}-bit {what} by {act.bits}-bit activations, summed in int32"
    if isinstance(base, SparseAffineWeight):
        return "xla decode+dot", "a 2:4 pattern is decoded before the product"
    if platform() == "cpu":
        if tokens <= STREAMING_TOKENS:
            return "xla streaming", f"{tokens} tokens <= {STREAMING_TOKENS} on a CPU"
        return "xla decode+dot", f"{tokens} tokens > {STREAMING_TOKENS} on a CPU"
    return "xla fused", ""


def dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., K] times w [N, K] transposed, in float32."""
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w.astype(x.dtype), contract, preferred_element_type=jnp.float32)


def product(x: jax.Array, layer: QuantizedLinear) -> jax.Array:
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
    y = dense(x, dequantize(base).astype(x.dtype))
    return y if rest is None else y + _sparse(x.astype(jnp.float32), rest)


def _quantized_activations(x: jax.Array, layer: QuantizedLinear) -> jax.Array:
    """x [M, K] -> [M, N] float32: the base multiplies quantized inputs, what was kept beside it the inputs as given."""
    base, act, kept = layer.weight, layer.activation, layer.outliers
    if platform() == "cpu":  # it has no product of two bfloat16 matrices with float32 sums
        x = x.astype(jnp.float32)
    inputs = x if kept is None else x[:, base_columns(kept.index, base.shape[1])]
    if act is not None and path_of(layer, x.shape[0])[0] == "xla integer":
        assert not isinstance(base, SparseAffineWeight)
        y = _integer_product(inputs, act, base)
    else:
        inputs = inputs if act is None else fake_quantize(inputs, act).astype(x.dtype)
        y = dense(inputs, dequantize(base))
    if kept is not None:
        y = y + dense(x[:, kept.index], kept.weight)
    return y if layer.residual is None else y + _sparse(x.astype(jnp.float32), layer.residual)


def _integer_product(x: jax.Array, act: ActivationQuant, base: AffineWeight | CodebookWeight) -> jax.Array:
    """x [M, K] quantized to integers, times the integers of the weight: QUIK's arithmetic, for any groups."""
    tokens = quantize_tokens(x, act)
    if isinstance(base, CodebookWeight):
        assert base.scales is not None
        scales = base.scales.astype(jnp.float32)[:, None]
        x_codes, x_scales, x_offsets = tokens
        entries, columns = table_entries(base), base.shape[1]
        return int_matmul.quantized_matmul(x_codes, x_scales, x_offsets, entries, scales, None, columns)
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
        y = y + dense(x[:, kept.index], kept.weight.astype(jnp.float32))
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
