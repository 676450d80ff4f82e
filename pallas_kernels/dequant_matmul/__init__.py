"""y = x . decode(codes)^T: a matrix product whose weights are decoded where they are used.

Two grids share one op. With x [M, K], codes q [N, K] as packed words, y [M, N]:

    affine     W[n, k] = scales[g(n, k)] * (q[n, k] - zeros[g(n, k)])
    codebook   W[n, k] = codebook[n or 0, q[n, k]]  (* scales[n])

`reference` is float32 and dense, the oracle; `streaming` is the XLA path for machines without wide matrix units,
which reads the packed words lane by lane and never holds a decoded matrix for few tokens.
"""

from pallas_kernels.dequant_matmul.streaming import (
    Affine as Affine,
    Codebook as Codebook,
    decode as decode,
    matvec as matvec,
)
