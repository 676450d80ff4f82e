"""y = x_hat . w_hat^T where both sides are integer codes: the sum is exact, scales and zero points come after it.

With x [M, K] by token, w [N, K] by group g of consecutive inputs, all codes signed 8-bit (narrower ones are widened):

    x_hat[m, k] = x_scales[m] * x_codes[m, k] + x_offsets[m]
    w_hat[n, k] = w_scales[n, g] * (w_codes[n, k] - w_zeros[n, g])

    y[m, n] = x_scales[m]  * sum_g w_scales[n, g] * (acc[m, n, g] - w_zeros[n, g] * sum_{k in g} x_codes[m, k])
            + x_offsets[m] * R[n],   R[n] = sum_g w_scales[n, g] * sum_{k in g} (w_codes[n, k] - w_zeros[n, g])

acc[m, n, g] is the int32 dot product of the codes in group g. With one group a row and no zeros this is the epilogue of
QUIK (arXiv 2310.09259), whose asymmetric activations min + step * (q + 2**(bits - 1)) have the offset
min + 2**(bits - 1) * step. The epilogue is float32: QUIK's own float16 one overflows with 8-bit codes.

`xla` is the one path for now: matrix units on GPU and TPU, vector instructions on a CPU, the same integers everywhere.
"""

from pallas_kernels.int_matmul.xla import (
    LONGEST_SUM as LONGEST_SUM,
    code_sums as code_sums,
    integer_dot as integer_dot,
    quantized_matmul as quantized_matmul,
)
