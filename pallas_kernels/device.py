"""Facts about the device that traced code will run on."""

import jax


def platform() -> str:
    """ "cpu", "gpu" or "tpu": the default backend, which is where a traced program goes unless told otherwise."""
    name = jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def no_hopper() -> str | None:
    """None on a Hopper GPU (compute capability 9.0), else what the device is instead."""
    if platform() != "gpu":
        return f"the device is a {platform()}; the kernels are for Hopper GPUs"
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability.startswith("9."):
        return None
    return f"the device is a {device.device_kind} of compute capability {capability}; the kernels are for 9.0, Hopper"
