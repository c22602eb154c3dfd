"""Models, tokenizers and data small enough to train in a test: made from scratch, nothing downloaded."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

COLOURS, ANIMALS = ("red", "green", "blue", "pink"), ("cat", "dog", "cow", "hen")
FILLER = ("one", "two", "the", "of", "and", "with", "near", "some")
LAYERS, WIDTH = 2, 16
NESTED_RANK = 4
# Six linear modules a layer and the pooler, the classifier's head apart.
LINEAR_MODULES = 6 * LAYERS + 1


def write_model(folder: Path, width: int = WIDTH) -> Path:
    """A random two-layer BERT with a word-level tokenizer, as `from_pretrained` wants it."""
    words = ["[PAD]", "[UNK]", *COLOURS, *ANIMALS, *FILLER]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


def write_data(folder: Path, rows: int = 96) -> Path:
    """`train.csv` and `validation.csv`: a text is about colours or about animals, hidden among filler words."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    for name, count in (("train", rows), ("validation", rows // 2)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for number in range(count):
                label, topic = (("colour", COLOURS), ("animal", ANIMALS))[number % 2]
                words = [*draw.choices(topic, k=3), *draw.choices(FILLER, k=draw.randint(3, 9))]
                draw.shuffle(words)
                writer.writerow([" ".join([*words, FILLER[number % 8], FILLER[number // 8 % 8]]), label])
    return folder


def write_recipe(folder: Path, **sections: Any) -> Path:
    """A recipe that trains the tiny model on the tiny data in a second; `sections` replace or add to its own."""
    values: dict[str, Any] = {
        "model": str(folder / "model"),
        "method": {"name": "lora", "r": 2, "lora_alpha": 4},
        "data": {"source": str(folder / "data"), "max_length": 16},
        "train": {"epochs": 1, "batch_size": 16, "learning_rate": 0.02, "logging_steps": 2},
        "output": str(folder / "out"),
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) else section
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_everything(folder: Path) -> Path:
    """Model, data and recipe in one folder; the recipe's path."""
    write_model(folder / "model")
    write_data(folder / "data")
    return write_recipe(folder)


def write_nested_recipe(folder: Path) -> Path:
    """Model, data and the recipe of a dylora run of `NESTED_RANK`, long enough that its ranks differ in quality."""
    write_everything(folder)
    method = {"name": "dylora", "r": NESTED_RANK, "lora_alpha": 8}
    return write_recipe(folder, method=method, train={"epochs": 10, "seed": 3})
