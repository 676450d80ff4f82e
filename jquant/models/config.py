"""The architecture of a decoder, as plain frozen data.

A family (Llama, Mistral, Qwen2, Qwen3) differs from the next by these values, never by a class of its own.
`convert` fills them from other people's configuration files; `Decoder` builds modules from them; `jquant.json`
stores them. Nothing here says how a model is quantized or run.
"""

import dataclasses
from typing import Any, Literal, get_args

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was trained on.

    `kind` decides which of the other fields are read:
    - "default": none.
    - "linear": `factor` divides every frequency.
    - "dynamic": `factor`; the base grows with the sequence (NTK-aware) once it exceeds the model's `max_positions`.
    - "llama3": `factor`, `low_freq_factor`, `high_freq_factor`, `original_positions`.
    - "yarn": `factor`, `beta_fast`, `beta_slow`, `original_positions`, `attention_factor` (the scale of cos and
      sin; None derives it from `factor`, `mscale`, `mscale_all_dim`), `truncate`.
    `original_positions` None means the model's `max_positions`.
    """

    kind: RopeKind = "default"
    factor: float = 1.0
    original_positions: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeKind):
            raise ValueError(f"unknown rope kind {self.kind!r}; expected one of {', '.join(get_args(RopeKind))}")
        if self.kind == "llama3" and (
            self.low_freq_factor is None
            or self.high_freq_factor is None
            or self.low_freq_factor == self.high_freq_factor
        ):
            raise ValueError(
                f"rope kind 'llama3' got low_freq_factor={self.low_freq_factor}, "
                f"high_freq_factor={self.high_freq_factor}; expected two different numbers"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and kind of a decoder-only transformer.

    `windows` has one entry a layer: the sliding-attention window in tokens, or None for full attention.
    `dtype` is the type of the parameters as the source stores them: "float32", "bfloat16" or "float16".
    `eos_ids` end generation; `bos_id` starts self-calibration and, where the tokenizer asks for it, prompts.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    windows: tuple[int | None, ...]
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuses shapes that no decoder can have; every message names the field to change."""
        for name in (
            "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim max_positions".split()
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model config has {name}={getattr(self, name)}; expected at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model config has num_heads={self.num_heads}, not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model config has head_dim={self.head_dim}; rotary positions need an even number")
        if len(self.windows) != self.num_layers:
            raise ValueError(
                f"model config has {len(self.windows)} windows for num_layers={self.num_layers}; "
                "expected one a layer (None for full attention)"
            )

    def position_limit(self) -> int:
        """The longest sequence the model can place: `max_positions`, stretched by the factor of "dynamic" scaling."""
        stretch = self.rope_scaling.factor if self.rope_scaling.kind == "dynamic" else 1.0
        return int(self.max_positions * max(stretch, 1.0))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ModelConfig":
        """Rebuilds a config; ValueError names every unknown or missing field."""
        known = {field.name for field in dataclasses.fields(cls)}
        required = {
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        unknown, missing = sorted(set(data) - known), sorted(required - set(data))
        if unknown or missing:
            raise ValueError(f"model config has unknown fields {unknown} and lacks {missing}")
        values = dict(data)
        values["windows"] = tuple(values["windows"])
        values["eos_ids"] = tuple(values.get("eos_ids", ()))
        if "rope_scaling" in values:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        return cls(**values)
