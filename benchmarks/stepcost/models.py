"""The two models that are adapted, built from a configuration with random weights, and the adapting of them.

Variants share the frozen weights, so that what differs between them is the adapter alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from .variants import Variant

HEAD_WIDTH = 64
ENCODER_TARGETS = ["query", "key", "value", "dense"]
BLOCK_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def encoder(width: int, layers: int, positions: int) -> BertForSequenceClassification:
    """A BERT-like encoder of ``layers`` layers with a new two-class head.

    Its own dropout is off: it costs every variant the same and would only dilute the ratios.
    """
    config = BertConfig(
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        intermediate_size=4 * width,
        max_position_embeddings=positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


class LlamaBlock(nn.Module):
    """One decoder layer of Llama with its rotary embedding: [batch, tokens, width] to the same shape."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=width,
            intermediate_size=intermediate,
            num_hidden_layers=1,
            num_attention_heads=width // HEAD_WIDTH,
            num_key_value_heads=width // HEAD_WIDTH,
            attn_implementation="sdpa",
        )
        self.width = width
        self.rotary = LlamaRotaryEmbedding(config)
        self.layer = LlamaDecoderLayer(config, layer_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for x [batch, tokens, width]."""
        positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        return self.layer(x, position_embeddings=self.rotary(x, positions))


def adapt(
    base: nn.Module, variant: Variant, r: int, dropout: float, targets: Sequence[str], head: nn.Module | None = None
) -> nn.Module:
    """A training copy of ``base`` with the variant's adapter on ``targets``: frozen weights shared, head its own.

    Args:
        base: the model; its frozen parameters are the copy's as well.
        head: the submodule of ``base`` that is trained in full in every variant, if any.
    """
    own = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    shared = {id(parameter): parameter for parameter in base.parameters() if id(parameter) not in own}
    trained = {name for name, parameter in base.named_parameters() if id(parameter) in own}
    model = copy.deepcopy(base, shared)
    model.requires_grad_(False)
    adapted = model if variant.config is None else get_peft_model(model, variant.config(r, dropout, list(targets)))
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(True)
    return adapted.train()
