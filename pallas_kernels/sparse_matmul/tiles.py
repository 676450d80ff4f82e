"""Sparse entries by tile, as tensor-core kernels add them to decoded weights.

For many tokens a product of its own cannot be cheap. For M = 2048, N = 28672, reading and writing y again takes 55 us
in bfloat16, a twentieth of the whole matrix product, and every entry reads M inputs: 4.3 GB for 0.45 % of 28672 x 8192,
150 us at the speed of shared memory. Added to the weight itself an entry costs once for a block of tokens.

The kernels of `pallas_kernels.fragments` decode tiles of 64 x 64: warp w of four owns rows 16w..16w + 15 and lane l of
it 32 weights, the halves of registers a0..a3 of steps s = 0..3. Here an entry lies where its lane finds it by itself:

    entry     value << 16 | 2 * column << 8 | place: the value in 16 bits, the column 0..63 in the tile, whose lowest
              bit is the half, and the place of register i = 4 * step + register: i, but 17 for 7 and 19 for 15, so
              that its lowest bit still is the row's
    list      the entries of one warp in one tile, in rounds of at most one entry a lane, lanes ascending. The first
              two are for the first sixteen lanes that have entries; what others have waits for the third
    slots     uint32 [ceil(N/64), ceil(K/128), S]: the eight lists of two tiles side by side, i = 4 * h + w, h = 0, 1
                word 2i         mask: which lanes have an entry in the first round
                word 2i + 1     bits 0..7   where the first round begins, in words from word 2w
                                bits 8..14  0, or if there are further rounds 1 + those after the second
                                bit 15      ELSEWHERE if the list is not here: then all its rounds are counted as such
                                bits 16..31 which lanes have an entry in the second round: bit 31 - r for the r-th of
                                            those that have one in the first
                words 16..      the lists: entries of the second round, lanes descending; of the first; of every further
                                one its mask and entries
    overflow  uint32 [F]: lists that have no place there, each as mask and entries of all its rounds; in `slots` their
              first two rounds are empty, and the word where the first begins says where they lie here

So a lane counts the bits below its own in two masks and reads a word for each: no entry is compared, nothing is
exchanged between lanes, nothing written. S is a multiple of 32 (0.45 % of all entries: 64, of which 53 are in use):
what is copied into shared memory stays aligned to 128 bytes. Few blocks overflow, and in them the longest lists go.

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
HEADER = 16  # words before the lists
ELSEWHERE = 0x80
_STEP, _MOST = 32, 256  # words of a block; more than 256 no copy takes at once
_OVERFLOWING = 0.05  # share of the blocks that may
_LISTS = 8
_LANES = 16  # that the first two rounds are for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EntryTiles:
    """Entries by tile, as drawn above, for weights that are decoded to `dtype`."""

    slots: jax.Array
    overflow: jax.Array
    dtype: str = dataclasses.field(metadata={"static": True})


def register_place(register: int) -> int:
    """The place of register 0..15 of a lane: of every byte of a word seven bits, of the same parity."""
    return register if register % 8 < 7 else 17 + register // 8 * 2


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
    inside, size = lists.choose_size()

    warp = np.arange(_LISTS) % 4
    space = np.where(inside, lists.length, 1)  # of another the word that says where it is
    starts = np.where(space > 0, HEADER + np.cumsum(space, axis=1) - space, HEADER)
    begins = starts + np.where(inside, lists.in_second, 0)
    follows = np.where(inside, lists.follows, 1 + lists.rounds | ELSEWHERE)
    slots = np.zeros((blocks[0] * blocks[1], size), np.uint32)
    slots[:, 0 : 2 * _LISTS : 2] = np.where(inside, lists.first_mask, 0)
    slots[:, 1 : 2 * _LISTS : 2] = np.where(inside, lists.second_mask, 0) | follows << 8 | begins - 2 * warp

    here = inside.reshape(-1)
    outside = np.flatnonzero(~here)
    room = (lists.entries + lists.rounds).reshape(-1)[outside]
    firsts = np.cumsum(room) - room
    overflow = np.zeros(1 << max(int(room.sum()) - 1, 0).bit_length(), np.uint32)
    slots[outside // _LISTS, starts.reshape(-1)[outside]] = firsts

    # the stream holds the lists one after the other: each of its words goes to its place in one of the two
    stream, owner = lists.words(rounded.view(np.uint16), here)
    nth = np.arange(owner.size) - np.searchsorted(owner, owner)
    first_of = starts.reshape(-1).copy()
    first_of[outside] = firsts
    place, stays = first_of[owner] + nth, here[owner]
    slots[owner[stays] // _LISTS, place[stays]] = stream[stays]
    overflow[place[~stays]] = stream[~stays]
    return EntryTiles(jnp.asarray(slots.reshape(*blocks, size)), jnp.asarray(overflow), kind.name)


class _Lists:
    """The eight lists of every block, [blocks, 8] each: masks, entries in all and in the second round, rounds, what
    `follows`, and their length in slots; and the words of all in a row."""

    def __init__(self, row: np.ndarray, column: np.ndarray, blocks: tuple[int, int]) -> None:
        register = column % TILE // 16 * 4 + column % 16 // 8 * 2 + row % 16 // 8
        self._place = column % TILE * 2 << 8 | np.array([register_place(i) for i in range(16)])[register]
        self._lane = row % 8 * 4 + column % 8 // 2
        block = row // TILE * blocks[1] + column // BLOCK
        self._list = (block * 2 + column % BLOCK // TILE) * 4 + row % TILE // 16
        count = blocks[0] * blocks[1] * _LISTS

        # the entries of one lane are numbered, and the lanes of one list
        order = np.lexsort((self._lane, self._list))
        owner = self._list[order]
        group = owner * 32 + self._lane[order]
        number = np.arange(row.size) - np.searchsorted(group, group)
        lanes = np.cumsum(number == 0)
        rank = lanes - lanes[np.searchsorted(owner, owner)]
        self._round, ranks = np.empty(row.size, np.int64), np.empty(row.size, np.int64)
        ranks[order] = rank
        self._round[order] = np.where(rank < _LANES, number, number + 2)

        each, round_of_each = np.divmod(np.unique(self._list * 64 + self._round), 64)

        def masks(chosen: np.ndarray, bit: np.ndarray) -> np.ndarray:
            found = np.zeros(count, np.int64)
            np.bitwise_or.at(found, self._list[chosen], 1 << bit[chosen])
            return found.reshape(-1, _LISTS)

        def counted(lists: np.ndarray) -> np.ndarray:
            return np.bincount(lists, minlength=count).reshape(-1, _LISTS)

        self.first_mask, self.second_mask = masks(self._round == 0, self._lane), masks(self._round == 1, 31 - ranks)
        self.entries, self.in_second = counted(self._list), counted(self._list[self._round == 1])
        self.rounds, later = counted(each), counted(each[round_of_each > 1])
        self.follows = np.where(self.rounds > 1, 1 + later, 0)
        self.length = self.entries + later

    def words(self, bits: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The words of all lists one after the other, as they lie in slots if inside [blocks * 8], else in overflow,
        and the list of each word."""
        here = inside[self._list]
        second = here & (self._round == 1)
        turn = np.where(here & (self._round < 2), 1 - self._round, self._round)
        order = np.lexsort((np.where(second, -self._lane, self._lane), turn, self._list))
        owner, lane = self._list[order], self._lane[order].astype(np.uint32)
        entry = bits[order].astype(np.uint32) << np.uint32(16) | self._place[order].astype(np.uint32)
        begins = np.ones(owner.size, bool)
        begins[1:] = (owner[1:] != owner[:-1]) | (turn[order][1:] != turn[order][:-1])
        masked = ~here[order] | (turn[order] > 1)
        place = np.arange(owner.size) + np.cumsum(begins & masked)
        stream = np.zeros(owner.size + int(np.sum(begins & masked)), np.uint32)
        owners = np.zeros(stream.size, np.int64)
        stream[place], owners[place] = entry, owner
        mask = place[np.maximum.accumulate(np.where(begins, np.arange(owner.size), 0))] - 1
        np.bitwise_or.at(stream, mask[masked], np.uint32(1) << lane[masked])
        owners[mask[masked]] = owner[masked]
        return stream, owners

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
