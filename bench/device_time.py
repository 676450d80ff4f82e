"""Time on the device, by CUPTI: what the kernels of a call take, without the host's part."""

import contextlib
import fcntl
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

WARM_UP = 0.15  # seconds of work after a pause: until then what a device reads and multiplies is up to a tenth slower
L2_BYTES = 60e6  # of an H200; what is read in turns must be several times as large


def device_time(f: Callable[[Any, Any], Any], first: Any, copies: Sequence[Any]) -> float:
    """Microseconds of all kernels of one call f(first, copy), the median over calls that go round the copies.

    What `jax.experimental.mosaic.gpu.profiler.measure` does, whose calls all get the same arrays. Reading the copies in
    turns keeps them out of the L2 cache. ValueError if calls differ in their number of kernels.
    """
    from jax.experimental.mosaic.gpu import profiler

    library: Any = vars(profiler)["mosaic_gpu_lib"]
    jax.block_until_ready(f(first, copies[0]))
    calls = max(6, 2 * len(copies))
    library._mosaic_gpu_ext._cupti_init()
    try:
        jax.block_until_ready([f(first, copies[i % len(copies)]) for i in range(calls)])
    finally:
        timings = library._mosaic_gpu_ext._cupti_get_timings(True)
    if not timings or len(timings) % calls:
        raise ValueError(f"{len(timings)} kernels in {calls} calls; expected as many in each")
    each = len(timings) // calls
    return 1000 * statistics.median(sum(t for _, t in timings[i * each : (i + 1) * each]) for i in range(calls))


def warm_up(f: Callable[[Any, Any], Any], first: Any, copies: Sequence[Any]) -> None:
    """Runs f for a while, before the first measurement after the device was idle."""
    began = time.monotonic()
    while time.monotonic() - began < WARM_UP:
        jax.block_until_ready([f(first, copy) for copy in copies])


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While no other benchmark measures on this device: another one may compile in the meantime."""
    name = f"jquant-bench-{os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}"
    with open(Path(tempfile.gettempdir()) / name, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def copies_of(count_bytes: int) -> int:
    """How many copies of so many bytes to read in turns."""
    return max(2, min(8, int(-(-3 * L2_BYTES // count_bytes))))


def ceilings() -> dict[str, float]:
    """What this device reaches: bytes/s of a copy (read and written), operations/s of bfloat16 and int8 products."""
    size = 1 << 28
    source = [jnp.full((size,), i, jnp.float32) for i in range(2)]
    add = jax.jit(lambda one, x: x + one)
    warm_up(add, jnp.float32(1), source)
    copy = device_time(add, jnp.float32(1), source)
    found = {"copy_bytes_per_second": 1e6 * 2 * 4 * size / copy}
    side, contract = 8192, (((1,), (1,)), ((), ()))
    for name, dtype, total in (("bfloat16", jnp.bfloat16, jnp.float32), ("int8", jnp.int8, jnp.int32)):
        keys = jax.random.split(jax.random.key(0), 3)
        made = [jax.random.randint(key, (side, side), -100, 100).astype(dtype) for key in keys]
        product = jax.jit(lambda x, w, t=total: jax.lax.dot_general(x, w, contract, preferred_element_type=t))
        found[f"{name}_operations_per_second"] = 2e6 * side**3 / device_time(product, made[0], made[1:])
    return found
