"""y[m, n] = sum over the stored entries (n, k) of x[m, k] * values: a compressed-row matrix times tokens.

values [nnz], columns [nnz], row_pointer int32 [N + 1] or rows int32 [nnz] ascending: the sparse residual of SqueezeLLM,
arXiv 2306.07629, about 0.45 % of all entries.

    gather_sum   jax.numpy, any device
    add_rows     GPU: y + the sum, entries as `prepare_rows` lays them out; the inputs of up to 8 tokens are gathered
                 from shared memory on a Hopper GPU (`SharedConfig`), else from the cache (`Config`)

`affine_matmul` and `codebook_matmul` can add the entries to their decoded weights instead: `prepare_tiles` lays them
out, `adder` adds them.
"""

from pallas_kernels.sparse_matmul.choice import add_rows as add_rows, supported as supported
from pallas_kernels.sparse_matmul.gather import gather_sum as gather_sum
from pallas_kernels.sparse_matmul.row_programs import Config as Config, default_config as default_config
from pallas_kernels.sparse_matmul.rows import SparseRows as SparseRows, prepare_rows as prepare_rows
from pallas_kernels.sparse_matmul.shared_token import (
    SharedConfig as SharedConfig,
    default_shared as default_shared,
    no_shared_token as no_shared_token,
    shape_of as shape_of,
)
from pallas_kernels.sparse_matmul.tiles import (
    EntryTiles as EntryTiles,
    entry_tiles_shape as entry_tiles_shape,
    prepare_tiles as prepare_tiles,
)
