"""What a CTA of the affine kernel computes: pieces of blocks, one after the other.

A block is config.rows outputs by block_m tokens; a piece is so many of its stages from some stage on. CTAs take whole
blocks in turn, or share some of them: clusters the last ones (`rounds`), all CTAs the last ones (`stream_k`), or
`splits` of them every one. Tokens vary first among blocks: those of the same outputs share the weights.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.affine_matmul import running_sums
from pallas_kernels.affine_matmul.config import Config, Problem, runs_on
from pallas_kernels.affine_matmul.rounds import Rounds
from pallas_kernels.affine_matmul.stream_k import StreamK


class Piece(NamedTuple):
    """Block number `item` is block `row` of outputs and `column` of tokens. Stages first.. first + stages, in so many
    segments of running sums; split: which of the parts of y; is_shared: by CTAs of a cluster. Who has stage 0 of a
    part finishes it."""

    item: Any
    row: Any
    column: Any
    split: Any
    first: Any
    stages: Any
    segments: Any
    is_shared: Any


class Pieces:
    """The pieces of the CTA `rank` of the cluster number `block`, a CTA by itself if there are no clusters."""

    def __init__(self, problem: Problem, config: Config, block: Any, rank: Any) -> None:
        self._problem, self._config, self._block, self._rank = problem, config, block, rank
        self._columns = -(-problem.tokens // config.block_m)
        self._steps = -(-problem.inputs // (config.block_k * config.splits))
        items = -(-problem.outputs // config.rows) * self._columns * config.splits
        self.rounds = Rounds(items, config.cluster, config.blocks)
        self.ranges = StreamK(items, self._steps, config.blocks)
        # of stream-K: CTAs wait for those of a higher number, which has to start first
        self.cta = config.blocks - 1 - block

    def count(self) -> Any:
        """How many there are."""
        return self.ranges.count(self.cta) if self._config.stream_k else self.rounds.count(self._block)

    def piece(self, index: Any) -> Piece:
        """The piece number `index`."""
        config, is_shared = self._config, False
        if config.stream_k:
            item, first, stages = self.ranges.piece(index, self.cta)
        else:
            item, is_shared = self.rounds.item(index, self._block, self._rank)
        split = lax.rem(item, jnp.int32(config.splits))
        pair = lax.div(item, jnp.int32(config.splits))
        row, column = lax.div(pair, jnp.int32(self._columns)), lax.rem(pair, jnp.int32(self._columns))
        if not config.stream_k:
            first, stages = self._inputs(split, is_shared)
        segments = running_sums.segments(config, stages) if runs_on(self._problem) else 0
        return Piece(item, row, column, split, first, self._turns(stages), self._turns(segments), is_shared)

    def _inputs(self, split: Any, is_shared: Any) -> tuple[Any, Any]:
        """The first stage of a part or of a cluster's share, and how many there are."""
        if self._config.cluster == 1:
            return split * self._steps, self._steps
        most = -(-self._steps // self._config.cluster)
        share = jnp.minimum(most, self._steps - self._rank * most)
        return jnp.where(is_shared, self._rank * most, 0), jnp.where(is_shared, share, self._steps)

    def _turns(self, count: Any) -> Any:
        """A number of turns of a loop. Mosaic fails on the registers that a loop carries once it knows there is one."""
        if isinstance(count, int) and count == 1:
            return jnp.where(self._block >= 0, jnp.int32(1), jnp.int32(0))
        return count
