"""Every stage of every block is computed once, and parts are handed to the CTA that has the beginning of the block."""

from collections import Counter, defaultdict

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.affine_matmul.stream_k import StreamK


@pytest.mark.parametrize("ctas", [1, 5, 6, 132])
@pytest.mark.parametrize("steps", [1, 3, 9, 64])
@pytest.mark.parametrize("items", [1, 2, 5, 6, 7, 24, 40, 131, 132, 133, 224, 300])
def test_every_stage_is_computed_once(items: int, steps: int, ctas: int) -> None:
    ctas = min(ctas, items * steps)
    ranges = StreamK(items, steps, ctas)
    every = jnp.arange(ctas)
    counts = np.asarray(ranges.count(every))
    owners, finished, given, most = {}, {}, defaultdict(list), Counter()
    for index in range(max(counts)):
        pieces = ranges.piece(index, every)
        arrays = [every, *pieces, ranges.others(*pieces, every)]
        for cta, item, first, count, others in np.stack(arrays, axis=1)[index < counts].tolist():
            assert count > 0 and first + count <= steps
            most[cta] += count
            for stage in range(first, first + count):
                assert owners.setdefault((item, stage), cta) == cta
            if first > 0:
                given[item].append(cta)
                assert index == ranges.own  # once: a CTA has room for one
            else:
                finished[item] = range(cta + 1, cta + 1 + others)
    assert sorted(owners) == [(item, stage) for item in range(items) for stage in range(steps)]
    assert sorted(finished) == list(range(items))
    for item, places in finished.items():
        assert sorted(given[item]) == list(places)
    assert max(most.values()) == round(ranges.turns * steps) < items * steps / ctas + 1
    assert max(len(places) for places in finished.values()) <= ranges.parts
