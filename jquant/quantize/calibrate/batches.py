"""Calibration text as token batches: [B, T] int32 arrays of whole sequences."""

from collections.abc import Sequence

import numpy as np


def cut_batches(
    tokens: Sequence[int] | np.ndarray, samples: int, seq_len: int, batch_size: int = 4
) -> list[np.ndarray]:
    """The first `samples` non-overlapping windows of `seq_len` tokens, `batch_size` at a time.

    Raises ValueError, with the number that would do, when the text is too short.
    """
    tokens = np.asarray(tokens)
    if samples < 1 or seq_len < 2:
        raise ValueError(f"calibration asks for {samples} samples of {seq_len} tokens; expected >= 1 and >= 2")
    available = len(tokens) // seq_len
    if available < samples:
        raise ValueError(
            f"the calibration text has {len(tokens)} tokens, enough for {available} samples of {seq_len}; "
            f"{samples} were asked for: give a longer text, or lower --samples or --seq-len"
        )
    return split_batches(tokens[: samples * seq_len].reshape(samples, seq_len), batch_size)


def split_batches(sequences: np.ndarray, batch_size: int = 4) -> list[np.ndarray]:
    """Sequences [S, T] as batches of at most `batch_size`."""
    sequences = np.asarray(sequences, np.int32)
    return [sequences[start : start + batch_size] for start in range(0, len(sequences), batch_size)]
