"""Whether the weights of groups can be float16, which has more mantissa than bfloat16 and less range.

A kernel that scales weights in 16 bits makes float16(float16(scales[g, n]) * (codes[n, k] - zeros[g, n])). That errs by
2**-11 of a weight at most if nothing goes wrong: a product that overflows is infinite, a scale below 6e-5 has fewer
bits or none. A product below 6e-5 is exact: a whole number of 2**-24, like the scale. So two facts about the scales
decide. A sparse entry is added to the code, in units of the scale: the product is no whole number of anything then, and
what becomes of the scale becomes of the entry.
"""

from typing import Any

import numpy as np

_LARGEST = float(np.finfo(np.float16).max)
_SUBNORMAL = 2.0**-24  # all numbers are multiples of it
_ROUNDING, _BFLOAT16_ROUNDING = 2.0**-11, 2.0**-9


def fits_half(scales: Any, bits: int) -> bool:
    """Whether scales [G, N] times codes of `bits` bits less zero points do without harm in float16. On the host, once.

    No product overflows, and rounding the scales changes those of no output n by more than 2**-11 in root mean square:
    scales of groups that hardly count beside others of the same output may be lost.
    """
    exact = np.abs(np.asarray(scales).astype(np.float32))
    if not np.all(exact * 2.0**bits <= _LARGEST):  # NaN is not, either
        return False
    if scales.dtype == np.float16:
        return True
    largest = np.max(exact, axis=0)
    unit = np.where(largest > 0, largest, 1)
    changes = np.sum(((exact.astype(np.float16).astype(np.float32) - exact) / unit) ** 2, axis=0)
    return bool(np.all(changes <= _ROUNDING**2 * np.sum((exact / unit) ** 2, axis=0)))


def entries_fit_half(values: Any, row: Any, group: Any, scales: Any, bits: int) -> bool:
    """Whether sparse entries values [nnz], of outputs row [nnz] and groups group [nnz], do so, too. On the host, once.

    scales [G, N] as above. Nothing overflows, neither in units of the scale nor times the scale, and no entry changes
    by more than 2**-9 of itself, as in bfloat16, and of the largest scale of its output, a step of its other weights.
    """
    exact = np.abs(np.asarray(scales).astype(np.float32))
    value, scale, step = np.abs(np.asarray(values).astype(np.float32)), exact[group, row], np.max(exact, axis=0)[row]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        units = value / scale
        changes = units * np.abs(scale.astype(np.float16).astype(np.float32) - scale) + _SUBNORMAL / 2
    fit = (units + 2.0**bits <= _LARGEST) & (value + scale * 2.0**bits <= _LARGEST)
    return bool(np.all(fit & (changes <= _BFLOAT16_ROUNDING * (value + step))))
