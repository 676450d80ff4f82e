"""Compiles for an H200 on a machine without one: registers, shared memory, and no decoded weight in memory.

Needs the CUDA plugin of the running JAX (`make test-compile` sets it up); skipped without. Says nothing about numbers.
"""

import functools
import importlib.util
import itertools
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jquant as jq
from bench.matmul import OPS, random_weight
from jquant.format.spec import QuantSpec
from jquant.linear import hopper, linear, preparation, xla
from pallas_kernels.activation_quantize import quantize_rows
from pallas_kernels.activation_quantize.xla import Mode
from pallas_kernels.sparse_matmul import choice

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
        reason="the CUDA plugin of JAX is not installed; `make test-compile` does",
    ),
]
# what XLA asks about a GPU that it compiles for, from the data sheet (the text form of its GpuTargetConfigProto)
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES } registers_per_core_limit: 65536
  registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a" device_address_bits: 64
  name: "NVIDIA H200" driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: "NVIDIA H200"
"""
N, K = 8192, 4096
SPECS = sorted({op.spec for op in OPS})


@pytest.fixture(scope="module")
def h200() -> Any:
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    return NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())


@pytest.mark.parametrize("spec", SPECS)
def test_registers_suffice_and_no_weight_is_decoded(
    spec: str, h200: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (hopper, preparation, choice):
        monkeypatch.setattr(module, "no_hopper", lambda: None)
    for module in (preparation, xla):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    weight = jq.prepare(random_weight(QuantSpec.parse(spec), N, K, 0))
    for tokens in (1, 16, 64, 256, 2048):
        x = jax.ShapeDtypeStruct((tokens, K), jnp.bfloat16, sharding=h200)
        packed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=h200), weight)
        with jax.set_mesh(h200.mesh):
            program = jax.jit(linear).lower(x, packed).compile()
        memory: Any = program.memory_analysis()
        # in flight: tokens quantized, reordered or in pieces, float32 sums to add entries to, sums of split inputs
        sums = 2 * 4 * N * tokens * ("+s" in spec) + 8 * 4 * N * tokens * (tokens <= 256)
        assert memory.temp_size_in_bytes <= 3 * K * tokens + sums + (1 << 20), tokens
    reports = [file.read_text() for file in tmp_path.glob("**/*ptxas*")]
    assert reports, os.listdir(tmp_path)
    for report in reports:
        # 256 tokens at a time beside tables take every register: 4 to 40 bytes, which cost nothing that was measured
        assert all(int(count) <= 40 for count in re.findall(r"(\d+) bytes spill", report)), report[-600:]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tokens_are_quantized_by_one_kernel_and_no_copies(dtype: str, h200: Any) -> None:
    kinds: list[tuple[bool, Mode]] = [(True, "kernel"), (False, "kernel"), (False, "simulation")]
    for tokens, (symmetric, mode) in itertools.product((1, 2048), kinds):
        x = jax.ShapeDtypeStruct((tokens, K), jnp.dtype(dtype), sharding=h200)
        run = functools.partial(quantize_rows, bits=8, symmetric=symmetric, mode=mode)
        with jax.set_mesh(h200.mesh):
            program = jax.jit(run).lower(x).compile().as_text() or ""
        _, _, body = program.partition("ENTRY")
        names = re.findall(r"^  (?:ROOT )?%\S+ = .*? ([a-z-]+)\(", body, re.MULTILINE)
        assert names.count("custom-call") == 1
        assert set(names) <= {"parameter", "bitcast", "custom-call", "get-tuple-element", "tuple"}, names
