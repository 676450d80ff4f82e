"""jquant: quantize any Hugging Face causal language model to 2-8 bits in JAX, and run it under jit."""

from jquant.api import (
    load as load,
    load_tokenizer as load_tokenizer,
    open_model as open_model,
    save as save,
    transformed as transformed,
)
from jquant.format.spec import QuantSpec as QuantSpec
from jquant.format.tree import leaves as leaves, replace as replace, select as select
from jquant.format.weights import (
    AffineWeight as AffineWeight,
    CodebookWeight as CodebookWeight,
    OutlierColumns as OutlierColumns,
    QuantizedLinear as QuantizedLinear,
    SparseResidual as SparseResidual,
    bits_per_weight as bits_per_weight,
    dequantize as dequantize,
    size_bytes as size_bytes,
)
from jquant.linear import explain as explain, linear as linear, prepare as prepare
from jquant.models import Decoder as Decoder, ModelConfig as ModelConfig
from jquant.quantize.calibrate import (
    calibrate as calibrate,
    cut_batches as cut_batches,
    diagonal_fisher as diagonal_fisher,
    split_batches as split_batches,
)
from jquant.quantize.matrix import quantize_array as quantize_array
from jquant.quantize.pipeline import quantize as quantize
from jquant.quantize.plan import Rule as Rule, make_plan as make_plan
from jquant.runtime.evaluate import (
    Comparison as Comparison,
    compare as compare,
    perplexity as perplexity,
    reference_states as reference_states,
)
from jquant.runtime.generate import generate as generate, sample_text_tokens as sample_text_tokens
from jquant.runtime.sampling import Sampling as Sampling
