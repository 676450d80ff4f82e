"""How a model runs: generation under jit, its cache and sampling, perplexity and the distance between models."""

from jquant.runtime.evaluate import (
    Comparison,
    Perplexity,
    ReferenceStates,
    compare,
    cut_windows,
    perplexity,
    reference_states,
)
from jquant.runtime.generate import Generation, generate, sample_text_tokens
from jquant.runtime.kvcache import LayerCache, init_cache
from jquant.runtime.sampling import Sampling, sample

__all__ = [
    "Comparison",
    "Generation",
    "LayerCache",
    "Perplexity",
    "ReferenceStates",
    "Sampling",
    "compare",
    "cut_windows",
    "generate",
    "init_cache",
    "perplexity",
    "reference_states",
    "sample",
    "sample_text_tokens",
]
