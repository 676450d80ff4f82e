"""What differs between the JAX releases that the kernels run on (0.10.2, 0.11.2, 0.12.0.1), and what none promises.

Kernels say their lowering semantics aloud (`WARPGROUP`): the default was Lane up to 0.10.2 and is Warpgroup since. They
use `out_type` and `scratch_types`, the spelling that all releases share, and `ref[index]` instead of `plgpu.load`.

Code inside `plgpu.inline_mgpu` works on MLIR values. Everything of Mosaic GPU that it needs and that is not public is
collected here, so that a release that moves one of these names is met in one place. There, an array laid out by
`registers_layout(n)` is nothing but n 32-bit registers of every thread: element 128 i + th is register i of thread th.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as _utils
from jax.experimental.pallas import mosaic_gpu as plgpu

_mosaic: Any = _utils  # untyped, and where this file finds the MLIR bindings without naming jaxlib
ir, arith, gpu, llvm, _vector = _mosaic.ir, _mosaic.arith, _mosaic.gpu, _mosaic.llvm, _mosaic.vector

WARPGROUP = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
THREADS = 128  # of a warpgroup

Value = Any  # ir.Value; its stubs know too little to be checked against


def i32() -> Any:
    """The MLIR type of an integer register."""
    return ir.IntegerType.get_signless(32)


def i64() -> Any:
    """The MLIR type of an address in global memory."""
    return ir.IntegerType.get_signless(64)


def f32() -> Any:
    """The MLIR type of a float32 register."""
    return ir.F32Type.get()


def constant(value: int) -> Value:
    """An integer register, from a value in [-2**31, 2**32)."""
    return arith.constant(i32(), ir.IntegerAttr.get(i32(), value - 2**32 if value >= 2**31 else value))


def thread() -> Value:
    """The number of the thread in its CTA."""
    return arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x))


def thread_in_warpgroup() -> Value:
    """The number, 0..127, of the thread in its warpgroup."""
    return arith.andi(thread(), constant(THREADS - 1))


def warpgroup_barrier() -> None:
    """Waits for the other threads of the warpgroup."""
    _mosaic.warpgroup_barrier()


def address(ref: Value) -> Value:
    """The byte address of a memref as an integer register, of 32 bits in shared memory and of 64 in global memory."""
    place = _mosaic.memref_ptr(ref)
    width = 32 if llvm.PointerType(place.type).address_space == 3 else 64
    return llvm.ptrtoint(ir.IntegerType.get_signless(width), place)


def inline_assembly(results: list[Any], operands: list[Value], text: str, constraints: str, pure: bool) -> list[Value]:
    """PTX with operands $0.. (results first). Not pure: its place among other such statements and stores is kept."""
    if not results:
        result_type = ir.Type.parse("!llvm.void")
    else:
        result_type = results[0] if len(results) == 1 else llvm.StructType.get_literal(results)
    result: Any = llvm.inline_asm(result_type, operands, text, constraints, asm_dialect=0, has_side_effects=not pure)
    if len(results) <= 1:
        return [result] if results else []
    return [llvm.extractvalue(kind, result, [index]) for index, kind in enumerate(results)]


def registers_layout(count: int) -> Any:
    """The layout of an array of 128 * count elements that stands for `count` registers of every thread."""
    return plgpu.Layout.WG_STRIDED((THREADS * count,), vec_size=1)


def registers_type(count: int, dtype: Any) -> Any:
    """The return type of `inline_mgpu` for such an array."""
    return plgpu.ShapeDtypeStruct((THREADS * count,), jnp.dtype(dtype), layout=registers_layout(count))


SCALAR = plgpu.Layout.WG_SPLAT(())  # the argument type of a scalar


def registers_of(array: Any) -> list[Value]:
    """The registers of such an array."""
    first = ir.DenseI64ArrayAttr.get([0])
    return [_vector.extract(packed, dynamic_position=[], static_position=first) for packed in array.registers.flat]


def array_of(registers: list[Value]) -> Any:
    """The inverse of `registers_of`."""
    kind = ir.VectorType.get((1,), registers[0].type)
    packed = np.empty(len(registers), dtype=object)
    for index, register in enumerate(registers):
        packed[index] = _vector.broadcast(kind, register)
    signed = True if isinstance(registers[0].type, ir.IntegerType) else None
    layout = registers_layout(len(registers)).to_mgpu()
    return mgpu.FragmentedArray(_registers=packed, _layout=layout, _is_signed=signed)


def scalar_of(array: Any) -> Value:
    """The register of a scalar argument."""
    return array.registers.item()
