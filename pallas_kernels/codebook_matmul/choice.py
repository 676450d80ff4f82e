"""Which products have a codebook kernel, and which configuration a shape gets: the one of the least estimated time.

A multiprocessor has three resources that one block of outputs uses at the same time: its share of the memory bandwidth,
the integer pipe for the look-ups, and the tensor core. The slowest of them is the time of a block; the blocks of a
multiprocessor follow each other, so the last, incomplete round counts whole. Sums of split inputs are written and read
once more, by another kernel.
"""

import functools
import itertools
import math
from dataclasses import replace

from pallas_kernels.affine_matmul.choice import few_stages
from pallas_kernels.affine_matmul.config import (
    MULTIPROCESSORS,
    Config,
    Problem,
    blocks_of,
    no_entries,
    no_kept_columns,
    no_own_token,
    supported_config,
)
from pallas_kernels.affine_matmul.rounds import Rounds
from pallas_kernels.affine_matmul.stream_k import StreamK
from pallas_kernels.codebook_matmul.decode import INTEGER_OPERATIONS
from pallas_kernels.int_matmul import LONGEST_SUM

# An H200, a nanosecond: the memory of all multiprocessors, and the most that one gets; else of one of them
_ALL_MEMORY_BYTES = 4300.0
_MEMORY_BYTES = 40.0
_CACHE_BYTES = 100.0
_INTEGER_OPERATIONS = 64 * 1.7
_PRODUCTS = 2048 * 1.7  # of 16 bits; twice as many of 8
_BLOCK = 700.0  # tables and outputs of a block
_STEP = 100.0  # barriers, and the tensor core running dry
_SECOND_KERNEL = 2500.0
_HAND_OVER = 1000.0  # between the CTAs of a cluster
_SEMAPHORES = 1500.0  # set to zero, for stream-K
_ASTRAY = 1.03  # reading different inputs at a time, CTAs find less in the cache
_PART = 0.13  # an output and token handed over by stream-K
_OVERHEAD = 0.12  # integer operations a weight beside the look-up


def supported(problem: Problem) -> str | None:
    """None, or the reason why no configuration computes `problem`, a whole-row one without zeros."""
    if reason := no_entries(problem) or no_kept_columns(problem) or no_own_token(problem):
        return reason
    if problem.bits not in (2, 3, 4):
        return f"bits={problem.bits} has no look-up in registers; expected 2, 3 or 4"
    if problem.x_dtype not in ("bfloat16", "float16", "int8"):
        return f"activations are {problem.x_dtype}; expected bfloat16, float16 or int8"
    if problem.inputs < 1 or problem.outputs < 1 or problem.tokens < 1:
        return f"nothing to multiply: M={problem.tokens}, N={problem.outputs}, K={problem.inputs}"
    if problem.pieces > 1 and (problem.tokens > 1 or problem.x_dtype != "int8" or problem.pieces > 8):
        return f"{problem.pieces} pieces of {problem.tokens} {problem.x_dtype} tokens; expected 8 of one, int8, at most"
    # of pieces too: every one has sums of its own, and they are added as float32
    if problem.x_dtype == "int8" and problem.inputs > LONGEST_SUM:
        return f"K={problem.inputs} products of 8 bits may exceed int32; expected at most {LONGEST_SUM}"
    return None


@functools.lru_cache(maxsize=1024)
def choose(problem: Problem, entry_bytes: int | None = None) -> Config:
    """The configuration of the least estimated time. ValueError if none fits.

    entry_bytes: of a table's entry, None if as many as of an input.
    """
    found = candidates(problem)
    if not found:
        raise ValueError(f"no configuration computes {problem}")
    return min(found, key=lambda config: estimate(problem, config, entry_bytes))


def candidates(problem: Problem) -> list[Config]:
    """The configurations that fit.

    Look-ups keep the integer pipe busy only if some warpgroup does not wait for the tensor core: with few tokens there
    are four that compute. With many, two take all registers.
    """
    few = problem.tokens <= 64
    widths = [width for width in (8, 16, 32, 64) if problem.tokens <= width][:1] if few else [128, 256]
    parts = ((4, 1), (2, 2), (1, 4)) if few else ((2, 1), (1, 2))
    sizes = (1024, 512, 256, 128) if few else (512, 256, 128)
    found = []
    # splits, cluster, stream-K; with many tokens clusters were slower, 1281 us for 1188 at 2048
    shared = [(splits, 1, False) for splits in (1, 2, 4, 8)] + [(1, 2, False)] * few
    shared += [(1, 1, True)] * (problem.tokens > 16)
    for width, (rows, k_parts), block_k, (splits, cluster, stream_k) in itertools.product(widths, parts, sizes, shared):
        blocks = -(-problem.outputs // (64 * rows)) * -(-problem.tokens // width) * splits
        steps = -(-problem.inputs // (block_k * splits))
        if splits * cluster > 1 and (steps < 2 * cluster or width == 256):
            continue
        stages = max(2, min(8, steps))
        ctas = MULTIPROCESSORS if cluster > 1 else min(blocks * steps if stream_k else blocks, MULTIPROCESSORS)
        config = Config(width, block_k, rows, k_parts, splits, stages, "sum", ctas, cluster, stream_k)
        while config.stages > 2 and supported_config(problem, config) is not None:
            config = replace(config, stages=config.stages - 1)
        if supported_config(problem, config) is None and not few_stages(problem, config):
            found.append(config)
    return found


def estimate(problem: Problem, config: Config, entry_bytes: int | None = None) -> float:
    """Nanoseconds that a product takes, roughly; good for comparisons only."""
    operations = INTEGER_OPERATIONS[problem.bits, entry_bytes or problem.x_bytes, problem.x_bytes]
    column_blocks = -(-problem.tokens // config.block_m)
    items = blocks_of(problem, config) * config.splits
    steps = -(-problem.inputs // (config.block_k * config.splits))
    weights = config.rows * steps * config.block_k
    x_bytes = config.block_m * steps * config.block_k * problem.x_bytes
    words = weights * problem.bits / 8
    # tokens of one block of outputs follow each other: only the first finds its words in memory alone
    share = min(_ALL_MEMORY_BYTES / min(items, config.blocks), _MEMORY_BYTES)
    memory = words / column_blocks / share + (words + x_bytes) / _CACHE_BYTES
    look_ups = weights * (operations + _OVERHEAD) / _INTEGER_OPERATIONS
    products = problem.planes * weights * config.block_m / (_PRODUCTS * (2 if problem.x_bytes == 1 else 1))
    # Few tokens hide their products behind the look-ups. Of 64 each warpgroup waits for its own, all in step; of more
    # two warpgroups hide most of one behind the other.
    computing = max(look_ups, products)
    if config.block_m >= 64:
        computing = look_ups + products if config.block_m == 64 else math.hypot(look_ups, products)
    whole = max(memory, computing) + steps * _STEP + _BLOCK
    if config.stream_k:
        ranges = StreamK(items, steps, config.blocks)
        time = _ASTRAY * ranges.turns * whole + _SEMAPHORES + _PART * config.rows * config.block_m * ranges.parts
    else:
        rounds = Rounds(items, config.cluster, config.blocks)
        time = rounds.turns * whole + rounds.shared * (config.cluster > 1) * _HAND_OVER
    time += (words / share + x_bytes / _CACHE_BYTES) / steps  # nothing to compute before the first stage
    if config.splits > 1:
        sums = config.splits * problem.tokens * problem.outputs * 4
        time += _SECOND_KERNEL + 2 * sums / _ALL_MEMORY_BYTES
    return time
