"""Which configuration a shape gets: a rule for each range of tokens, then the first candidate that fits."""

from dataclasses import replace

from pallas_kernels.affine_matmul.config import MULTIPROCESSORS, Config, Problem, supported_config


def choose(problem: Problem) -> Config:
    """The configuration for a problem. ValueError if none fits."""
    for config in candidates(problem):
        if supported_config(problem, config) is None:
            return config
    raise ValueError(f"no configuration computes {problem}")


def candidates(problem: Problem) -> list[Config]:
    """Configurations in order of preference; not all of them fit."""
    tokens = problem.tokens
    wide = next((width for width in (8, 16, 32, 64, 128) if tokens <= width), 128)
    found = []
    if tokens <= 16:
        for rows, parts, block_k in ((2, 2, 512), (2, 2, 256), (1, 4, 512), (1, 1, 128)):
            found.append(Config(wide, block_k, rows, parts))
    elif tokens <= 64:
        for rows, parts, block_k in ((4, 1, 128), (2, 2, 256), (2, 1, 128)):
            found.append(Config(wide, block_k, rows, parts, halves=2))
    elif problem.x_bytes == 2 and tokens > 128:
        found += [Config(256, block_k, 2, scale="operand") for block_k in (128, 64)]
    elif problem.group_size is None and tokens > 128:  # one set of sums: the wide block needs less of the L2 cache
        found.append(Config(256, 128, 2, halves=2))
    if tokens > 64:
        found += [Config(128, block_k, 2, halves=2) for block_k in (256, 128, 64)]
    # whatever the group size: the smallest blocks
    found += [Config(wide, block_k, 1) for block_k in (128, 64)]
    return [_sized(problem, choice) for config in found for choice in (replace(config, continuous=True), config)]


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
    # A stage that is returned late needs others to fill the time until its copy is there again.
    continuous = config.continuous and stages >= min(4, steps // splits)
    return replace(
        config, continuous=continuous, stages=stages, splits=splits, blocks=min(config.blocks, blocks * splits)
    )
