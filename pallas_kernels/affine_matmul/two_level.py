"""Scales in two levels: those of a row are whole multiples of one step.

    scales[n, g] = steps[n] * multiples[n, g],     multiples 0 .. 16

Operands are then codes less 2**(bits - 1) times multiples: up to 4 bits these fit a byte, and a bfloat16 without being
rounded, and the sums of a whole row have one scale. So groups cost what decoding them costs: no multiply-add of sums a
group, and tokens need not become float16, beside which weights are rounded less. The idea is QServe's (arXiv
2405.04532, section 4.2), without zero points; that four codes at once can be multiplied and do not carry is
LiquidGEMM's (arXiv 2509.01229).
"""

from typing import Any

import numpy as np

from pallas_kernels.affine_matmul.config import MOST_MULTIPLES

_FEW = 64  # rows


def split_scales(scales: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """(multiples uint8 [N, G], steps [N] of the type of `scales`) of scales [N, G], exactly; None if a row has no step.
    On the host, once.

    A row whose largest scale is c steps is tried for c = 1, 2 .. 16, so the step is the largest there is. No scale is
    rounded: multiples times steps are the scales, bit for bit.
    """
    if len(scales) > _FEW and split_scales(scales[:_FEW]) is None:  # most weights have none, and models many weights
        return None
    exact = np.asarray(scales).astype(np.float32)
    if not (np.all(np.isfinite(exact)) and np.all(exact >= 0)):
        return None
    largest = np.max(exact, axis=1, initial=0.0)
    multiples, steps = np.zeros(exact.shape, np.uint8), np.zeros(largest.shape, np.float32)
    open_rows = np.flatnonzero(largest > 0)
    for count in range(1, MOST_MULTIPLES + 1):
        step = largest[open_rows] / np.float32(count)
        own = exact[open_rows]
        found = np.rint(own / step[:, None])
        kept = step.astype(scales.dtype).astype(np.float32) == step
        done = kept & np.all(found * step[:, None] == own, axis=1)
        multiples[open_rows[done]], steps[open_rows[done]] = found[done].astype(np.uint8), step[done]
        open_rows = open_rows[~done]
        if not open_rows.size:
            return multiples, steps.astype(scales.dtype)
    return None
