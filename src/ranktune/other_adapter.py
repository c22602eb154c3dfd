"""Another adapter, or a whole model, in the place of a run's own: whether it belongs to the run's base model."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel

from ranktune.adapter_file import CONFIG_FILE, adapter_folder, read_adapter
from ranktune.errors import AdapterFileError
from ranktune.foreign_start import Start, refuse_other_model
from ranktune.peft_compat import FILE_PREFIX
from ranktune.saved_adapter import load_saved_adapter
from ranktune.tasks.models import ModelSource


def fitting(path: Path, own: Path, base: PreTrainedModel, source: ModelSource) -> Path:
    """The folder to load, once its modules and shapes are known to be the base model's.

    Args:
        path: of an adapter (or a run's output directory), or of a model that `ranktune merge` wrote.
        own: the folder of the run's own adapter, whose head the other one has to bring along.
        base: the run's base model. source: its name, for messages.

    Raises:
        AdapterFileError: it is neither, or does not belong to this model; nothing was loaded.
    """
    folder = adapter_folder(path)
    if not (folder / CONFIG_FILE).exists() and (folder / "config.json").exists():
        _refuse_other_architecture(folder, base)
        _refuse_torn_weights(folder)
        return folder
    saved = load_saved_adapter(read_adapter(folder))
    refuse_other_model(Start(saved, saved.modules), base, source.name)
    trained = load_saved_adapter(read_adapter(own)).others if (own / CONFIG_FILE).exists() else {}
    if missing := sorted(set(trained) - set(saved.others)):
        raise AdapterFileError(
            f"{saved.file.tensor_file} lacks {missing[0].removeprefix(FILE_PREFIX)}, which the run trained in full: "
            "with a random one in its place the score would mean nothing."
        )
    return folder


def _refuse_other_architecture(folder: Path, base: PreTrainedModel) -> None:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise AdapterFileError(f"{folder / 'config.json'} is no model's configuration: {error}") from error
    if type(base).__name__ not in (config.architectures or []):
        raise AdapterFileError(
            f"{folder / 'config.json'} is of {', '.join(config.architectures or ['no architecture'])}, and the run's "
            f"model is a {type(base).__name__}."
        )


def _refuse_torn_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        try:
            # Compares the length of the file with what its header lists.
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise AdapterFileError(f"{file} is truncated or altered: {error}") from error
