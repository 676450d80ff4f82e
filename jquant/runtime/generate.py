"""Text generation: prefill the prompts once, then decode in one compiled loop until every sequence is done.

    prefill   tokens [B, T] left-padded to a bucket T (a power of two), positions -1 at padding; first token sampled
    decode    one `lax.while_loop` over steps; each step feeds [B, 1] tokens through the cache and samples the next
    buffers   T + N cache slots and N output places, N the bucket of max_new_tokens; all donated, written in place

Shapes depend on the number of prompts and on the two buckets only, everything else is an array: another prompt, limit,
seed, temperature or end token runs what is already compiled. The model's weights are arguments of the compiled code.

Random streams: step t of sequence i draws with fold_in(fold_in(key(seed), i), t), so a sequence's tokens depend on its
place in the batch but not on its companions; the first one gets what it would get alone with the same seed (up to
rounding of logits, since other shapes may sum in another order).
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jquant.models import Decoder, ModelConfig
from jquant.runtime.kvcache import LayerCache, init_cache
from jquant.runtime.sampling import Sampling, sample

SMALLEST_BUCKET = 16
EOS_BUCKET = 8


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated and how long it took.

    `tokens` holds the new tokens of each prompt, ending with the end token where `stopped` says that one came.
    Seconds are wall-clock and include compilation when `compiled` says that some took place; the first token counts
    as prefill.
    """

    tokens: list[list[int]]
    stopped: list[bool]
    prompt_lengths: list[int]
    seconds_prefill: float
    seconds_decode: float
    compiled: bool

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first, over all sequences, a second of decoding; 0 if there were none."""
        count = sum(max(len(row) - 1, 0) for row in self.tokens)
        return count / self.seconds_decode if count and self.seconds_decode > 0 else 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """The loop's carry: the cache, last tokens and their positions [B], output [B, N], counts and done [B], step."""

    memory: tuple[LayerCache, ...]
    last: jax.Array
    positions: jax.Array
    output: jax.Array
    counts: jax.Array
    done: jax.Array
    step: jax.Array


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    on_token: Callable[[int, int], None] | None = None,
) -> Generation:
    """Continues each prompt (token ids) by up to `max_new_tokens` tokens, stopping at any of `eos_ids`.

    `on_token(sequence, token)` is called as tokens come, one step at a time; without it the whole loop runs on the
    device. Raises ValueError on an empty batch or prompt, an id outside the vocabulary, or more tokens than positions.
    """
    prompts = [[int(token) for token in prompt] for prompt in prompts]
    _check_request(model.config, prompts, max_new_tokens, eos_ids)
    return _generate(model, prompts, max_new_tokens, sampling, seed, eos_ids, on_token, first_stream=0)


def sample_text_tokens(
    model: Decoder,
    *,
    count: int,
    length: int,
    seed: int = 0,
    start_ids: Sequence[int],
    batch_size: int = 16,
    temperature: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """The model's own text, for calibration without data: `count` sequences of `length` tokens, [count, length] int32.

    Sequence i begins with start_ids[i % len(start_ids)] and is sampled token by token from the full distribution; an
    end token does not end it. Sequences do not depend on `batch_size`, which bounds the cache's memory.
    `progress(done, count)` is called after each batch.
    """
    if count < 1 or length < 2 or not start_ids or batch_size < 1:
        raise ValueError(
            f"sampling text needs count >= 1, length >= 2, batch_size >= 1 and a start token, got count={count}, "
            f"length={length}, batch_size={batch_size}, start_ids={list(start_ids)}"
        )
    prompts = [[int(start_ids[index % len(start_ids)])] for index in range(count)]
    _check_request(model.config, prompts, length - 1, ())
    batch_size = -(-count // -(-count // batch_size))  # batches of equal size, as near as can be
    rows: list[list[int]] = []
    for first in range(0, count, batch_size):
        batch = prompts[first : first + batch_size]
        # A short last batch is filled up and cut, which costs less than compiling for its size.
        full = batch + [batch[0]] * (batch_size - len(batch))
        sampling = Sampling(temperature=temperature)
        new = _generate(model, full, length - 1, sampling, seed, (), None, first_stream=first).tokens
        rows += [prompt + tokens for prompt, tokens in zip(batch, new, strict=False)]
        progress(len(rows), count)
    return np.asarray(rows, np.int32)


def bucket(length: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The smallest power-of-two multiple of `smallest` that is at least `length`."""
    size = smallest
    while size < length:
        size *= 2
    return size


def _check_request(config: ModelConfig, prompts: list[list[int]], max_new_tokens: int, eos_ids: Sequence[int]) -> None:
    if not prompts:
        raise ValueError("no prompts were given; expected at least one list of token ids")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; start it with a token, such as bos_id={config.bos_id}")
        outside = [token for token in prompt if not 0 <= token < config.vocab_size]
        if outside:
            raise ValueError(
                f"prompt {index} has token ids {outside[:5]} outside the vocabulary of {config.vocab_size}; "
                "was it tokenized for another model?"
            )
        if len(prompt) + max_new_tokens > config.position_limit():
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens and {max_new_tokens} more would make "
                f"{len(prompt) + max_new_tokens}, but the model has {config.position_limit()} positions; "
                "shorten the prompt or lower max_new_tokens"
            )
    if any(not 0 <= token < config.vocab_size for token in eos_ids):
        raise ValueError(f"eos_ids {list(eos_ids)} has ids outside the vocabulary of {config.vocab_size}")


def _generate(
    model: Decoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    eos_ids: Sequence[int],
    on_token: Callable[[int, int], None] | None,
    first_stream: int,
) -> Generation:
    length, room = bucket(max(map(len, prompts))), bucket(max_new_tokens)
    tokens = np.zeros((len(prompts), length), np.int32)
    positions = np.full((len(prompts), length), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        positions[row, length - len(prompt) :] = np.arange(len(prompt))
    eos = np.full(bucket(len(eos_ids), EOS_BUCKET), -1, np.int32)
    eos[: len(eos_ids)] = list(eos_ids)
    streams = jnp.arange(first_stream, first_stream + len(prompts), dtype=jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), streams)
    choice = (keys, sampling.validated(), jnp.asarray(eos))
    known = compiled_count()

    started = time.perf_counter()
    state = _prefill(model, jnp.asarray(tokens), jnp.asarray(positions), choice, room=room)
    jax.block_until_ready(state.last)
    prefilled = time.perf_counter()
    if on_token is None:
        state = _decode(model, state, choice, jnp.int32(max_new_tokens))
    else:
        state = _decode_step_by_step(model, state, choice, max_new_tokens, on_token)
    counts, done, output = jax.device_get((state.counts, state.done, state.output))
    finished = time.perf_counter()
    return Generation(
        tokens=[output[row, : counts[row]].tolist() for row in range(len(prompts))],
        stopped=done.tolist(),
        prompt_lengths=[len(prompt) for prompt in prompts],
        seconds_prefill=prefilled - started,
        seconds_decode=finished - prefilled,
        compiled=compiled_count() > known,
    )


def _decode_step_by_step(
    model: Decoder, state: _State, choice: tuple, max_new_tokens: int, on_token: Callable[[int, int], None]
) -> _State:
    """The same loop, left after every token to report it."""
    told = np.zeros(len(state.last), np.int32)
    while True:
        counts, done, last, step = jax.device_get((state.counts, state.done, state.last, state.step))
        for row in np.flatnonzero(counts > told):
            on_token(int(row), int(last[row]))
        told = counts
        if step >= max_new_tokens or done.all():
            return state
        state = _decode(model, state, choice, jnp.int32(step + 1))


def compiled_count() -> int:
    """How many programs prefill and decode have compiled so far in this process."""
    programs: tuple[Any, ...] = (_prefill, _decode)  # the types of jax.jit do not tell of its cache
    return sum(program._cache_size() for program in programs)


@functools.partial(jax.jit, static_argnames=("room",))
def _prefill(model: Decoder, tokens: jax.Array, positions: jax.Array, choice: tuple, *, room: int) -> _State:
    """Fills a new cache with the prompts and samples the first token of each."""
    batch, length = tokens.shape
    dtype = model.embed_tokens.weight.get_value().dtype
    memory = init_cache(model.config, batch, length + room, dtype)
    x, filled = model.hidden(tokens, positions, memory)
    assert filled is not None
    blank = _State(
        memory=filled,
        last=tokens[:, -1],
        positions=positions[:, -1],
        output=jnp.zeros((batch, room), jnp.int32),
        counts=jnp.zeros((batch,), jnp.int32),
        done=jnp.zeros((batch,), bool),
        step=jnp.int32(0),
    )
    # Left padding puts every prompt's last token into the last column.
    return _take(blank, filled, model.head(x[:, -1:])[:, 0], choice)


@functools.partial(jax.jit, donate_argnames=("state",))
def _decode(model: Decoder, state: _State, choice: tuple, until: jax.Array) -> _State:
    """Steps until `until` tokens were taken or all sequences are done."""

    def goes_on(state: _State) -> jax.Array:
        return (state.step < until) & ~jnp.all(state.done)

    def step(state: _State) -> _State:
        logits, memory = model(state.last[:, None], state.positions[:, None], state.memory)
        assert memory is not None
        return _take(state, memory, logits[:, 0], choice)

    return lax.while_loop(goes_on, step, state)


def _take(state: _State, memory: tuple[LayerCache, ...], logits: jax.Array, choice: tuple) -> _State:
    """Samples from logits [B, V] and records the tokens of the sequences that are not done."""
    keys, sampling, eos = choice
    step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, state.step)
    tokens = jnp.where(state.done, 0, sample(step_keys, logits, sampling))
    return _State(
        memory=memory,
        last=tokens,
        positions=state.positions + 1,
        output=lax.dynamic_update_slice(state.output, tokens[:, None], (0, state.step)),
        counts=state.counts + (~state.done).astype(jnp.int32),
        done=state.done | jnp.any(tokens[:, None] == eos, axis=1),
        step=state.step + 1,
    )
