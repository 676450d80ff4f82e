"""Which blocks of outputs a CTA computes, in which order.

Blocks seldom come in multiples of the CTAs there are: N = 28672 in blocks of 128 are 1.7 rounds of 132, and the second
round takes as long as the first. So, in clusters, every CTA has as many blocks of its own as are there for all of them;
of the rest, each cluster takes one at a time, and its CTAs each a part of the inputs.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Which of `items` blocks a CTA computes, in which order: `own` alone, then what its cluster shares."""

    items: int
    cluster: int
    ctas: int

    @property
    def own(self) -> int:
        """How many blocks each CTA has for itself."""
        return self.items // self.ctas if self.cluster > 1 else 0

    @property
    def shared(self) -> int:
        """How many blocks the busiest cluster shares."""
        clusters = self.ctas // self.cluster
        return -(-(self.items - self.own * self.ctas) // clusters)

    @property
    def turns(self) -> float:
        """The time of all blocks, in blocks of one CTA."""
        return self.own + self.shared / self.cluster

    def count(self, cluster: Any) -> Any:
        """How many blocks a CTA of the cluster number `cluster` computes."""
        clusters = self.ctas // self.cluster
        rest = self.items - self.own * self.ctas
        return self.own + lax.div(rest + clusters - 1 - cluster, jnp.int32(clusters))

    def item(self, index: Any, cluster: Any, rank: Any) -> tuple[Any, Any]:
        """The block number `index` of a CTA, and whether its cluster shares it."""
        clusters = self.ctas // self.cluster
        together = self.own * self.ctas + cluster + (index - self.own) * clusters
        if not self.own:
            return together, self.cluster > 1
        shared = index >= self.own
        return jnp.where(shared, together, cluster * self.cluster + rank + index * self.ctas), shared
