"""A decoder-only transformer; one class for every family, which differ by `ModelConfig` alone.

    x_0     = E[tokens]
    h_l     = x_l + o_proj(attention(rotate(norm_q(q)), rotate(norm_k(k)), v)),   q, k, v = projections of norm_1(x_l)
    x_{l+1} = h_l + mlp(norm_2(h_l))
    logits  = W_head norm(x_L)                                                    W_head = E when tied

Layouts: tokens, positions [B, T] int32; x [B, T, D]; q [B, T, H, d]; k, v [B, T, Hkv, d]; logits [B, T, V] float32.
Positions below zero mark padding: no token attends to it, and outputs there are finite but mean nothing.

Layers are a Python loop over separate parameters, since a scan over stacked ones copies every layer's weights each
step. Modules are pytrees: pass them to plain `jax.jit` as arguments, and build them abstractly by `jax.eval_shape`.
"""

import dataclasses
from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jquant.linear import Implementation, linear
from jquant.models.attention import self_attention
from jquant.models.config import ModelConfig
from jquant.models.layers import MLP, Embedding, Linear, RMSNorm, subkey
from jquant.models.loss import head_loss
from jquant.models.rotary import cos_sin, rotate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer needs to know about where its tokens stand: positions [B, T]; cos, sin [B, T, d/2] float32."""

    positions: jax.Array
    cos: jax.Array
    sin: jax.Array


class Memory(Protocol):
    """What a layer remembers of earlier tokens, a pytree such as `jquant.runtime.kvcache.LayerCache`."""

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, context: Context, window: int | None
    ) -> tuple[jax.Array, Self]:
        """Attention of q [B, T, H, d] to what is remembered and to k, v [B, T, Hkv, d]; the memory with those added."""
        ...


M = TypeVar("M", bound=Memory)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, and per-head normalised queries and keys where the config asks."""

    def __init__(
        self,
        config: ModelConfig,
        window: int | None,
        *,
        dtype: DTypeLike = jnp.float32,
        key: jax.Array | None = None,
        implementation: Implementation = None,
    ):
        def make(index: int, in_features: int, out_features: int, use_bias: bool) -> Linear:
            return Linear(
                in_features,
                out_features,
                use_bias=use_bias,
                dtype=dtype,
                key=subkey(key, index),
                implementation=implementation,
            )

        self.head_dim = config.head_dim
        self.window = window
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = make(0, config.hidden_size, query_size, config.qkv_bias)
        self.k_proj = make(1, config.hidden_size, kv_size, config.qkv_bias)
        self.v_proj = make(2, config.hidden_size, kv_size, config.qkv_bias)
        self.o_proj = make(3, query_size, config.hidden_size, config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps, dtype=dtype) if config.qk_norm else None

    def __call__(self, x: jax.Array, context: Context, memory: M | None = None) -> tuple[jax.Array, M | None]:
        """x [B, T, D] -> [B, T, D] and the memory after these tokens."""
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q = rotate(q if self.q_norm is None else self.q_norm(q), context.cos, context.sin)
        k = rotate(k if self.k_norm is None else self.k_norm(k), context.cos, context.sin)
        if memory is None:
            out = self_attention(q, k, v, context.positions, self.window)
        else:
            out, memory = memory.attend(q, k, v, context, self.window)
        return self.o_proj(out.reshape(*out.shape[:2], -1)), memory

    def _heads(self, y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:2], -1, self.head_dim)


class Block(nnx.Module):
    """One layer: attention and MLP, each behind a norm and added to the stream."""

    def __init__(
        self,
        config: ModelConfig,
        window: int | None,
        *,
        dtype: DTypeLike = jnp.float32,
        key: jax.Array | None = None,
        implementation: Implementation = None,
    ):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.self_attn = Attention(config, window, dtype=dtype, key=subkey(key, 0), implementation=implementation)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.mlp = MLP(
            config.hidden_size,
            config.intermediate_size,
            use_bias=config.mlp_bias,
            dtype=dtype,
            key=subkey(key, 1),
            implementation=implementation,
        )

    def __call__(self, x: jax.Array, context: Context, memory: M | None = None) -> tuple[jax.Array, M | None]:
        """x [B, T, D] -> [B, T, D] and this layer's memory after these tokens (None stays None)."""
        mixed, memory = self.self_attn(self.input_layernorm(x), context, memory)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), memory


class Decoder(nnx.Module):
    """The whole model: `embed_tokens`, `layers`, `norm` and `lm_head` (None when the embedding serves as the head).

    Without `key` the parameters are zeros and ones, ready to be replaced; with it they are random, for tests.
    `implementation` is handed to every `jquant.linear` call.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        key: jax.Array | None = None,
        implementation: Implementation = None,
    ):
        self.config = config
        self.implementation: Implementation = implementation
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, key=subkey(key, 0))
        self.layers = nnx.List(
            Block(config, window, dtype=dtype, key=subkey(key, 2 + index), implementation=implementation)
            for index, window in enumerate(config.windows)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.lm_head = (
            None
            if config.tie_embeddings
            else Linear(
                config.hidden_size, config.vocab_size, dtype=dtype, key=subkey(key, 1), implementation=implementation
            )
        )

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, T] int32 -> x [B, T, D]."""
        return self.embed_tokens(tokens)

    def context(self, positions: jax.Array) -> Context:
        """The context of tokens at `positions` [B, T] int32 (negative: padding)."""
        cos, sin = cos_sin(self.config, positions)
        return Context(positions, cos, sin)

    def hidden(
        self, tokens: jax.Array, positions: jax.Array | None = None, memory: tuple[M, ...] | None = None
    ) -> tuple[jax.Array, tuple[M, ...] | None]:
        """The stream after the last layer, x [B, T, D], before the final norm; and the memory after these tokens.

        `positions` default to 0..T-1; along T they must increase, except at padding. With a memory they must be
        given, because they say how much came before.
        """
        if positions is None:
            if memory is not None:
                raise ValueError("a decoder with memory needs the positions of its tokens, got None; pass [B, T] int32")
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        context = self.context(positions)
        x = self.embed(tokens)
        if memory is None:
            for layer in self.layers:
                x, _ = layer(x, context)
            return x, None
        after: list[Any] = []  # M; the types do not say that a layer given a memory returns one
        for layer, before in zip(self.layers, memory, strict=True):
            x, remembered = layer(x, context, before)
            after.append(remembered)
        return x, tuple(after)

    def head(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> logits [B, T, V] float32."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        weight = head.weight.get_value()
        return linear(self.norm(x), weight, implementation=self.implementation, out_dtype=jnp.float32)

    def loss(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
        """Mean next-token cross-entropy of each sequence, [B] float32 nats, from the stream x [B, T, D]."""
        return head_loss(self, x, tokens)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array | None = None, memory: tuple[M, ...] | None = None
    ) -> tuple[jax.Array, tuple[M, ...] | None]:
        """tokens [B, T] int32 -> logits [B, T, V] float32 and the memory after them (None without one)."""
        x, memory = self.hidden(tokens, positions, memory)
        return self.head(x), memory


def untied(model: Decoder) -> Decoder:
    """The same model with a head of its own, which starts as the embedding; a model that has one comes back as it is.

    Whatever treats the two differently needs it, such as rotating the stream. The head's array is the embedding's
    until one of them is replaced; then the model is V D values larger.
    """
    if model.lm_head is not None:
        return model
    weight = model.embed_tokens.weight.get_value()
    head = jax.eval_shape(lambda: Linear(weight.shape[1], weight.shape[0], implementation=model.implementation))
    other = jax.tree.map(lambda leaf: leaf, model)
    other.config = dataclasses.replace(model.config, tie_embeddings=False)
    # Flax takes an attribute that was None for one without arrays, unless told otherwise.
    other.lm_head = nnx.data(jax.tree.map(lambda _: weight, head))
    return other
