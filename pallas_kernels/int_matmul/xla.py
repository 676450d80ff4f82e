"""The integer product by XLA's own int8 dot, with a float32 epilogue; equations in `pallas_kernels.int_matmul`.

A product of two int8 codes is at most 2**14, so int32 holds any sum of 131071 of them. With zero points a term is at
most 128 * 255, which allows 65793. Longer groups are refused; longer rows in several groups are fine.

One group is one dot. Several are summed a few at a time, as many as keep the partial sums [groups, M, N] within
`PARTIAL_SUMS`, so memory is bounded whatever their number. Measured on an H200 for N = K = 8192 and groups of 128: all
64 at once take 22 us for one token, one after another 388 us. A CPU takes them one by one: its batched dot is slow.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.device import platform

LONGEST_SUM = (2**31 - 1) // (128 * 128)
LONGEST_SUM_WITH_ZEROS = (2**31 - 1) // (128 * 255)
PARTIAL_SUMS = 2**24  # int32 entries, 64 MiB


def integer_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x int8 [M, K] times w int8 [N, K] transposed: int32 [M, N], exact for every code.

    ValueError if K differs, a type is not int8, or K > 131071, where int32 could overflow.
    """
    _check_codes(x, w)
    rows, columns = x.shape
    if columns > LONGEST_SUM:
        raise ValueError(f"{columns} products of int8 codes may overflow int32; split the sum into {LONGEST_SUM} each")
    # On a CPU, XLA turns a single row into a matrix-vector loop 20 times slower than the product of two rows.
    lonely = rows == 1 and platform() == "cpu"
    padded = jnp.pad(x, ((0, 1), (0, 0))) if lonely else x
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(padded, w, dims, preferred_element_type=jnp.int32)[:rows]


def quantized_matmul(
    x_codes: jax.Array,
    x_scales: jax.Array,
    x_offsets: jax.Array | None,
    w_codes: jax.Array,
    w_scales: jax.Array,
    w_zeros: jax.Array | None,
    group_size: int,
    *,
    w_sums: jax.Array | None = None,
) -> jax.Array:
    """x_hat [M, K] times w_hat [N, K] transposed, float32 [M, N]; equations in `pallas_kernels.int_matmul`.

    x_codes int8 [M, K], x_scales and x_offsets float32 [M, 1] (None: no offset), w_codes int8 [N, K], w_scales float
    and w_zeros [N, G] with G = ceil(K / group_size). w_zeros are whole numbers of any type on the scale of w_codes,
    within int8; None is zero everywhere. The last group may be shorter.
    w_sums is `code_sums(w_codes, group_size)` if the caller has it: without it an offset costs a second reading of w.
    ValueError for shapes that disagree, or a group too long for int32.
    """
    _check_codes(x_codes, w_codes)
    (tokens, columns), rows = x_codes.shape, w_codes.shape[0]
    if columns == 0:
        return jnp.zeros((tokens, rows), jnp.float32)
    groups = _count_groups(columns, group_size)
    for name, array, shape in (
        ("x_scales", x_scales, (tokens, 1)),
        ("x_offsets", x_offsets, (tokens, 1)),
        ("w_scales", w_scales, (rows, groups)),
        ("w_zeros", w_zeros, (rows, groups)),
        ("w_sums", w_sums, (rows, groups)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; expected {shape} with group_size={group_size}")
    size = min(group_size, columns)
    longest = LONGEST_SUM if w_zeros is None else LONGEST_SUM_WITH_ZEROS
    if size > longest:
        remedy = "" if w_zeros is None else ", or a symmetric weight"
        raise ValueError(f"a group of {size} products may overflow int32; use groups of at most {longest}{remedy}")
    scales = w_scales.astype(jnp.float32).T
    zeros = None if w_zeros is None else w_zeros.astype(jnp.int32).T
    whole = columns // size
    y = _whole_groups(x_codes, w_codes, scales[:whole], None if zeros is None else zeros[:whole], size)
    if whole < groups:
        x, w = x_codes[:, whole * size :], w_codes[:, whole * size :]
        y = y + _product(x, w, scales[whole:], None if zeros is None else zeros[whole:], size)
    y = y * x_scales.astype(jnp.float32)
    if x_offsets is None:
        return y
    sums = code_sums(w_codes, group_size) if w_sums is None else w_sums
    if zeros is not None:
        lengths = jnp.minimum(size, columns - size * jnp.arange(groups, dtype=jnp.int32))
        sums = sums - lengths[None, :] * zeros.T
    reduced = jnp.sum(scales.T * sums.astype(jnp.float32), axis=1)
    return y + x_offsets.astype(jnp.float32) * reduced[None, :]


def _whole_groups(x: jax.Array, w: jax.Array, scales: jax.Array, zeros: jax.Array | None, size: int) -> jax.Array:
    """`_product` over the first groups of x [M, K], w [N, K], as many as scales [G, N] has; some of them at a time."""
    groups, entries = scales.shape[0], x.shape[0] * w.shape[0]
    most = 1 if platform() == "cpu" else max(PARTIAL_SUMS // max(entries, 1), 1)
    each = max(count for count in range(1, min(most, groups) + 1) if groups % count == 0)
    if each == groups:
        return _product(x[:, : groups * size], w[:, : groups * size], scales, zeros, size)

    def add(y: jax.Array, step: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[jax.Array, None]:
        start, scale, zero = step
        x_now, w_now = (jax.lax.dynamic_slice_in_dim(codes, start, each * size, axis=1) for codes in (x, w))
        return y + _product(x_now, w_now, scale, zero, size), None

    starts = (each * size) * jnp.arange(groups // each, dtype=jnp.int32)
    scales, zeros = jax.tree.map(lambda a: a.reshape(-1, each, a.shape[1]), (scales, zeros))
    y, _ = jax.lax.scan(add, jnp.zeros((x.shape[0], w.shape[0]), jnp.float32), (starts, scales, zeros))
    return y


def _product(x: jax.Array, w: jax.Array, scales: jax.Array, zeros: jax.Array | None, size: int) -> jax.Array:
    """sum_g scales[g] * sum (x_code * (w_code - zeros[g])), the inner sums exact: x [M, K], w [N, K], scales [G, N]."""
    groups = scales.shape[0]
    if groups == 1:
        sums = integer_dot(x, w)[None]
    else:
        left, right = (codes.reshape(codes.shape[0], groups, size) for codes in (x, w))
        dims = (((2,), (2,)), ((1,), (1,)))
        sums = jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.int32)
    if zeros is not None:
        sums = sums - code_sums(x, size).T[:, :, None] * zeros[:, None, :]
    return jnp.sum(sums.astype(jnp.float32) * scales[:, None, :], axis=0)


def code_sums(codes: jax.Array, group_size: int) -> jax.Array:
    """Sums of int8 codes [N, K] over groups of consecutive inputs: int32 [N, ceil(K / group_size)]."""
    rows, columns = codes.shape
    groups = _count_groups(columns, group_size)
    whole = columns // group_size
    sums = _row_sums(codes[:, : whole * group_size].reshape(rows, whole, group_size))
    if whole == groups:
        return sums
    return jnp.concatenate([sums, _row_sums(codes[:, whole * group_size :])[:, None]], axis=1)


def _row_sums(codes: jax.Array) -> jax.Array:
    return jnp.sum(codes, axis=-1, dtype=jnp.int32)


def _check_codes(x: jax.Array, w: jax.Array) -> None:
    for name, codes in (("x", x), ("w", w)):
        if codes.dtype != jnp.int8 or codes.ndim != 2:
            raise ValueError(f"{name} is {codes.dtype}{list(codes.shape)}; expected int8 codes in two axes")
    if x.shape[1] != w.shape[1]:
        raise ValueError(f"x has {x.shape[1]} inputs, w {w.shape[1]}; expected as many")


def _count_groups(columns: int, group_size: int) -> int:
    if group_size < 1:
        raise ValueError(f"group_size={group_size} is no size; expected 1 or more, K={columns} for whole rows")
    return -(-columns // group_size)
