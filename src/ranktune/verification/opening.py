"""A trained adapter on its base model, with real inputs: from a run's output directory, or from an adapter folder."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ranktune.adapter_file import CONFIG_FILE, AdapterFile, read_adapter
from ranktune.dequantising import dequantised, quantisation
from ranktune.errors import AdapterFileError, ConfigError, DataError, RecipeError
from ranktune.quantised_weight import keep_layout
from ranktune.recipe import load_recipe
from ranktune.run.directory import RunDirectory
from ranktune.run.model import pretrained, restored
from ranktune.run.prepare import prepare
from ranktune.run.session import libraries_quiet
from ranktune.tasks.base import positions
from ranktune.tasks.docstrings import docstrings
from ranktune.tasks.models import resolve_model

EXAMPLES = 16
_TOKENS = 64
_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# In float32 whatever the run used: the comparison is then as sharp as it can be, and merging rounds once.
_FLOAT32 = ("train.base_dtype=fp32", "train.precision=fp32", "train.early_stopping_patience=null")
_HEAD_ENDS = ("classifier.weight", "score.weight", "out_proj.weight")


@dataclass(frozen=True)
class Opened:
    """A base model with an adapter on it, in float32 but for what is quantised.

    Attributes:
        model: the PEFT model, in evaluation mode.
        path, revision: where the base model came from. seed: what was seeded before it was loaded.
        tokenizer: the base model's, where it has one.
        batch: inputs for a forward pass. inputs: what they are, in words.
        dequantised: how the base model was quantised that is now an ordinary one, as transformers writes it down.
    """

    model: peft.PeftModel
    path: str
    revision: str | None
    seed: int
    tokenizer: PreTrainedTokenizerBase | None
    batch: dict[str, Tensor]
    inputs: str
    dequantised: dict[str, Any] | None = None


def open_trained(path: Path, base: str | None = None, texts: Path | None = None, *, dequantise: bool = False) -> Opened:
    """Load what was trained: ``OUT`` of `ranktune train`, or the folder of an adapter.

    Args:
        path: of either.
        base: of an adapter's folder, the base model instead of the one it names.
        texts: of an adapter's folder, a file with one text a line, to be the inputs.
        dequantise: a base model that is quantised, by the run's recipe or in its own folder, becomes an ordinary one.

    Raises:
        AdapterFileError, RecipeError, DataError, ConfigError: it is not there, not whole, or its base model or data
            are gone.
    """
    with libraries_quiet():
        if (path / CONFIG_FILE).exists():
            return _open_adapter(path, base, texts, dequantise)
        if path.is_dir() and not RunDirectory(path).contents():
            read_adapter(path)  # refuses it, naming what is there instead
        return _open_run(path, dequantise)


def _open_run(path: Path, dequantise: bool) -> Opened:
    directory = RunDirectory(path)
    directory.read_metrics()
    if not (directory.adapter / CONFIG_FILE).exists():
        raise ConfigError(
            f"the model in {path} was trained in full, without an adapter: {directory.adapter} is its folder already."
        )
    read_adapter(directory.adapter)
    recipe = load_recipe(directory.recipe, _FLOAT32)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(recipe.model_copy(update={"output": scratch}), directory.recipe)
    tokenizer = prepared.task.load_tokenizer(prepared.source.path, prepared.source.revision)
    base = pretrained(prepared.source, prepared.task, recipe)
    how = quantisation(base)
    model = _with_adapter(base, directory.adapter, dequantise)
    count = min(EXAMPLES, len(prepared.data.evaluation))
    examples = prepared.task.tokenize(prepared.data.evaluation.select(range(count)), tokenizer)
    taken = set(inspect.signature(base.forward).parameters)
    examples = examples.remove_columns([name for name in examples.column_names if name not in taken])
    rows = examples.select(range(min(count, len(examples)))).to_list()
    return Opened(
        model=model,
        path=prepared.source.path,
        revision=prepared.source.revision,
        seed=recipe.train.seed,
        tokenizer=tokenizer,
        batch=_tensors(prepared.task.collator(tokenizer, base)(rows)),
        inputs=f"{len(rows)} examples of the evaluation split",
        dequantised=how if dequantise else None,
    )


def _open_adapter(path: Path, base_model: str | None, texts: Path | None, dequantise: bool) -> Opened:
    file = read_adapter(path)
    lines = None if texts is None else _lines(texts)
    named = base_model or file.config.get("base_model_name_or_path")
    if not named:
        raise AdapterFileError(f"{path / CONFIG_FILE} names no base model (base_model_name_or_path).")
    try:
        source = resolve_model(named)
    except RecipeError as error:
        raise AdapterFileError(f"{path / CONFIG_FILE}: its base model cannot be found: {error}") from error
    revision = source.revision if base_model else file.config.get("revision") or source.revision
    try:
        config = AutoConfig.from_pretrained(source.path, revision=revision or "main", **_labels(file))
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path}: its base model {named!r} cannot be read: {error}") from error
    model_class = _model_class(file, config)
    transformers.set_seed(0)
    try:
        base = model_class.from_pretrained(source.path, config=config, dtype=torch.float32, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path}: the weights of its base model {named!r} cannot be loaded: {error}") from error
    tokenizer = _tokenizer(source.path, revision)
    if lines is not None and tokenizer is None:
        raise DataError(f"{texts} cannot be read by the base model {named!r}, which has no tokenizer.")
    batch, inputs = _texts(tokenizer, config, lines) if tokenizer is not None else _random_tokens(config)
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    how = quantisation(base)
    model = _with_adapter(base, path, dequantise)
    return Opened(model, source.path, revision, 0, tokenizer, batch, inputs, how if dequantise else None)


def _with_adapter(base: PreTrainedModel, adapter: Path, dequantise: bool) -> peft.PeftModel:
    """The base model with a saved adapter on it, in evaluation mode."""
    keep_layout(base)
    return cast(peft.PeftModel, restored(dequantised(base) if dequantise else base, adapter)).eval()


def _lines(file: Path) -> list[str]:
    """The first texts of a file that has one a line."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text: {error}.") from error
    if not any(lines):
        raise DataError(f"{file} holds no text: write one a line.")
    return [line for line in lines if line][:EXAMPLES]


def _model_class(file: AdapterFile, config: PretrainedConfig) -> Any:
    """The class in transformers that the adapter was trained on."""
    task, mapping = file.config.get("task_type"), file.config.get("auto_mapping")
    if task is not None:
        name = _AUTO_CLASSES.get(task)
    elif isinstance(mapping, dict):
        name = mapping.get("base_model_class")
    else:
        name = next(iter(config.architectures or []), None)
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not (issubclass(found, PreTrainedModel) or name in _AUTO_CLASSES.values()):
        raise AdapterFileError(
            f"{file.path / CONFIG_FILE}: task_type={task!r}, auto_mapping={mapping!r} name no model class of "
            "transformers."
        )
    return found


def _labels(file: AdapterFile) -> dict[str, int]:
    """The number of classes, from the head in the file."""
    for name, tensor in file.tensors.items():
        if file.config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") and name.endswith(_HEAD_ENDS):
            return {"num_labels": tensor.shape[0]}
    return {}


def _tokenizer(path: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main")
    except (OSError, ValueError, KeyError):
        return None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    # For a model without one, transformers makes an empty tokenizer of the kind its architecture has.
    return tokenizer if tokenizer.pad_token is not None and tokenizer("a text").input_ids else None


def _texts(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, lines: Sequence[str] | None
) -> tuple[dict[str, Tensor], str]:
    """Inputs of the texts that are given, or of some that are everywhere."""
    texts, words = lines, "texts"
    if texts is None:
        words = "texts (docstrings of the standard library)"
        try:
            texts = [example.text for example in docstrings()[:EXAMPLES]]
        except DataError:  # a Python without its sources
            texts = ["Every text is a test.", "This one is a little longer than the one before it."]
    length = min(_TOKENS, positions(config) or _TOKENS)
    encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
    return _tensors(encoded), f"{len(texts)} {words}"


def _random_tokens(config: PretrainedConfig) -> tuple[dict[str, Tensor], str]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (EXAMPLES, _TOKENS // 4), generator=generator)
    return {"input_ids": ids}, f"{EXAMPLES} rows of random tokens (the base model has no tokenizer)"


def _tensors(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}
