"""Sparse entries by row, for a product of their own: the layout that the kernels read.

An entry is one word, column << 16 | float16 bits. A row's entries are padded to a multiple of 4, a quad, one load of 16
bytes, by entries of value 0 in a column that the row has anyway:

    words       uint32 [E]          rows in order, without those of more than `longest_row` entries
    starts      int32 [N + 1]       row n is words [4 starts[n], 4 starts[n + 1]); a long row is empty here, and marked
                                    by the sign bit of its start
    first_rows  int32 [P + 1]       rows first_rows[p] .. first_rows[p + 1] - 1 are those of part p
    long_words  uint32 [F]          the long rows
    long_rows   int32 [L]           which they are, and N for none
    long_starts int32 [L + 1]       where they lie in long_words, as starts

E, F and L are rounded up, so that layers with nearly as many entries share a compiled program.

Parts are for a kernel that reads words before it knows where rows start: it follows from the shapes alone that the rows
of part p lie in quads [p C, p C + C + H), where C = E / 4P, rounded up, and H is what a row in `words` has at most.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LARGEST_K = 65536  # a column has 16 bits
LONG = -(1 << 31)  # the mark of a long row in `starts`
QUAD = 4
_MULTIPROCESSORS = 132
_LARGEST_PART = 3072  # quads, three a thread
_MOST_ROWS = 256  # of a part


class SparseRows(NamedTuple):
    """Entries by row, as drawn above."""

    words: jax.Array
    starts: jax.Array
    first_rows: jax.Array
    long_words: jax.Array
    long_rows: jax.Array
    long_starts: jax.Array

    def part(self) -> tuple[int, int]:
        """(C, H): quads that begin in a part, and what a row may have behind them."""
        words = self.words.shape[0], self.long_words.shape[0]
        return _part(words, self.starts.shape[0] - 1, self.first_rows.shape[0] - 1)


def prepare_rows(
    values: np.ndarray, columns: np.ndarray, row_pointer: np.ndarray, *, parts: int | None = None
) -> SparseRows:
    """The entries of a compressed-row matrix in the order above. Once, after loading; NumPy.

    values float16 [nnz], columns [nnz] below 65536, row_pointer [N + 1]. parts: a number that suits an H200 if None.
    ValueError if values are not float16 or a column does not fit.
    """
    values, columns, pointer = np.asarray(values), np.asarray(columns), np.asarray(row_pointer, np.int64)
    if values.dtype != np.float16:
        raise ValueError(f"sparse values are {values.dtype}; expected float16, entries are packed in one word")
    if columns.size and int(columns.max()) >= LARGEST_K:
        raise ValueError(f"column {int(columns.max())} has no 16 bits; expected below {LARGEST_K}")
    counts = np.diff(pointer)
    rows, quads = counts.size, -(-counts // QUAD)
    long_rows = np.flatnonzero(counts > _longest_row(int(quads.sum()) * QUAD, rows))
    short = quads.copy()
    short[long_rows] = 0
    starts = np.concatenate([[0], np.cumsum(short)])
    long_starts = np.concatenate([[0], np.cumsum(quads[long_rows])])
    size, long_size = (_rounded(int(bounds[-1]) * QUAD) for bounds in (starts, long_starts))
    size = max(size, QUAD if long_size else 0)  # something to read, if all rows are long
    first = starts[:-1].copy()
    first[long_rows] = long_starts[:-1] + size // QUAD

    entries = columns.astype(np.uint32) << 16 | values.view(np.uint16).astype(np.uint32)
    # every slot of a row repeats its last entry's column; the entries then overwrite all but the padding
    words = np.zeros(size + long_size, np.uint32)
    row = np.repeat(np.arange(rows), quads * QUAD)
    slot = np.arange(row.size) - np.repeat(np.cumsum(quads) - quads, quads * QUAD) * QUAD
    if entries.size:
        words[first[row] * QUAD + slot] = entries[pointer[row + 1] - 1] & np.uint32(0xFFFF0000)
        row = np.repeat(np.arange(rows), counts)
        words[first[row] * QUAD + np.arange(row.size) - pointer[row]] = entries
    none = (1 << (long_rows.size - 1).bit_length()) - long_rows.size if long_rows.size else 0
    parts = parts or _parts_of(size, rows)
    first_rows = _first_rows(starts, parts, *_part((size, long_size), rows, parts))
    starts[long_rows] |= LONG
    long_rows = np.pad(long_rows, (0, none), constant_values=rows)
    long_starts = np.pad(long_starts, (0, none), mode="edge")
    return SparseRows(
        words=jnp.asarray(words[:size]),
        starts=jnp.asarray(starts.astype(np.int32)),
        first_rows=jnp.asarray(first_rows.astype(np.int32)),
        long_words=jnp.asarray(words[size:]),
        long_rows=jnp.asarray(long_rows.astype(np.int32)),
        long_starts=jnp.asarray(long_starts.astype(np.int32)),
    )


def _part(words: tuple[int, int], rows: int, parts: int) -> tuple[int, int]:
    """(C, H) of so many words, and words of long rows."""
    return -(-words[0] // (QUAD * parts)), _longest_row(sum(words), rows) // QUAD


def _longest_row(words: int, rows: int) -> int:
    """Beyond twice the mean a row gets a program of its own; there are at most half as many of them as rows."""
    return max(64, -(-2 * words // (32 * max(rows, 1))) * 32)


def _parts_of(words: int, rows: int) -> int:
    """As many for every multiprocessor, two or more, each of which holds what its threads take at once."""
    most = max(-(-words // (QUAD * _LARGEST_PART)), -(-rows // _MOST_ROWS), 1)
    return -(-most // (2 * _MULTIPROCESSORS)) * 2 * _MULTIPROCESSORS


def _first_rows(starts: np.ndarray, parts: int, size: int, halo: int) -> np.ndarray:
    """Rows shared evenly where that is free: those without entries, and what H leaves."""
    rows = starts.size - 1
    full = np.flatnonzero(np.diff(starts))
    number = np.arange(1, parts)
    # a row that begins before the part belongs to an earlier one, a row too far behind its beginning to this or a later
    least = np.append(0, full + 1)[np.searchsorted(starts[full], number * size)]
    most = np.append(full, rows)[np.searchsorted(starts[full + 1], number * size + halo, side="right")]
    return np.concatenate([[0], np.clip(number * rows // parts, least, most), [rows]])


def _rounded(count: int) -> int:
    """At most a thirty-second more, a multiple of quads."""
    step = max(1 << max(count.bit_length() - 6, 0), QUAD)
    return -(-count // step) * step
