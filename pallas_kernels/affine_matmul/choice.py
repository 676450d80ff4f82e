"""Which configuration a shape gets: the first candidate that fits, in an order that was found on an H200.

Up to 64 tokens rules say what comes first. With more, the tensor core's time counts: of blocks of different size those
of the least estimated time, from what was measured: rounds over all multiprocessors, an incomplete last one counted
whole unless CTAs share it, what sharing costs, and the launch that comes before.
"""

from dataclasses import replace

from pallas_kernels.affine_matmul.config import MULTIPROCESSORS, Config, Problem, blocks_of, runs_on, supported_config
from pallas_kernels.affine_matmul.rounds import Rounds
from pallas_kernels.affine_matmul.stream_k import StreamK

# Blocks for many tokens, and their time for an output and a token beside that of the first, at 2048 tokens of 8192
# inputs: of 16-bit tokens, of 8-bit tokens with groups, and without.
_WIDE = (
    (Config(256, 128, 2, scale="operand"), 1.0),
    (Config(128, 128, 3, scale="operand"), 1.0),
    (Config(192, 128, 3, scale="operand"), 0.96),
    (Config(160, 128, 2, scale="operand"), 1.03),
    (Config(128, 128, 2, scale="operand"), 1.16),
    (Config(128, 128, 2), 1.16),
    (Config(128, 128, 2, cluster=2), 1.17),
)
_GROUPS = (
    (Config(128, 256, 2), 1.02),
    (Config(128, 256, 2, cluster=2), 1.02),
    (Config(96, 256, 3), 1.06),
    (Config(160, 256, 2), 1.0),
    (Config(192, 128, 2), 0.94),
)
_ROWS = (
    (Config(256, 128, 2), 1.0),
    (Config(160, 256, 2), 1.07),
    (Config(128, 128, 3), 1.12),
    (Config(128, 128, 2), 1.2),
    (Config(128, 128, 2, cluster=2), 1.18),
)
# Microseconds, of 16-bit tokens, 8-bit tokens with groups, and without:
_PRODUCT = {"16 bits": 3.2e-7, "groups": 2.0e-7, "8 bits": 1.55e-7}  # an output, token and input of the first blocks
_CLUSTER = {"16 bits": 1.9e-4, "groups": 5e-4, "8 bits": 4e-4}  # an output and token of a block shared by a cluster
_STREAM_K = {"16 bits": 1.2e-4, "groups": 2.5e-4, "8 bits": 4e-4}  # the same by stream-K, one part; half for another
_SEMAPHORES = 1.5  # set to zero, for stream-K
_KERNEL, _SPLIT = 2.5, 2e-6  # that adds sums of split inputs: a launch, an output and token of each
_HALF, _TOKEN = 1.2, 6e-7  # bfloat16 tokens made float16: a launch, a token and input
# Factors
# by stream-K: CTAs that read different inputs at a time find less in the cache
_ASTRAY = {"16 bits": 1.05, "groups": 1.03, "8 bits": 1.03}
_TWO_STAGES = 1.03  # hide less of a copy's latency
_SMALL_GROUPS = 1.1  # sums of groups of 64
_ENTRIES = 15.0  # sparse entries cost a block of so many tokens as much again as its products


def choose(problem: Problem) -> Config:
    """The configuration for a problem. ValueError if none fits."""
    for config in candidates(problem):
        if supported_config(problem, config) is None:
            return config
    raise ValueError(f"no configuration computes {problem}")


def rounds_weights(problem: Problem) -> bool:
    """Whether the chosen configuration scales weights of groups in 16 bits. Zero points make a group of a whole row."""
    return _may_round(problem) and problem.x_bytes == 2 and choose(problem).scale == "operand"


def _may_round(problem: Problem) -> bool:
    """Whether scaled 16-bit weights would be rounded."""
    return (problem.group_size is not None or problem.has_zeros) and not problem.two_level


def few_stages(problem: Problem, config: Config) -> bool:
    """Whether a token that the kernel quantizes, which is there for all stages at once, leaves room for two of them
    where three would be used: two do not hide the latency of a copy."""
    return bool(problem.token_dtype) and config.stages == 2 < -(-problem.inputs // (config.block_k * config.splits))


def candidates(problem: Problem) -> list[Config]:
    """Configurations in order of preference; not all of them fit."""
    tokens = problem.tokens
    wide = next((width for width in (8, 16, 32, 64, 128) if tokens <= width), 128)
    if tokens <= 64:
        found = _few(problem, wide)
    else:
        found = _many(problem) + [_sized(problem, Config(128, block_k, 2)) for block_k in (256, 128, 64)]
    # whatever the group size: the smallest blocks, and those whose zero points fill a copy
    return found + [_sized(problem, Config(wide, block_k, rows)) for rows in (1, 2) for block_k in (128, 64)]


def _few(problem: Problem, wide: int) -> list[Config]:
    tokens, blocks = problem.tokens, -(-problem.outputs // 64)
    found = []
    if blocks > MULTIPROCESSORS:
        if problem.x_bytes == 2 and tokens <= 16:
            found += [Config(wide, 1024, 1, 4, cluster=2)]
        elif problem.x_bytes == 2 and blocks > 2 * MULTIPROCESSORS:
            # blocks of 256 outputs leave some multiprocessors idle; fewer of them would be cut too small. With up to 32
            # tokens sharing them pays for decoding that takes long: of 2 or 3 bits, or with entries added
            if tokens > 32 or problem.bits < 4 or problem.entry_words:
                found += [Config(wide, 128, 4, stream_k=True)]
        elif problem.x_bytes == 2:  # one round of blocks of 128 outputs
            idle = 3 * -(-blocks // 2) <= 2 * MULTIPROCESSORS
            if problem.bits == 8 and tokens > 32:  # more stages than of larger blocks
                found += [Config(wide, 128, 2, stream_k=idle)]
            elif idle and problem.bits < 8:
                found += [Config(wide, 256, 2, 2, stream_k=True)]
    elif 2 * blocks >= MULTIPROCESSORS - 8:  # blocks of 64 outputs for half of the multiprocessors
        if problem.x_bytes == 1 and problem.inputs <= 4096:
            return [_sized(problem, Config(wide, block_k, 1, 4), parts=False) for block_k in (512, 256)]
        if problem.x_bytes == 2 and problem.bits == 8 and tokens > 32 and blocks > 64:
            found += [Config(wide, 256, 2, 2, cluster=2)]
        if tokens > 16:
            found += [Config(wide, 256, 1, 4, cluster=2)]
    shapes: tuple[tuple[int, int, int], ...] = ((2, 2, 512), (2, 2, 256), (1, 4, 512), (1, 1, 128))
    if tokens > 16 and problem.x_bytes == 1 and problem.bits < 8:
        shapes = ((4, 1, 256), (4, 1, 128), (2, 2, 256))
    elif tokens > 16:
        shapes = ((2, 2, 256), (4, 1, 128))
    elif tokens > 8 and problem.x_bytes == 1 and blocks > MULTIPROCESSORS:
        shapes = ((4, 1, 256), *shapes)
    elif (
        problem.token_dtype
        and problem.bits < 8
        and not problem.has_zeros
        and 3 * MULTIPROCESSORS < blocks <= 4 * MULTIPROCESSORS
    ):
        shapes = ((4, 1, 512), *shapes)  # one round
    found += [Config(wide, block_k, rows, parts) for rows, parts, block_k in shapes]
    if problem.two_level and problem.x_bytes == 2 and tokens > 32:  # with fewer, multiplying sums takes less time
        found = [replace(config, scale="operand") for config in found]
    found = [_shared(problem, config) if config.stream_k else _sized(problem, config) for config in found]
    return sorted(found, key=lambda config: few_stages(problem, config))


def _many(problem: Problem) -> list[Config]:
    """Blocks for many tokens, the fastest first."""
    blocks = {"16 bits": _WIDE, "groups": _GROUPS, "8 bits": _ROWS}[_kind(problem)]
    timed = [(_sized(problem, config), time) for config, time in blocks]
    timed += [(_shared(problem, config), time) for config, time in blocks if config.cluster == 1]
    return [config for config, _ in sorted(timed, key=lambda pair: _time(problem, *pair))]


def _kind(problem: Problem) -> str:
    return "16 bits" if problem.x_bytes == 2 else "groups" if runs_on(problem) else "8 bits"


def _time(problem: Problem, config: Config, each: float) -> float:
    """Microseconds of a product, about; `each`: of an output and token, beside the first blocks."""
    kind = _kind(problem)
    items, block = blocks_of(problem, config) * config.splits, config.rows * config.block_m
    whole = each * block * problem.inputs * _PRODUCT[kind] * (_TWO_STAGES if config.stages == 2 else 1)
    if problem.entry_words:
        whole *= 1 + _ENTRIES / config.block_m
    before = 0.0
    if _may_round(problem) and config.scale == "operand" and problem.x_dtype == "bfloat16":
        before = _HALF + _TOKEN * problem.tokens * problem.inputs
    elif kind == "16 bits" and (problem.group_size or 128) < 128 and not problem.two_level:
        whole *= _SMALL_GROUPS
    if config.stream_k:
        ranges = StreamK(items, -(-problem.inputs // config.block_k), config.blocks)
        shared = _SEMAPHORES + _STREAM_K[kind] * block * (1 + ranges.parts) / 2 if ranges.units else 0
        return before + _ASTRAY[kind] * ranges.turns * whole + shared
    rounds = Rounds(items, config.cluster, config.blocks)
    shared = rounds.shared * block * _CLUSTER[kind] if config.cluster > 1 else 0
    if config.splits > 1:
        shared = _KERNEL + _SPLIT * config.splits * problem.tokens * problem.outputs
    return before + rounds.turns / config.splits * whole + shared


def _shared(problem: Problem, config: Config) -> Config:
    """The same blocks, the last of them shared by all CTAs."""
    stages = blocks_of(problem, config) * -(-problem.inputs // config.block_k)
    alone = _sized(problem, replace(config, stream_k=False), parts=False)
    return replace(alone, stream_k=True, blocks=min(MULTIPROCESSORS, stages))


def _sized(problem: Problem, config: Config, parts: bool = True) -> Config:
    """The same blocks with as many stages as fit, and, if `parts`, so many parts of the inputs that every
    multiprocessor has work."""
    blocks = blocks_of(problem, config)
    steps = -(-problem.inputs // config.block_k)
    splits = 1
    while parts and config.cluster == 1 and blocks * splits * 2 <= MULTIPROCESSORS and steps >= splits * 4:
        if splits == 8:
            break
        splits *= 2
    most = max(2, min(8, steps // splits))
    config = _staged(problem, config, most)
    if problem.kept_columns and config.stages < min(3, most):
        # two stages do not hide the latency of a copy, and all inputs pass through them
        config = max(config, _staged(problem, replace(config, kept_places=1), most), key=lambda c: c.stages)
    ctas = min(MULTIPROCESSORS, blocks * splits * config.cluster)
    return replace(config, splits=splits, blocks=ctas)


def _staged(problem: Problem, config: Config, most: int) -> Config:
    """The same with as many stages as fit, 2 to `most`."""
    config = replace(config, stages=most)
    while config.stages > 2 and supported_config(problem, config) is not None:
        config = replace(config, stages=config.stages - 1)
    return config
