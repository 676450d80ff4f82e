"""Tokens to int8 codes in one pass: ranges, codes in the order the matrix kernels read, kept columns split off.

x [M, K], of which the k columns `index` (ascending) are kept as they are and the others, the base, are quantized token
by token; h = 2**(bits - 1), rounding half to even, ranges over the base columns of a token:

    symmetric                 s = max|x| / (h - 1)                              q = clip(round(x / s), -h, h - 1)
    asymmetric, "kernel"      s = max((max - min) / (2h - 1), 1e-6)             q = round((x - min) / s) - h
                              offset = min + h s
    asymmetric, "simulation"  range widened to 0, z = round(-min / s)           q = clip(round(x / s) + z, 0, 2h-1) - h
                              offset = s (h - z)

    x_hat = s q + offset      the quantizers of QUIK, arXiv 2310.09259, with its split and quantization in one pass

A token of zeros gives zeros, one with a value that is not finite gets codes 0 and scale NaN.

The codes lie in slots: base columns closed up, then in every 16 of them slot 4t + {0, 1, 2, 3} holds column
2t + {0, 8, 1, 9} (`pallas_kernels.fragments`), and behind the last one zeros up to a multiple of 64.

    codes int8 [M, P], P = K - k rounded up to 64      scales, offsets float32 [M, 1]      kept [M, k] in x's type

`xla` says it in jax.numpy (three kernels and two readings of x on a GPU, seven with kept columns); `rows` is the GPU
kernel: one launch, x read once, with quotients as IEEE rounds them; `xla` may divide by a reciprocal and then gives
another code to an entry on the edge between two.
"""

from pallas_kernels.activation_quantize.rows import (
    Config as Config,
    default_config as default_config,
    quantize_rows as quantize_rows,
    supported as supported,
)
from pallas_kernels.activation_quantize.xla import (
    MODES as MODES,
    Quantized as Quantized,
    num_slots as num_slots,
    quantize as quantize,
    slot_columns as slot_columns,
)
