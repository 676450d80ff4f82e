"""How well a model predicts a text: perplexity, and its distance from the model it was made from.

    perplexity = exp( 1/n sum_w loss_w ),   loss_w = mean cross-entropy of the targets of window w, float32 logits
    kl         = mean_t sum_v q_tv (log q_tv - log p_tv),       p of the model, q of its reference, in nats
    top1       = share of the t at which p and q are largest at the same token

The text is cut into n windows of seq_len tokens; a shorter tail is dropped. Each window is read by itself, so its first
token is never a target: seq_len - 1 targets a window. With a `bos_id`, every window is that token followed by
seq_len - 1 tokens of text, all of them targets. This is the protocol of GPTQ (arXiv:2210.17323) and its successors;
kl and top1 are over the same positions t.

A window passes through the model block by block, in one program that all blocks of equal structure share. Memory holds
the model, one stream x [1, T, D], and CHUNK_ROWS rows of logits.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jquant.format import tree as trees
from jquant.format.weights import SparseResidual, with_rows
from jquant.models.loss import CHUNK_ROWS, head_loss

LOWEST = -1e4  # log-probabilities in nats; no softmax of sensible logits reaches it

Progress = Callable[[int, int], None] | None


class Evaluable(Protocol):
    """What evaluation needs of a model; `jquant.models.Decoder` has it.

    layers[i](x, context) -> (x, _). Its parameters have paths that begin with `layers.<index>.`, all others do not.
    """

    config: Any  # vocab_size, position_limit()
    layers: Any

    def embed(self, tokens: jax.Array) -> jax.Array: ...

    def context(self, positions: jax.Array) -> Any: ...

    def head(self, x: jax.Array) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The result: `tokens` counts the targets, `seconds` is wall-clock and includes compilation.

    `losses` has the mean cross-entropy of every window, in nats.
    """

    perplexity: float
    tokens: int
    windows: int
    seconds: float
    seq_len: int
    losses: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Comparison(Perplexity):
    """The model's perplexity, its reference's, and how far apart their predictions are (see the module)."""

    reference_perplexity: float
    kl: float
    top1: float


@dataclasses.dataclass(frozen=True)
class ReferenceStates:
    """What `compare` wants of a reference: its streams after the last block, on the host, and its head."""

    ends: Any
    windows: np.ndarray  # [n, T] int32
    states: Sequence[np.ndarray]  # n arrays [T, D]


def perplexity(
    model: Evaluable,
    tokens: Sequence[int] | np.ndarray,
    *,
    seq_len: int = 2048,
    max_windows: int | None = None,
    bos_id: int | None = None,
    progress: Progress = None,
) -> Perplexity:
    """Perplexity of `model` on a text's token ids (one dimension), after the module's protocol.

    `progress(done, windows)` is called after each window. Raises ValueError when the text is shorter than a window, an
    id is outside the vocabulary, or the model has fewer positions than seq_len.
    """
    windows = _checked_windows(model, tokens, seq_len, max_windows, bos_id)
    started = time.perf_counter()
    forward = _Forward(model, seq_len)
    losses = []
    for index, window in enumerate(windows):
        losses.append(float(_window_loss(forward.ends, forward(window), jnp.asarray(window[None]))))
        if progress is not None:
            progress(index + 1, len(windows))
    return Perplexity(**_summary(losses, windows, started))


def reference_states(
    reference: Evaluable,
    tokens: Sequence[int] | np.ndarray,
    *,
    seq_len: int = 2048,
    max_windows: int | None = None,
    bos_id: int | None = None,
    progress: Progress = None,
) -> ReferenceStates:
    """The reference's part of `compare`, computed once for many models; n T D numbers on the host.

    Arguments and errors are those of `perplexity`. The blocks of `reference` may be freed afterwards.
    """
    windows = _checked_windows(reference, tokens, seq_len, max_windows, bos_id)
    forward = _Forward(reference, seq_len)
    states = []
    for index, window in enumerate(windows):
        states.append(np.asarray(forward(window)[0]))
        if progress is not None:
            progress(index + 1, len(windows))
    return ReferenceStates(forward.ends, windows, states)


def compare(
    model: Evaluable,
    reference: Evaluable | ReferenceStates,
    tokens: Sequence[int] | np.ndarray,
    *,
    seq_len: int = 2048,
    max_windows: int | None = None,
    bos_id: int | None = None,
    progress: Progress = None,
) -> Comparison:
    """`model` beside `reference`, a model of the same vocabulary or its `reference_states` on the same windows.

    KL is float32 from log-softmax, summed as q (log q - log p) + p - q, which rounding hardly takes below zero; a
    log-probability under -1e4, or not finite, counts as -1e4, so KL is finite whatever the logits. Raises ValueError
    as `perplexity` does, and if the two do not fit together.
    """
    windows = _checked_windows(model, tokens, seq_len, max_windows, bos_id)
    started = time.perf_counter()
    if isinstance(reference, ReferenceStates):
        known = reference.windows
        if not np.array_equal(known[: len(windows)], windows):
            raise ValueError(
                f"the reference states are of {known.shape[0]} windows of {known.shape[1]} tokens, not of these "
                f"{len(windows)} of {seq_len}; call reference_states with the same text and options"
            )
        ends, states = reference.ends, reference.states
        streams = (jnp.asarray(states[index][None]) for index in range(len(windows)))
    else:
        _checked_windows(reference, tokens, seq_len, max_windows, bos_id)
        original = _Forward(reference, seq_len)
        ends, streams = original.ends, map(original, windows)
    if ends.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the model predicts {model.config.vocab_size} tokens, its reference {ends.config.vocab_size}; "
            "give a reference with the same tokenizer"
        )
    forward = _Forward(model, seq_len)
    means = np.zeros((len(windows), 4))
    for index, (window, y) in enumerate(zip(windows, streams, strict=True)):
        sums = _compare_window(forward.ends, ends, forward(window), y, jnp.asarray(window[None]))
        means[index] = np.asarray(sums, np.float64).sum(axis=0) / (seq_len - 1)
        if progress is not None:
            progress(index + 1, len(windows))
    losses, reference_losses, divergences, agreements = means.T.tolist()
    return Comparison(
        **_summary(losses, windows, started),
        reference_perplexity=exp_mean(reference_losses),
        kl=math.fsum(divergences) / len(windows),
        top1=math.fsum(agreements) / len(windows),
    )


def exp_mean(losses: Sequence[float]) -> float:
    """exp of the mean: windows' losses to a perplexity; inf where it is beyond a float."""
    mean = math.fsum(losses) / len(losses)
    return math.inf if mean > 709 else math.exp(mean)


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


def _checked_windows(
    model: Evaluable, tokens: Sequence[int] | np.ndarray, seq_len: int, max_windows: int | None, bos_id: int | None
) -> np.ndarray:
    windows = cut_windows(np.asarray(tokens), seq_len, max_windows, bos_id)
    config = model.config
    if seq_len > config.position_limit():
        raise ValueError(f"seq_len is {seq_len}, but the model has {config.position_limit()} positions; lower seq_len")
    if windows.min() < 0 or windows.max() >= config.vocab_size:
        raise ValueError(
            f"token ids span {windows.min()}..{windows.max()}, outside the vocabulary of {config.vocab_size}; "
            "was the text tokenized for another model?"
        )
    return windows


def _summary(losses: Sequence[float], windows: np.ndarray, started: float) -> dict[str, Any]:
    """The fields of `Perplexity`."""
    count, seq_len = windows.shape
    return {
        "perplexity": exp_mean(losses),
        "tokens": count * (seq_len - 1),
        "windows": count,
        "seconds": time.perf_counter() - started,
        "seq_len": seq_len,
        "losses": tuple(losses),
    }


class _Forward:
    """A model taken apart for running whole windows: forward(window [T]) -> x [1, T, D] after the last block."""

    def __init__(self, model: Evaluable, seq_len: int):
        # What stands around the blocks, passed to a program without them: their structure would be part of its key.
        inside = [path for path in trees.leaves(model) if path.startswith("layers.")]
        self.ends = trees.replace(model, dict.fromkeys(inside))
        self.layers = _with_equal_residuals(list(model.layers))
        self.context = _make_context(self.ends, jnp.arange(seq_len, dtype=jnp.int32)[None])

    def __call__(self, window: np.ndarray) -> jax.Array:
        x = _embed(self.ends, jnp.asarray(window[None]))
        for layer in self.layers:
            x = _run_block(layer, x, self.context)
        return x


def _with_equal_residuals(layers: list[Any]) -> list[Any]:
    """The blocks with every sparse residual as long as the longest in its place, so that their shapes are equal.

    Zeros are added in column 0 of the last row, on the host. Without this every block would need its own program.
    """
    weights = [trees.select(layer, lambda _, leaf: getattr(leaf, "residual", None) is not None) for layer in layers]
    longest: dict[str, int] = {}
    for path, weight in (item for found in weights for item in found.items()):
        longest[path] = max(longest.get(path, 0), weight.residual.values.shape[0])
    return [
        trees.replace(layer, {path: _lengthened(weight, longest[path]) for path, weight in found.items()})
        for layer, found in zip(layers, weights, strict=True)
    ]


def _lengthened(weight: Any, count: int) -> Any:
    """The QuantizedLinear with `count` entries in its residual."""
    residual: SparseResidual = weight.residual
    missing = count - residual.values.shape[0]
    if not missing:
        return weight
    pointer = np.array(residual.row_pointer)
    pointer[-1] = count
    longer = SparseResidual(
        jnp.asarray(np.pad(np.asarray(residual.values), (0, missing))),
        jnp.asarray(np.pad(np.asarray(residual.columns), (0, missing))),
        jnp.asarray(pointer),
        residual.shape,
    )
    return dataclasses.replace(weight, residual=longer if residual.rows is None else with_rows(longer))


@jax.jit
def _embed(ends: Evaluable, tokens: jax.Array) -> jax.Array:
    return ends.embed(tokens)


@jax.jit
def _make_context(ends: Evaluable, positions: jax.Array) -> Any:
    return ends.context(positions)


@functools.partial(jax.jit, donate_argnames="x")
def _run_block(layer: Any, x: jax.Array, context: Any) -> jax.Array:
    return layer(x, context)[0]


@jax.jit
def _window_loss(ends: Evaluable, x: jax.Array, window: jax.Array) -> jax.Array:
    """Mean cross-entropy of one window [1, T]."""
    return head_loss(ends, x, window)[0]


@jax.jit
def _compare_window(ends: Evaluable, reference: Evaluable, x: jax.Array, y: jax.Array, window: jax.Array) -> jax.Array:
    """[chunks, 4] float32: sums over the targets of loss, reference's loss, KL and agreement of the likeliest token."""
    count = window.shape[1] - 1
    rows = min(CHUNK_ROWS, count)
    chunks = -(-count // rows)

    def cut(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, chunks * rows - count),) + ((0, 0),) * (array.ndim - 1))
        return padded.reshape(chunks, rows, *array.shape[1:])

    def chunk_sums(chunk: tuple[jax.Array, ...]) -> jax.Array:
        states, reference_states, ids, wanted = chunk
        logits = ends.head(states[None])[0].astype(jnp.float32)
        reference_logits = reference.head(reference_states[None])[0].astype(jnp.float32)
        log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference_logits)
        loss, reference_loss = (-jnp.take_along_axis(log, ids[:, None], axis=-1)[:, 0] for log in (log_p, log_q))
        log_p, log_q = (jnp.where(log > LOWEST, log, LOWEST) for log in (log_p, log_q))  # NaN is not greater
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        # p and q each sum to one, so p - q adds nothing but the error of either's normalization, which it cancels.
        divergence = jnp.sum(q * (log_q - log_p) + (p - q), axis=-1)
        agreement = jnp.argmax(logits, axis=-1) == jnp.argmax(reference_logits, axis=-1)
        columns = (loss, reference_loss, divergence, agreement.astype(jnp.float32))
        return jnp.stack([jnp.sum(jnp.where(wanted, column, 0.0)) for column in columns])

    wanted = jnp.ones(count, bool)
    return jax.lax.map(chunk_sums, (cut(x[0, :-1]), cut(y[0, :-1]), cut(window[0, 1:]), cut(wanted)))
