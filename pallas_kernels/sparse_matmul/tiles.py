"""Sparse entries by tile, as tensor-core kernels add them to decoded weights.

For many tokens a product of its own cannot be cheap. For M = 2048, N = 28672, reading and writing y again takes 55 us
in bfloat16, a twentieth of the whole matrix product, and every entry reads M inputs: 4.3 GB for 0.45 % of 28672 x 8192,
150 us at the speed of shared memory. Added to the weight itself an entry costs once for a block of tokens.

The kernels of `pallas_kernels.fragments` decode tiles of 64 x 64: warp w of four owns rows 16w..16w + 15 and lane l of
it 32 weights, the halves of registers a0..a3 of steps s = 0..3. Here an entry lies where its lane finds it by itself:

    entry     value << 16 | 2 * column << 8 | place: the value in 16 bits, the column 0..63 in the tile, and
              place = 8 * step + 2 * register + half, 0..31
    list      the entries of one warp in one tile, in rounds of at most one entry a lane, lanes ascending
    slots     uint32 [ceil(N/64), ceil(K/128), S]: the eight lists of two tiles side by side, h = 0, 1
                word 4h + w         mask: which lanes have an entry in the first round
                word 8 + w          four bytes: for h = 0, then h = 1, where the list begins (its word), and what
                                    follows the first round: so many rounds, and ELSEWHERE if not here
                words 12..          the lists: entries of the first round; of every further one its mask and entries
    overflow  uint32 [F]: lists that have no place there, each as mask and entries of all its rounds; in `slots` their
              first round is empty, and the word where it begins says where they lie here

So a lane counts the bits below its own in a mask and reads one word: no entry is compared, nothing is exchanged between
lanes, nothing written. S is a multiple of 32 (0.45 % of all entries: 64, of which 51 are in use): what is copied into
shared memory stays aligned to 128 bytes. Few blocks overflow, and in them the longest lists go.

Values are added to what the decoder made, so they are in its units: divided by the scale that multiplies afterwards.
They and the sums with weights are rounded to 16 bits: such a weight is right within a unit or two of its last place.
For one token an entry is multiplied by its input instead, hence the column.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TILE = 64
BLOCK = 128  # columns that share their slots
HEADER = 12  # words before the lists
ELSEWHERE = 0x80
_STEP, _MOST = 32, 256  # words of a block; more than 256 no copy takes at once
_OVERFLOWING = 0.05  # share of the blocks that may
_LISTS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EntryTiles:
    """Entries by tile, as drawn above, for weights that are decoded to `dtype`."""

    slots: jax.Array
    overflow: jax.Array
    dtype: str = dataclasses.field(metadata={"static": True})


def entry_tiles_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """The number of blocks along both axes of a matrix [N, K]."""
    return -(-shape[0] // TILE), -(-shape[1] // BLOCK)


def prepare_tiles(
    values: np.ndarray, columns: np.ndarray, row_pointer: np.ndarray, num_columns: int, dtype: Any
) -> EntryTiles:
    """The entries of a compressed-row matrix by tile, values rounded to `dtype`. Once, after loading; NumPy.

    values [nnz] in the decoder's units, columns [nnz] below num_columns = K and different within a row,
    row_pointer [N + 1]; dtype that of the activations, bfloat16 or float16. ValueError for another, or where a value
    does not fit.
    """
    kind = jnp.dtype(dtype)
    if kind.name not in ("bfloat16", "float16"):
        raise ValueError(f"entries are added to 16-bit weights, not to {kind.name}; expected bfloat16 or float16")
    with np.errstate(over="ignore"):  # found out below
        rounded = np.asarray(values).astype(np.float32).astype(kind)
    if not np.all(np.isfinite(rounded.astype(np.float32))):
        raise ValueError(f"some sparse values do not fit {kind.name}; use bfloat16 activations")
    pointer, column = np.asarray(row_pointer, np.int64), np.asarray(columns, np.int64)
    blocks = entry_tiles_shape((pointer.size - 1, num_columns))
    lists = _Lists(np.repeat(np.arange(pointer.size - 1), np.diff(pointer)), column, blocks)
    stream = lists.words(rounded.view(np.uint16))

    inside, size = lists.choose_size()
    length = lists.length
    space = np.where(inside, length, 1)  # of another the word that says where it is
    begins = np.where(space > 0, HEADER + np.cumsum(space, axis=1) - space, HEADER)
    first_mask = np.where(inside, lists.first_mask, np.uint32(0))
    follows = np.where(inside, np.maximum(lists.rounds - 1, 0), lists.rounds | ELSEWHERE)
    slots = np.zeros((blocks[0] * blocks[1], size), np.uint32)
    slots[:, :_LISTS] = first_mask
    for half in range(2):
        own = slice(4 * half, 4 * half + 4)
        both = begins[:, own] | follows[:, own] << 8
        slots[:, _LISTS:HEADER] |= (both << 16 * half).astype(np.uint32)

    # in `overflow` a list has one more word, the mask of its first round
    outside = np.flatnonzero(~inside.reshape(-1))
    room = length.reshape(-1)[outside] + 1
    firsts = np.cumsum(room) - room
    overflow = np.zeros(1 << max(int(room.sum()) - 1, 0).bit_length(), np.uint32)
    overflow[firsts] = lists.first_mask.reshape(-1)[outside]
    slots[outside // _LISTS, begins.reshape(-1)[outside]] = firsts

    # the stream holds the lists one after the other: each of its words goes to its place in one of the two
    owner = np.repeat(np.arange(length.size), length.reshape(-1))
    nth = np.arange(owner.size) - (np.cumsum(length.reshape(-1)) - length.reshape(-1))[owner]
    here = inside.reshape(-1)[owner]
    slots[owner[here] // _LISTS, begins.reshape(-1)[owner[here]] + nth[here]] = stream[here]
    first_of = np.zeros(length.size, np.int64)
    first_of[outside] = firsts + 1
    overflow[first_of[owner[~here]] + nth[~here]] = stream[~here]
    return EntryTiles(jnp.asarray(slots.reshape(*blocks, size)), jnp.asarray(overflow), kind.name)


class _Lists:
    """The eight lists of every block: their lengths, rounds and masks [blocks, 8], and the words of all in a row."""

    def __init__(self, row: np.ndarray, column: np.ndarray, blocks: tuple[int, int]) -> None:
        register = row % 16 // 8 + column % 16 // 8 * 2
        self._place = column % TILE * 2 << 8 | column % TILE // 16 * 8 + register * 2 + column % 2
        self._lane = row % 8 * 4 + column % 8 // 2
        block = row // TILE * blocks[1] + column // BLOCK
        self._list = (block * 2 + column % BLOCK // TILE) * 4 + row % TILE // 16
        count = blocks[0] * blocks[1] * _LISTS

        # rounds: the entries of one lane are numbered
        order = np.lexsort((self._lane, self._list))
        group = (self._list * 32 + self._lane)[order]
        self._round = np.empty(row.size, np.int64)
        self._round[order] = np.arange(row.size) - np.searchsorted(group, group)
        self._order = np.lexsort((self._lane, self._round, self._list))

        rounds = np.zeros(count, np.int64)
        np.maximum.at(rounds, self._list, self._round + 1)
        entries = np.bincount(self._list, minlength=count)
        first_mask = np.zeros(count, np.uint32)
        first = self._round == 0
        np.bitwise_or.at(first_mask, self._list[first], np.uint32(1) << self._lane[first].astype(np.uint32))
        self.rounds, self.first_mask = rounds.reshape(-1, _LISTS), first_mask.reshape(-1, _LISTS)
        self.length = (entries + np.maximum(rounds - 1, 0)).reshape(-1, _LISTS)

    def words(self, bits: np.ndarray) -> np.ndarray:
        """The words of all lists one after the other: entries, and a mask before every round but the first."""
        order = self._order
        owner, turn, lane = self._list[order], self._round[order], self._lane[order].astype(np.uint32)
        entry = bits[order].astype(np.uint32) << np.uint32(16) | self._place[order].astype(np.uint32)
        begins = np.ones(owner.size, bool)
        begins[1:] = (owner[1:] != owner[:-1]) | (turn[1:] != turn[:-1])
        masked = begins & (turn > 0)
        place = np.arange(owner.size) + np.cumsum(masked)
        stream = np.zeros(owner.size + int(masked.sum()), np.uint32)
        stream[place] = entry
        last_begin = np.maximum.accumulate(np.where(begins, np.arange(owner.size), 0))
        later = turn > 0
        np.bitwise_or.at(stream, place[last_begin[later]] - 1, np.uint32(1) << lane[later])
        return stream

    def choose_size(self) -> tuple[np.ndarray, int]:
        """Which lists lie in their block, bool [blocks, 8], and the number of words of a block."""
        needed = HEADER + self.length.sum(axis=1)
        sizes = np.arange(_STEP, _MOST + 1, _STEP)
        few = [size for size in sizes if np.mean(needed > size) <= _OVERFLOWING]
        size = int(few[0] if few else sizes[-1])
        # the shortest k lists that fit beside a word for each of the others
        order = np.argsort(self.length, axis=1, kind="stable")
        lengths = np.take_along_axis(self.length, order, axis=1)
        others = np.cumsum((lengths > 0)[:, ::-1], axis=1)[:, ::-1] - (lengths > 0)
        fits = HEADER + np.cumsum(lengths, axis=1) + others <= size
        inside = np.empty(fits.shape, bool)
        np.put_along_axis(inside, order, fits, axis=1)
        return inside, size
