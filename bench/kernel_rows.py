"""Which products and configurations `bench.kernel_probe` runs."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from pallas_kernels import affine_matmul as affine, codebook_matmul as codebook
from pallas_kernels.codebook_matmul.choice import candidates, estimate

SHAPES = ((28672, 8192), (4096, 4096))
TOKENS = (1, 16, 64, 256, 2048)


@dataclasses.dataclass(frozen=True)
class Kind:
    name: str
    bits: int
    x: str
    group_size: int | None = 128
    zeros: bool = False
    entry: str | None = None  # the type of a table's entry; None: affine
    two_level: bool = False  # scales are whole multiples of a step a row


MAIN = (
    Kind("w4a16", 4, "bfloat16"),
    Kind("w4a8", 4, "int8"),
    Kind("w4a16-two-level", 4, "bfloat16", two_level=True),
    Kind("w4a8-two-level", 4, "int8", two_level=True),
)
MORE = (
    Kind("w8a8-row", 8, "int8", None),
    Kind("w8a16-row", 8, "bfloat16", None),
    Kind("w4a4-row", 4, "int8", None),
    Kind("w4a16-zeros", 4, "bfloat16", 128, True),
    Kind("w4a8-zeros", 4, "int8", 128, True),
    Kind("w3a16", 3, "bfloat16"),
    Kind("w2a16", 2, "bfloat16"),
    Kind("w8a16", 8, "bfloat16"),
    Kind("w4a16-f16", 4, "float16"),
)
TABLES = (
    Kind("w4a16-int8-table", 4, "bfloat16", None, entry="int8"),
    Kind("w4a16-int8-table-f16", 4, "float16", None, entry="int8"),
    Kind("w4a8-int8-table", 4, "int8", None, entry="int8"),
    Kind("w4a16-table", 4, "bfloat16", None, entry="bfloat16"),
    Kind("w3a16-table", 3, "bfloat16", None, entry="bfloat16"),
    Kind("w3a16-int8-table", 3, "bfloat16", None, entry="int8"),
    Kind("w3a8-int8-table", 3, "int8", None, entry="int8"),
)
COMPARED = 10  # configurations of a table beside the chosen one


@dataclasses.dataclass(frozen=True)
class Row:
    n: int
    k: int
    m: int
    kind: Kind
    config: affine.Config | None  # None: what `choose` gives

    def name(self) -> str:
        if self.config is None:
            return f"{self.kind.name} M={self.m} N={self.n} K={self.k} chosen"
        c = self.config
        blocks = f"{c.block_m}x{c.block_k} wg {c.row_warpgroups}x{c.k_warpgroups} cl {c.cluster}"
        blocks += " stream-k" if c.stream_k else ""
        return f"{self.kind.name} M={self.m} N={self.n} K={self.k} {blocks} /{c.splits} st {c.stages} {c.scale}"


def entry_bytes(kind: Kind) -> int:
    return jnp.dtype(kind.entry).itemsize


def in_pieces(row: Row) -> bool:
    """Whether the token is multiplied as three of int8, which the kernel makes of it."""
    return row.m == 1 and row.kind.x == "bfloat16" and row.kind.entry is not None


def problem_of(row: Row) -> affine.Problem:
    kind = row.kind
    if in_pieces(row):
        more: dict[str, Any] = {"pieces": codebook.PIECES, "planes": entry_bytes(kind), "token_dtype": kind.x}
        return affine.Problem(1, row.n, row.k, kind.bits, None, False, "int8", "float32", **more)
    scales = "uint8" if kind.two_level else "bfloat16" if kind.entry is None else "float32"
    return affine.Problem(row.m, row.n, row.k, kind.bits, kind.group_size, kind.zeros, kind.x, scales)


def chosen(row: Row) -> affine.Config:
    """What a product takes without being told."""
    if row.kind.entry is None:
        return affine.choose(problem_of(row))
    return codebook.choose(problem_of(row), entry_bytes(row.kind))


Cut = tuple[int, int, int, int, int, int]  # block_m, block_k, row and k warpgroups, splits, cluster


def cuts(kind: Kind, m: int, n: int) -> list[Cut]:
    """The configurations worth comparing, the best first; many fit one of the two shapes only."""
    whole = n > 132 * 64  # blocks of 64 outputs are enough for all multiprocessors
    if m <= 16:
        width = 8 if m <= 8 else 16
        shared = ((512, 1, 4, 1, 2), (1024, 1, 4, 1, 2), (2048, 1, 4, 1, 2))
        alone = ((512, 2, 2, 1, 1), (256, 4, 1, 1, 1)) if whole else ((512, 2, 2, 4, 1), (512, 1, 4, 1, 1))
        return [(width, *rest) for rest in (*shared, *alone)]
    if m <= 64:
        width = 32 if m <= 32 else 64
        shared = ((256, 2, 2, 1, 2), (256, 1, 4, 1, 2))
        alone = (
            ((128, 4, 1, 1, 1), (256, 2, 2, 1, 1), (128, 2, 1, 1, 1), (128, 3, 1, 1, 1))
            if whole
            else ((128, 4, 1, 8, 1), (512, 1, 4, 1, 1))
        )
        return [(width, *rest) for rest in (*shared, *alone)]
    if kind.x != "int8":
        widths = [(256, 2), (224, 2), (192, 2), (160, 2), (128, 2), (192, 3), (160, 3), (128, 3)]
        return [*((width, 128, rows, 1, 1, 1) for width, rows in widths), (128, 128, 2, 1, 1, 2)]
    shared = [(128, 128, 2, 1, 1, 2), (128, 256, 2, 1, 1, 2), (96, 256, 3, 1, 1, 2)]
    alone = [(128, 256, 2), (128, 128, 2), (96, 256, 3), (96, 128, 3), (128, 128, 3), (160, 128, 2), (160, 256, 2)]
    alone += [(192, 128, 2), (192, 256, 2), (176, 256, 2)]
    return [*shared, *((*cut, 1, 1, 1) for cut in [*alone, (64, 256, 3), (256, 128, 2)])]


def compared(row: Row) -> Iterator[affine.Config]:
    kind, m, n = row.kind, row.m, row.n
    if kind.entry is not None:
        problem, size = problem_of(row), entry_bytes(kind)
        best = sorted(candidates(problem), key=lambda config: estimate(problem, config, size))
        yield from best[1 : 1 + COMPARED]
        return
    for block_m, block_k, rows, parts, splits, cluster in cuts(kind, m, n):
        items = -(-n // (64 * rows)) * -(-m // block_m)
        blocks = 132 if cluster > 1 else min(132, items * splits)
        for scale in ("operand", "sum") if kind.x != "int8" and m > 16 else ("sum",):
            config = affine.Config(block_m, block_k, rows, parts, splits, 0, scale, blocks, cluster)
            yield config
            if cluster == 1 and splits == 1:
                yield dataclasses.replace(config, stream_k=True, blocks=min(132, items * (row.k // block_k)))


def filled(row: Row) -> Row | None:
    """The row with as many stages as fit, None if nothing does."""
    if row.config is None or row.config.stages:
        return row
    most = max(2, min(8, row.k // row.config.block_k // row.config.splits))
    for stages in range(most, 1, -1):
        config = dataclasses.replace(row.config, stages=stages)
        if affine.supported_config(problem_of(row), config) is None:
            return dataclasses.replace(row, config=config)
    return None


def rows(
    kinds: Sequence[Kind], tokens: Sequence[int], shapes: Sequence[tuple[int, int]], all_configs: bool
) -> list[Row]:
    """What `choose` gives for every case, followed, if wanted, by other configurations. Cases come by shape and kind,
    whose arrays are then made once."""
    found = []
    for (n, k), kind, m in itertools.product(shapes, kinds, tokens):
        found.append(Row(n, k, m, kind, None))
        for config in compared(found[-1]) if all_configs else ():
            full = filled(Row(n, k, m, kind, config))
            if full is not None and full.config != chosen(full):
                found.append(full)
    return list({row.name(): row for row in found}.values())
