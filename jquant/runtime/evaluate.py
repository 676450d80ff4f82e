"""Perplexity on non-overlapping windows.

    perplexity = exp( 1/n sum_w loss_w ),   loss_w = mean cross-entropy of the targets of window w, float32 logits

The text is cut into n windows of seq_len tokens; a shorter tail is dropped. Each window is read by itself, so its first
token is never a target: seq_len - 1 targets a window. With a `bos_id`, every window is that token followed by
seq_len - 1 tokens of text, all of them targets. This is the protocol of GPTQ (arXiv:2210.17323) and its successors.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jquant.models import Decoder


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The result: `tokens` counts the targets, `seconds` is wall-clock and includes compilation."""

    perplexity: float
    tokens: int
    windows: int
    seconds: float
    seq_len: int


def perplexity(
    model: Decoder,
    tokens: Sequence[int] | np.ndarray,
    *,
    seq_len: int = 2048,
    max_windows: int | None = None,
    bos_id: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of `model` on a text's token ids (one dimension), after the module's protocol.

    `progress(done, windows)` is called after each window. Raises ValueError when the text is shorter than a window, an
    id is outside the vocabulary, or the model has fewer positions than seq_len.
    """
    windows = cut_windows(np.asarray(tokens), seq_len, max_windows, bos_id)
    config = model.config
    if seq_len > config.position_limit():
        raise ValueError(f"seq_len is {seq_len}, but the model has {config.position_limit()} positions; lower seq_len")
    if windows.min() < 0 or windows.max() >= config.vocab_size:
        raise ValueError(
            f"token ids span {windows.min()}..{windows.max()}, outside the vocabulary of {config.vocab_size}; "
            "was the text tokenized for another model?"
        )
    started = time.perf_counter()
    losses = []
    for index, window in enumerate(windows):
        losses.append(float(_window_loss(model, jnp.asarray(window[None]))))
        if progress is not None:
            progress(index + 1, len(windows))
    return Perplexity(
        perplexity=math.exp(math.fsum(losses) / len(losses)),
        tokens=len(windows) * (seq_len - 1),
        windows=len(windows),
        seconds=time.perf_counter() - started,
        seq_len=seq_len,
    )


def cut_windows(
    tokens: np.ndarray, seq_len: int, max_windows: int | None = None, bos_id: int | None = None
) -> np.ndarray:
    """Non-overlapping windows [n, seq_len] int32 of tokens [T], each behind `bos_id` if there is one; tail dropped."""
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens have shape {tokens.shape} and type {tokens.dtype}; expected one dimension of integers"
        )
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}; a window needs at least 2 tokens to have a target")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows is {max_windows}; expected at least 1, or None for all")
    stride = seq_len if bos_id is None else seq_len - 1
    count = len(tokens) // stride
    if count == 0:
        raise ValueError(
            f"the text has {len(tokens)} tokens, less than one window of {stride} (seq_len={seq_len}); "
            "give a longer text or lower seq_len"
        )
    count = count if max_windows is None else min(count, max_windows)
    windows = tokens[: count * stride].reshape(count, stride).astype(np.int32)
    if bos_id is not None:
        windows = np.concatenate([np.full((count, 1), bos_id, np.int32), windows], axis=1)
    return windows


@jax.jit
def _window_loss(model: Decoder, window: jax.Array) -> jax.Array:
    """Mean cross-entropy of one window [1, T]."""
    x, _ = model.hidden(window)
    return model.loss(x, window)[0]
