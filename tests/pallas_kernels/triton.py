"""Lowering of Triton-backend kernels where there is no GPU: the newer JAX releases ask which one is meant."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax


def lower_for_gpu(function: Callable[..., Any], *args: Any) -> str:
    """The lowered text of a jitted function for an NVIDIA GPU; args are arrays or their shapes."""
    context = nullcontext()
    kinds = getattr(jax.sharding, "AbstractDevice", None)
    if kinds is not None:
        device = kinds(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
        mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
        context = jax.sharding.use_abstract_mesh(mesh)
    with context, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def count_kernels(text: str) -> int:
    """Triton kernels in lowered text."""
    return text.count("__gpu$xla.gpu.triton")
