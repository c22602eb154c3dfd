"""Tiny random models under the names that PEFT's tests load from the hub.

The suite runs with this folder as the working directory and the hub switched off, so that
`from_pretrained("peft-internal-testing/tiny-random-GPT2LMHeadModel")` finds a local folder of that name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPT = "peft-internal-testing/tiny-random-OPTForCausalLM"
GPT2 = "peft-internal-testing/tiny-random-GPT2LMHeadModel"
GPT2_PRETRAINED = "gpt2"
LLAMA = "trl-internal-testing/tiny-random-LlamaForCausalLM"
LLAMA_AGAIN = "peft-internal-testing/tiny-random-LlamaForCausalLM"
T5 = "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated"
BERT = "peft-internal-testing/tiny-random-BertModel"
ROBERTA = "peft-internal-testing/tiny-random-RobertaModel"
BERT_CLASSIFIER = "peft-internal-testing/tiny-random-BertForSequenceClassification"
BERT_PRETRAINED = "bert-base-uncased"
LLAMA_CLASSIFIER = "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2"


def build(folder: Path) -> None:
    """Write every model below `folder` (a few MB in all), the same weights every time."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    makers: dict[str, Callable[[], PreTrainedModel]] = {
        OPT: _opt,
        GPT2: _gpt2,
        GPT2_PRETRAINED: _gpt2,
        LLAMA: _llama,
        LLAMA_AGAIN: _llama,
        T5: _t5,
        BERT: _bert,
        ROBERTA: _roberta,
        BERT_CLASSIFIER: _bert_classifier,
        BERT_PRETRAINED: _bert_classifier,
        LLAMA_CLASSIFIER: _llama_classifier,
    }
    for name, make in makers.items():
        torch.manual_seed(0)
        make().eval().save_pretrained(folder / name)


# Wide initial weights throughout: with the usual 0.02 such small models answer almost the same to everything, and
# the tests that ask whether an adapter has changed the output could not tell.
_SPREAD = 0.2
_TOKENS: dict[str, Any] = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 2}
_BERT: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": _SPREAD,
}
_LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": _SPREAD,
}


def _opt() -> PreTrainedModel:
    from transformers import OPTConfig, OPTForCausalLM

    size: dict[str, Any] = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 4, "num_hidden_layers": 5}
    return OPTForCausalLM(
        OPTConfig(
            **_TOKENS,
            **size,
            pad_token_id=1,
            num_attention_heads=4,
            max_position_embeddings=128,
            init_std=_SPREAD,
        )
    )


def _gpt2() -> PreTrainedModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    size: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(**_TOKENS, **size, initializer_range=_SPREAD))


def _llama() -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_TOKENS, **_LLAMA))


def _llama_classifier() -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return LlamaForSequenceClassification(LlamaConfig(**_TOKENS, **_LLAMA))


def _t5() -> PreTrainedModel:
    from transformers import T5Config, T5ForConditionalGeneration

    size: dict[str, Any] = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 37,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    return T5ForConditionalGeneration(T5Config(vocab_size=1024, **size))


def _bert() -> PreTrainedModel:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**_BERT))


def _bert_classifier() -> PreTrainedModel:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**_BERT))


def _roberta() -> PreTrainedModel:
    from transformers import RobertaConfig, RobertaModel

    return RobertaModel(RobertaConfig(**_BERT))
