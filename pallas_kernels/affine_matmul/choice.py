"""Which configuration a shape gets: a rule for each range of tokens, then the first candidate that fits."""

from dataclasses import replace

from pallas_kernels.affine_matmul.config import MULTIPROCESSORS, Config, Problem, runs_on, supported_config


def choose(problem: Problem) -> Config:
    """The configuration for a problem. ValueError if none fits."""
    for config in candidates(problem):
        if supported_config(problem, config) is None:
            return config
    raise ValueError(f"no configuration computes {problem}")


def rounds_weights(problem: Problem) -> bool:
    """Whether the chosen configuration scales weights of groups in 16 bits. Zero points make a group of a whole row."""
    grouped = problem.group_size is not None or problem.has_zeros
    return grouped and problem.x_bytes == 2 and choose(problem).scale == "operand"


def candidates(problem: Problem) -> list[Config]:
    """Configurations in order of preference; not all of them fit."""
    tokens = problem.tokens
    wide = next((width for width in (8, 16, 32, 64, 128) if tokens <= width), 128)
    found = []
    if tokens <= 16:
        for rows, parts, block_k in ((2, 2, 512), (2, 2, 256), (1, 4, 512), (1, 1, 128)):
            found += [_sized(problem, Config(wide, block_k, rows, parts))]
    elif tokens <= 64:
        for rows, parts, block_k in ((4, 1, 128), (2, 2, 256), (2, 1, 128)):
            found += [_sized(problem, Config(wide, block_k, rows, parts))]
    elif problem.x_bytes == 2 and tokens > 128:
        found += [_sized(problem, Config(256, block_k, 2, scale="operand")) for block_k in (128, 64)]
    elif problem.group_size is None and tokens > 128:
        found += [_sized(problem, Config(256, 128, 2))]
    if tokens > 64:
        found += [_sized(problem, Config(128, block_k, 2)) for block_k in (256, 128, 64)]
        if runs_on(problem):  # their sums leave registers for these; not measured yet
            found += [_sized(problem, config) for config in (Config(160, 128, 2), Config(96, 256, 3))]
    # whatever the group size: the smallest blocks
    found += [_sized(problem, Config(wide, block_k, 1)) for block_k in (128, 64)]
    return found


def _sized(problem: Problem, config: Config) -> Config:
    """The same blocks with as many stages as fit, and parts of the inputs so that every multiprocessor has work."""
    blocks = -(-problem.outputs // config.rows) * -(-problem.tokens // config.block_m)
    steps = -(-problem.inputs // config.block_k)
    splits = 1
    while blocks * splits * 2 <= MULTIPROCESSORS and steps >= splits * 4 and splits < 8:
        splits *= 2
    stages = max(2, min(8, steps // splits))
    while stages > 2 and supported_config(problem, replace(config, stages=stages)) is not None:
        stages -= 1
    return replace(config, stages=stages, splits=splits, blocks=min(config.blocks, blocks * splits))
