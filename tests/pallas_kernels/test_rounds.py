"""Every block of outputs is computed once: by one CTA, or by all of one cluster."""

from collections import Counter

import pytest

from pallas_kernels.affine_matmul.rounds import Rounds


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("ctas", [2, 6, 132])
@pytest.mark.parametrize("items", [1, 2, 5, 6, 7, 131, 132, 133, 224, 448])
def test_every_block_is_computed_once(items: int, ctas: int, cluster: int) -> None:
    rounds = Rounds(items, cluster, ctas)
    alone, together, longest = Counter[int](), Counter[tuple[int, int]](), 0.0
    for number in range(ctas // cluster):
        count = int(rounds.count(number))
        for rank in range(cluster):
            taken = [rounds.item(index, number, rank) for index in range(count)]
            alone.update(int(item) for item, shared in taken if not shared)
            together.update((int(item), rank) for item, shared in taken if shared)
            longest = max(longest, sum(1 / cluster if shared else 1 for _, shared in taken))
    assert set(alone.values()) | set(together.values()) == {1}
    shared = {item for item, _ in together}
    assert sorted([*alone, *shared]) == list(range(items))
    assert set(together) == {(item, rank) for item in shared for rank in range(cluster)}
    assert longest == rounds.turns
    # all CTAs are busy but for the last, shared round
    assert rounds.turns <= items / ctas + 1 / cluster + (cluster == 1)
