"""Arithmetic on indices: products and nonlinear functions computed from codes, without dequantizing them first.

KLLM (arXiv 2507.23035) multiplies two matrices of table indices by counting: a product takes few distinct values, so

    y[m, n] = s_m s_n sum_{a, w} count[m, n, a, w] C_A[a] C_W[w],    count = how often the pair (a, w) occurs along K

and the table of products is computed once. The first versions of the paper claim the same for nonlinear operations
without saying how; the definitions here are the ones for which "on indices" equals "dequantize, then apply":

    elementwise f       f on the 2**bits values of a token's table: the codes stay               (SiLU, GELU, exp)
    f(a) * b            one table of 2**(2 bits) values for the pairs of two codes               (gated MLPs)
    RMSNorm             sum of squares = s**2 sum_j count_j C_j**2: the codes stay, the scale becomes s / rms
    softmax             2**bits exponentials; denominator = sum_j count_j e_j: the codes stay

Kept (outlier) entries are computed exactly beside it. What it costs, per [M, K] x [N, K] product with a- and w-bit
codes and per [M, K] nonlinearity (`costs` gives the numbers):

                                dequantized                    on indices
    product     table entries   2**a + 2**w                    2**a + 2**w + 2**(a + w)
                lookups         M K + N K                      0
                increments      0                              M N K
                multiply-adds   M N K                          M N 2**(a + w)
    nonlinear   lookups         M K                            M K (of the result, by whoever needs it)
                evaluations     M K                            M 2**a, of pairs M 2**(2 a)

A matrix unit does its multiply-adds for less than any increments cost, so this module is the specification of the
index form, for small shapes and for tests, and no path that a model runs on.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Elementwise = Callable[[jax.Array], jax.Array]


class Indexed(NamedTuple):
    """Values [M, K] as indices: exact where keep, else scales * table[m, codes].

    codes [M, K] integers; scales float32 [M, 1]; table float32 [1 or M, C]: shared, or one a token; keep bool [M, K];
    exact float32 [M, K], read only where keep.
    """

    codes: jax.Array
    scales: jax.Array
    table: jax.Array
    keep: jax.Array
    exact: jax.Array


class Operations(NamedTuple):
    """What one form of a product needs, in numbers of operations; scales, 2 M N multiplications in both, left out."""

    table_entries: int
    lookups: int
    increments: int
    multiply_adds: int


class Costs(NamedTuple):
    """A product [M, K] x [N, K] in both forms."""

    dequantized: Operations
    index: Operations


def costs(M: int, N: int, K: int, bits_a: int, bits_w: int) -> Costs:
    """Operations of both forms of a product; building the table of products is counted as its multiply-adds."""
    entries, pairs = 2**bits_a + 2**bits_w, 2 ** (bits_a + bits_w)
    return Costs(
        Operations(table_entries=entries, lookups=M * K + N * K, increments=0, multiply_adds=M * N * K),
        Operations(table_entries=entries + pairs, lookups=0, increments=M * N * K, multiply_adds=M * N * pairs + pairs),
    )


def decode(x: Indexed) -> jax.Array:
    """The values, float32 [M, K]."""
    return jnp.where(x.keep, x.exact, x.scales * _look_up(x.table, x.codes))


@jax.jit
def index_matmul(
    x_codes: jax.Array, x_scales: jax.Array, C_A: jax.Array, w_codes: jax.Array, w_scales: jax.Array, C_W: jax.Array
) -> jax.Array:
    """float32 [M, N]: the product of scales * C_A[x_codes] [M, K] with (w_scales * C_W[w_codes]) [N, K] transposed.

    x_scales [M, 1], w_scales [N], C_A [A], C_W [W]. By counting pairs of codes for each output; memory [M, A * W].
    Raises ValueError if K differs.
    """
    if x_codes.shape[1] != w_codes.shape[1]:
        raise ValueError(f"x_codes {x_codes.shape} and w_codes {w_codes.shape} must have one K: [M, K] and [N, K]")
    entries = C_W.shape[0]
    products = (C_A.astype(jnp.float32)[:, None] * C_W.astype(jnp.float32)[None, :]).reshape(-1)
    first = x_codes.astype(jnp.int32) * entries

    def one_output(_: None, row: jax.Array) -> tuple[None, jax.Array]:
        counts = _histogram(first + row.astype(jnp.int32)[None, :], products.shape[0])
        return None, jnp.matmul(counts, products, precision="highest")

    _, sums = jax.lax.scan(one_output, None, w_codes)
    return x_scales * sums.T * w_scales.astype(jnp.float32)[None, :]


@jax.jit
def compensation(
    x: jax.Array,
    keep: jax.Array,
    x_codes: jax.Array,
    x_scales: jax.Array,
    C_A: jax.Array,
    w_codes: jax.Array,
    w_scales: jax.Array,
    C_W: jax.Array,
) -> jax.Array:
    """float32 [M, N]: what `index_matmul` of all codes lacks where entries of x [M, K] are kept exactly.

    `index_matmul` looks ahead: it multiplies the codes of all entries, before it is known which are kept (bool
    [M, K]). Here each kept one brings its residual x - x_hat and fetches its column of the weight; the sum of both is
    the product of the exact kept entries and the dequantized others. That is N multiply-adds for a kept entry; here
    every column passes, most of them with a residual of 0.
    """
    residual = jnp.where(keep, x.astype(jnp.float32) - x_scales * _look_up(C_A[None], x_codes), 0.0)

    def one_column(total: jax.Array, column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        rest, codes = column
        return total + rest[:, None] * C_W.astype(jnp.float32)[codes.astype(jnp.int32)][None, :], None

    start = jnp.zeros((x.shape[0], w_codes.shape[0]), jnp.float32)
    total, _ = jax.lax.scan(one_column, start, (residual.T, w_codes.T))
    return total * w_scales.astype(jnp.float32)[None, :]


def elementwise(f: Elementwise, x: Indexed) -> Indexed:
    """f(x): the same codes, and a table of its own for every token."""
    return Indexed(x.codes, jnp.ones_like(x.scales), f(x.scales * x.table), x.keep, f(_exact(x)))


def gated_product(f: Elementwise, gate: Indexed, up: Indexed) -> Indexed:
    """f(gate) * up, with codes of pairs: code_gate * C_up + code_up. Exact where either is kept."""
    left, right = f(gate.scales * gate.table), up.scales * up.table
    table = (left[:, :, None] * right[:, None, :]).reshape(left.shape[0], -1)
    codes = gate.codes.astype(jnp.int32) * up.table.shape[1] + up.codes.astype(jnp.int32)
    keep = gate.keep | up.keep
    exact = jnp.where(keep, f(decode(gate)) * decode(up), 0.0)
    return Indexed(codes, jnp.ones_like(gate.scales), table, keep, exact)


def rms_norm(x: Indexed, epsilon: float = 1e-6) -> Indexed:
    """x / sqrt(mean(x**2) + epsilon): the same codes and table. A gain per input belongs into the next weight."""
    counts = _histogram(x.codes.astype(jnp.int32), x.table.shape[1], ~x.keep)
    squares = jnp.square(x.scales) * jnp.sum(counts * jnp.square(x.table), axis=1, keepdims=True)
    squares = squares + jnp.sum(jnp.square(_exact(x)), axis=1, keepdims=True)
    factor = jax.lax.rsqrt(squares / x.codes.shape[1] + epsilon)
    return Indexed(x.codes, x.scales * factor, x.table, x.keep, x.exact * factor)


def softmax(x: Indexed) -> Indexed:
    """Softmax over K: the same codes, and a table of its own for every token. Nothing overflows."""
    values = x.scales * x.table
    counts = _histogram(x.codes.astype(jnp.int32), x.table.shape[1], ~x.keep)
    # Entries that occur nowhere may be larger than all that do: they take no part in the maximum, nor in the sum.
    occupied = counts > 0
    largest = jnp.max(jnp.where(occupied, values, -jnp.inf), axis=1, keepdims=True)
    largest = jnp.maximum(largest, jnp.max(jnp.where(x.keep, x.exact, -jnp.inf), axis=1, keepdims=True))
    table = jnp.where(occupied, jnp.exp(values - largest), 0.0)
    exact = jnp.where(x.keep, jnp.exp(x.exact - largest), 0.0)
    total = jnp.sum(counts * table, axis=1, keepdims=True) + jnp.sum(exact, axis=1, keepdims=True)
    return Indexed(x.codes, 1.0 / total, table, x.keep, exact / total)


def _exact(x: Indexed) -> jax.Array:
    return jnp.where(x.keep, x.exact, 0.0)


def _look_up(table: jax.Array, codes: jax.Array) -> jax.Array:
    """table [1 or M, C] at codes [M, K]: float32 [M, K]."""
    wide = jnp.broadcast_to(table.astype(jnp.float32), (codes.shape[0], table.shape[1]))
    return jnp.take_along_axis(wide, codes.astype(jnp.int32), axis=1)


def _histogram(codes: jax.Array, size: int, count: jax.Array | None = None) -> jax.Array:
    """How often each of `size` codes occurs in each row of codes [M, K] where `count` is set, float32 [M, size]."""
    ones = jnp.ones(codes.shape, jnp.int32) if count is None else count.astype(jnp.int32)
    row = jnp.arange(codes.shape[0])[:, None]
    return jnp.zeros((codes.shape[0], size), jnp.int32).at[row, codes].add(ones).astype(jnp.float32)
