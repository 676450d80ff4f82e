"""Orthogonal rotations of a feature axis, as a size and a seed, and the weights that live behind one.

    y = x R^T,     R = (H_p (x) Q_m) diag(signs),     size = p m,  p the largest power of two in it, m odd

H_p is Sylvester's Hadamard matrix over sqrt(p), Q_m the orthonormal DCT-II of order m, (x) the Kronecker product and
signs are +1 or -1 by `seed`: the randomized Hadamard of QuaRot (arXiv 2404.00456, section 3) for every size. A large
channel is spread over all of them, so that a grid shared by many channels need not stretch for one. Since R is
orthogonal, rotating the input and the weight's columns alike changes nothing but rounding: x W^T = (x R^T)(W R^T)^T.

R is never stored nor formed. H_p (x) Q_m is again a Kronecker product of a few matrices of order at most 128, applied
one after another: K (f_1 + f_2 + ...) products a token instead of K^2. Layouts: x [..., K]; W [N, K].
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LARGEST_FACTOR = 128  # order of the matrices that a rotation is applied by; an odd part beyond it stays whole


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["size", "seed"])
@dataclasses.dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R [size, size] by description: no arrays, equal everywhere for equal (size, seed)."""

    size: int
    seed: int

    def __post_init__(self) -> None:
        """ValueError unless size >= 1 and 0 <= seed < 2**64, both whole numbers."""
        for name, smallest, limit in (("size", 1, 2**31), ("seed", 0, 2**64)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value < limit:
                raise ValueError(
                    f"a rotation has {name}={value!r}; expected a whole number from {smallest} to {limit - 1}"
                )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["transform"])
@dataclasses.dataclass(frozen=True)
class Transformed:
    """A weight whose columns live in rotated space: `linear(x, Transformed(v, r))` is `linear(rotate(x, r), v)`.

    value: a dense array [N, K] or a packed weight of that shape. The name matters: `jquant.format.tree` leaves it out
    of paths, so the layer keeps its own and a pass replaces what is inside.
    """

    value: Any
    transform: Rotation


@jax.jit
def rotate(x: jax.Array, r: Rotation) -> jax.Array:
    """x [..., size] -> x R^T, the same shape and type; float32 inside. ValueError if the last axis is not r.size."""
    _check(x, r)
    return _apply_factors(x.astype(jnp.float32) * _scaled_signs(r), r, _factor_matrices(r.size)).astype(x.dtype)


@jax.jit
def unrotate(x: jax.Array, r: Rotation) -> jax.Array:
    """x [..., size] -> x R: the inverse of `rotate`."""
    _check(x, r)
    back = tuple(factor.T for factor in _factor_matrices(r.size))
    return (_apply_factors(x.astype(jnp.float32), r, back) * _scaled_signs(r)).astype(x.dtype)


def matrix(r: Rotation) -> jax.Array:
    """R itself, float32 [size, size]; for looking at, since nothing else forms it."""
    return rotate(jnp.eye(r.size, dtype=jnp.float32), r).T


def signs(r: Rotation) -> np.ndarray:
    """The signs [size] of a rotation, int8: bit 63 of splitmix64(seed, index), the same on every machine."""
    # Array arithmetic is modulo 2**64, as the hash wants it; its last step would not touch bit 63.
    z = np.uint64(r.seed) + np.arange(1, r.size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.where(z >> np.uint64(63), -1, 1).astype(np.int8)


def _check(x: jax.Array, r: Rotation) -> None:
    if x.ndim < 1 or x.shape[-1] != r.size:
        raise ValueError(f"x {x.shape} cannot be rotated by a rotation of size {r.size}; its last axis must have it")


def _apply_factors(x: jax.Array, r: Rotation, factors: tuple[np.ndarray, ...]) -> jax.Array:
    """x [..., size] times the transposed Kronecker product of the factors, the first varying slowest along the axis."""
    y = x.reshape(-1, r.size)
    for factor in reversed(factors):
        # The last part of the axis is multiplied and becomes the first, so that after all of them the order is back.
        y = y.reshape(-1, r.size // factor.shape[0], factor.shape[0])
        y = jnp.einsum("tab,ib->tia", y, jnp.asarray(factor), precision="highest")
    return y.reshape(x.shape)


def _scaled_signs(r: Rotation) -> jax.Array:
    """signs / sqrt(p), float32 [size]: the factors are left unscaled, with entries 1 and -1 where m is 1."""
    return jnp.asarray(signs(r) / math.sqrt(r.size & -r.size), jnp.float32)


@functools.lru_cache(maxsize=16)
def _factor_matrices(size: int) -> tuple[np.ndarray, ...]:
    """Float32 matrices F_1, ..., F_n with F_1 (x) ... (x) F_n = sqrt(p) H_p (x) Q_m: Hadamard ones, the last with Q_m.

    As few as the largest order allows, and then as equal as can be.
    """
    power = size & -size
    odd, doublings = size // power, power.bit_length() - 1
    count, orders = 1, [size]
    while max(orders) > max(LARGEST_FACTOR, odd):
        count += 1
        orders = [1] * (count - 1) + [odd]
        for _ in range(doublings):
            orders[orders.index(min(orders))] *= 2
    hadamards = [_hadamard(order) for order in orders[:-1]]
    last = np.kron(_hadamard(orders[-1] // odd), _cosines(odd))
    return tuple(factor.astype(np.float32) for factor in (*hadamards, last))


def _hadamard(order: int) -> np.ndarray:
    """Sylvester's matrix [order, order] of 1 and -1: entry (i, j) is the parity of the bits that i and j share."""
    index = np.arange(order, dtype=np.uint32)
    return 1.0 - 2.0 * (np.bitwise_count(index[:, None] & index[None, :]) % 2)


def _cosines(order: int) -> np.ndarray:
    """The orthonormal DCT-II [order, order]: sqrt(2/m) cos(pi i (2j + 1) / 2m), row 0 constant 1 / sqrt(m)."""
    index = np.arange(order)
    table = np.cos(np.pi * index[:, None] * (2 * index[None, :] + 1) / (2 * order)) * math.sqrt(2 / order)
    table[0] = 1 / math.sqrt(order)
    return table
