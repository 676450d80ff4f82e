"""Blocks written through shared memory: every entry lies where the copy engine expects it."""

import types
from typing import Any

import numpy as np
import pytest

from pallas_kernels.affine_matmul import output_tiles
from pallas_kernels.affine_matmul.config import STORED_TOKENS as TOKENS
from pallas_kernels.affine_matmul.output_tiles import line_address

THREAD = np.arange(128)


def test_a_tile_is_the_block_transposed_and_swizzled(monkeypatch: pytest.MonkeyPatch) -> None:
    arithmetic: dict[str, Any] = {
        "addi": lambda a, b: a + b,
        "muli": lambda a, b: a * b,
        "andi": lambda a, b: a & b,
        "xori": lambda a, b: a ^ b,
        "shrui": lambda a, b: a >> b,
    }
    monkeypatch.setattr(output_tiles, "arith", types.SimpleNamespace(**arithmetic))
    monkeypatch.setattr(output_tiles, "constant", lambda value: value)
    address = line_address(0, THREAD)

    y = np.arange(64 * TOKENS).reshape(64, TOKENS)  # [outputs, tokens]
    warp, lane = THREAD // 32, THREAD % 32
    row, column = 16 * warp + lane // 4, 2 * (lane % 4)
    tile = np.full(64 * TOKENS, -1)
    for i in range(4):  # registers 2i and 2i + 1 of a block: tokens 8j.., row r0 or r1, i = 2j + h
        j, h = divmod(i, 2)
        pair = np.stack([y[row + 8 * h, 8 * j + column + e] for e in range(2)], axis=1)  # [128, 2]
        for w in range(4):
            matrix = pair[warp == w].reshape(8, 8)  # PTX ISA: thread 4g + t holds (g, 2t) and (g, 2t + 1)
            for line in range(8):  # .trans: line l is column l
                start = address[32 * w + 8 * i + line] // 2
                assert np.all(tile[start : start + 8] == -1)
                tile[start : start + 8] = matrix[:, line]

    token, output = np.meshgrid(np.arange(TOKENS), np.arange(64), indexing="ij")
    piece = (output // 8) ^ (token % 8)  # of 16 bytes: the 128-byte swizzle
    np.testing.assert_array_equal(tile[token * 64 + piece * 8 + output % 8], y.T)
