"""One decoder for every family: configuration, layers, and the modules they make."""

from jquant.models.config import ModelConfig, RopeScaling
from jquant.models.decoder import Attention, Block, Context, Decoder
from jquant.models.layers import MLP, Embedding, Linear, RMSNorm
from jquant.models.loss import head_loss, token_losses

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "Context",
    "Decoder",
    "Embedding",
    "Linear",
    "ModelConfig",
    "RMSNorm",
    "RopeScaling",
    "head_loss",
    "token_losses",
]
