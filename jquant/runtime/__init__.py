"""How a model runs: generation under jit, its cache and sampling, and perplexity."""

from jquant.runtime.evaluate import Perplexity, cut_windows, perplexity
from jquant.runtime.generate import Generation, generate, sample_text_tokens
from jquant.runtime.kvcache import LayerCache, init_cache
from jquant.runtime.sampling import Sampling, sample

__all__ = [
    "Generation",
    "LayerCache",
    "Perplexity",
    "Sampling",
    "cut_windows",
    "generate",
    "init_cache",
    "perplexity",
    "sample",
    "sample_text_tokens",
]
