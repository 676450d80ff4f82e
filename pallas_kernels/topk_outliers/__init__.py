"""Which entries of a token are its `count` largest and its `count` smallest values: KLLM's dynamic outliers.

    x [M, K], finite -> mask [M, K]:  x[m, k] is among the count largest, or among the count smallest, of x[m]
                                      among equals the lower index, at both ends; -0 equals 0

KLLM, arXiv 2507.23035, keeps them in full precision. Sorting a token to find them is slow on a GPU; here the two
thresholds are found bit by bit. With u the floats as integers of the same order, the count-th largest value t has

    t = max { v : #{k : u[k] >= v} >= count }

so every bit of t, from the highest, is decided by counting once; and the index up to which entries equal to t are taken
is found in the same way. The smallest are the largest of the complements. 16 (bfloat16), 19 (float16) or 32 steps for
the value and log2 K for the index, no sort, exact.

`mask_xla` loops in jax.numpy, on any device; `mask_rows` is the GPU kernel, a token in registers, one launch.
"""

from pallas_kernels.topk_outliers.rows import (
    mask_rows as mask_rows,
    supported as supported,
)
from pallas_kernels.topk_outliers.xla import mask_xla as mask_xla
