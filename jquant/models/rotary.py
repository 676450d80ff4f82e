"""Rotary position embedding and the ways of stretching it beyond the trained context.

A head of d values is d/2 planes: value i pairs with value i + d/2 (the "half" order of Hugging Face). Plane i at
position p turns by the angle p f_i (arXiv:2104.09864 eq. 34), and cos and sin are multiplied by one scale a:

    f_i = theta^(-2i/d)
    default   f_i                                                  a = 1
    linear    f_i / s                                              a = 1       (arXiv:2306.15595)
    dynamic   theta <- theta (s n / n_max - (s - 1))^(d/(d-2))     a = 1       n = max(length, n_max); NTK-aware
    llama3    f_i, f_i / s, or a blend, by wavelength 2 pi / f_i   a = 1       Llama 3.1
    yarn      a blend of f_i and f_i / s along i                   a = 0.1 ln s + 1   (arXiv:2309.00071 section 3)

The constants agree with transformers 5's `modeling_rope_utils`. Layouts: positions [B, T] int32; cos, sin
[B, T, d/2] float32; queries and keys [B, T, H, d].
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jquant.models.config import ModelConfig, RopeScaling


def cos_sin(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scaled cos and sin [B, T, d/2] float32 of the angles at `positions` [B, T]; finite at padding (negative)."""
    if config.rope_scaling.kind == "dynamic":
        frequencies = _dynamic_frequencies(config, positions)
    else:
        frequencies = jnp.asarray(frozen_frequencies(config))[None, None, :]
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies
    scale = cos_sin_scale(config.rope_scaling)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns every head of x [B, T, H, d] by the angles of cos, sin [B, T, d/2]; float32 inside, type of x outside."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def frozen_frequencies(config: ModelConfig) -> np.ndarray:
    """Frequencies f_i [d/2] float32 of every kind except "dynamic", whose frequencies depend on the length."""
    scaling, d = config.rope_scaling, config.head_dim
    frequencies = _base_frequencies(config)
    if scaling.kind == "default":
        stretched = frequencies
    elif scaling.kind == "linear":
        stretched = frequencies / scaling.factor
    elif scaling.kind == "llama3":
        stretched = _llama3_frequencies(frequencies, scaling, _original_positions(config))
    elif scaling.kind == "yarn":
        stretched = _yarn_frequencies(frequencies, scaling, d, config.rope_theta, _original_positions(config))
    else:
        raise ValueError(
            f"rope kind {scaling.kind!r} has no fixed frequencies; expected default, linear, llama3 or yarn"
        )
    return stretched.astype(np.float32)


def cos_sin_scale(scaling: RopeScaling) -> float:
    """The factor a on cos and sin; 1 for every kind but yarn."""
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


def _original_positions(config: ModelConfig) -> int:
    return config.rope_scaling.original_positions or config.max_positions


def _base_frequencies(config: ModelConfig) -> np.ndarray:
    # float64: rounding once to float32 at the end keeps the angle error at large positions to one rounding.
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    return config.rope_theta**-exponents


def _dynamic_frequencies(config: ModelConfig, positions: jax.Array) -> jax.Array:
    """Frequencies [B, 1, d/2]; each row goes by its own length, whatever its batch companions are."""
    d, factor, trained = config.head_dim, config.rope_scaling.factor, config.max_positions
    lengths = jnp.maximum(jnp.max(positions, axis=1) + 1, trained).astype(jnp.float32)
    growth = factor * lengths / trained - (factor - 1.0)
    exponents = np.arange(0, d, 2, dtype=np.float32) / d
    # theta'^(-e) = theta^(-e) growth^(-e d/(d-2)); growth is exactly 1 up to the trained length.
    stretch = growth[:, None] ** jnp.asarray(-exponents * (d / (d - 2)), jnp.float32)
    return jnp.asarray(_base_frequencies(config), jnp.float32) * stretch[:, None, :]


def _llama3_frequencies(frequencies: np.ndarray, scaling: RopeScaling, original: int) -> np.ndarray:
    """Long wavelengths are divided by the factor, short ones kept, those between blended linearly in 1/wavelength."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert low is not None and high is not None  # RopeScaling guarantees it
    turns = original * frequencies / (2 * math.pi)  # full turns within the original context
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _yarn_frequencies(frequencies: np.ndarray, scaling: RopeScaling, d: int, theta: float, original: int) -> np.ndarray:
    """Planes that turn often keep their frequency, planes that turn rarely are divided by the factor."""

    def plane_with(turns: float) -> float:
        return d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = plane_with(scaling.beta_fast), plane_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The upper clip is d - 1, not d/2 - 1, as in the original code; it changes the slope of the ramp.
    first, last = max(first, 0), min(last, d - 1)
    ramp = np.clip((np.arange(d // 2) - first) / (last - first if last != first else 0.001), 0.0, 1.0)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)
