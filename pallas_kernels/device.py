"""Facts about the device that traced code will run on."""

import jax


def platform() -> str:
    """ "cpu", "gpu" or "tpu": the default backend, which is where a traced program goes unless told otherwise."""
    name = jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name
