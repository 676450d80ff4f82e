"""The sparse product for few tokens on a Hopper GPU, gathered from shared memory, in one trip to memory.

    out[m, n] = y[m, n] + sum over the entries (n, k) of x[m, k] * value        `SparseRows`, see rows.py

A gather of 32 inputs anywhere touches about 28 lines of the L1 cache, which serves one a cycle: the 8000 entries that a
multiprocessor has of 28672 x 8192 at 0.45 % take 7000 cycles, 3.8 us. In shared memory 32 random words meet the same
bank three or four times. So a CTA copies all tokens there, and what else it needs is asked for before any of it is
there: its words lie in a place that follows from the shapes, whatever row they belong to.

    1. all threads ask for inputs, thread i for quads i, i + T, ... of the part, then for bounds of rows and y there
    2. inputs      -> shared memory [K, tokens], the tokens of an input side by side: one load gathers them
    3. barrier; a quad's four products -> sums float32 [C + H, tokens] in shared memory
    4. barrier; `lanes` neighbouring threads add up the quads of a row, add y, round and write
    5. long rows, if there are any: part, part + P, ... by one warpgroup each

Mosaic GPU has no gather. The kernel is one text of instructions with named operands, `token_text`, so that what tests
carry out on NumPy is what runs.
"""

import string
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.compat import Value
from pallas_kernels.sparse_matmul.rows import QUAD, SparseRows
from pallas_kernels.sparse_matmul.token_text import OUTPUTS, Shape, SharedConfig, kernel_text, rows_of_part

LARGEST_TOKENS = 8  # of 16 programs of rows take 17 us, two blocks of eight 19
_SHARED_BYTES = 232448 - 1024  # what a CTA can have, less what the compiler may want


def shape_of(x: Any, sparse: SparseRows, out_dtype: jax.typing.DTypeLike) -> Shape:
    part, halo = sparse.part()
    return Shape(
        tokens=x.shape[0],
        columns=x.shape[1],
        rows=sparse.starts.shape[0] - 1,
        quads=sparse.words.shape[0] // QUAD,
        parts=sparse.first_rows.shape[0] - 1,
        part=part,
        halo=halo,
        long_rows=sparse.long_rows.shape[0],
        dtype=jnp.dtype(x.dtype).name,
        out_dtype=jnp.dtype(out_dtype).name,
    )


def default_shared(shape: Shape) -> SharedConfig:
    """All tokens up to eight if shared memory holds them; three quads a thread, and all rows of a part at once."""
    block_m = min(pl.next_power_of_2(shape.tokens), 8)
    while block_m > 1 and shared_bytes(shape, SharedConfig(block_m, 8, 4)) > _SHARED_BYTES:
        block_m //= 2
    lanes = max(block_m, 4)
    threads = max(-(-(shape.part + shape.halo) // 3), lanes * rows_of_part(shape))
    return SharedConfig(block_m, min(max(-(-threads // compat.THREADS), 2), 8), lanes)


def shared_bytes(shape: Shape, config: SharedConfig) -> int:
    """What a CTA has of shared memory: inputs, sums and those of long rows, each in whole KiB."""
    each = 2 * shape.columns, 4 * (shape.part + shape.halo), 16 * config.warpgroups
    return sum(-(-config.block_m * size // 1024) * 1024 for size in each)


def no_shared_token(shape: Shape) -> str | None:
    """None if this kernel can serve the shape, else the reason."""
    if shape.dtype not in ("bfloat16", "float16"):
        return f"activations are {shape.dtype}, not bfloat16 or float16"
    if shape.out_dtype not in OUTPUTS:
        return f"outputs are {shape.out_dtype}, not bfloat16, float16 or float32"
    if shape.tokens > LARGEST_TOKENS:
        return f"{shape.tokens} tokens are more than {LARGEST_TOKENS}"
    if shape.tokens * shape.rows >= 2**30 or shape.quads >= 2**25:  # quads times 32 bytes, with a sign
        return "its places do not fit 32 bits"
    if shared_bytes(shape, SharedConfig(1, 8, 4)) > _SHARED_BYTES:
        return f"{shape.columns} inputs and {shape.part} quads exceed shared memory"
    return None


def add_from_shared(
    y: jax.Array, x: jax.Array, sparse: SparseRows, out_dtype: jax.typing.DTypeLike, config: SharedConfig
) -> jax.Array:
    """y [M, N] float32 plus x [M, K] times the entries transposed, rounded once; `no_shared_token` must be None."""
    shape = shape_of(x, sparse, out_dtype)
    arrays: dict[str, Any] = {"x": x, **sparse._asdict(), "y": y}
    if not shape.long_rows:
        arrays = {name: array for name, array in arrays.items() if not name.startswith("long_")}
    names = [*arrays, "out", "inputs", "sums", "totals"]
    text, constraints = _numbered(kernel_text(shape, config), names, ["thread", "part", "block"])

    @plgpu.inline_mgpu(arg_types=([plgpu.RefType()] * len(names), compat.SCALAR, compat.SCALAR))
    def run(_: Any, refs: list[Value], part: Any, block: Any) -> None:
        operands = [compat.address(ref) for ref in refs]
        operands += [compat.thread(), compat.scalar_of(part), compat.scalar_of(block)]
        compat.inline_assembly([], operands, text, constraints, False)

    def body(*refs: Any, inputs: Any, sums: Any, totals: Any) -> None:
        places = lax.axis_index("part"), lax.axis_index("block")
        run([*refs, inputs, sums, totals], *places)  # pyright: ignore[reportCallIssue]

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(y.shape, out_dtype),
        scratch_types={
            "inputs": plgpu.SMEM((shape.columns * config.block_m,), x.dtype),
            "sums": plgpu.SMEM(((shape.part + shape.halo) * config.block_m,), jnp.float32),
            "totals": plgpu.SMEM((4 * config.warpgroups * config.block_m,), jnp.float32),
        },
        grid=(shape.parts, pl.cdiv(shape.tokens, config.block_m)),
        grid_names=("part", "block"),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        compiler_params=compat.WARPGROUP,
    )(*arrays.values())


def _numbered(text: str, arrays: list[str], registers: list[str]) -> tuple[str, str]:
    """The text with its operands numbered, and their kinds: addresses, the last three in shared memory, integers."""
    names = [*arrays, *registers]
    kinds = ["l"] * (len(arrays) - 3) + ["r"] * (3 + len(registers))
    return string.Template(text).substitute({name: f"${i}" for i, name in enumerate(names)}), ",".join(kinds)
