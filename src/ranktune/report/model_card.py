"""The `README.md` of a trained adapter: what it is, how good it was, how to load it. It has no path of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ranktune.report.tables import number

# What AutoModel of a task is called.
_AUTO_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


def model_card(metrics: Mapping[str, Any], ranks: Mapping[str, int], config: Mapping[str, Any]) -> str:
    """The card as Markdown.

    Args:
        metrics: of the run, as far as they are known: method, model, task, metric, before, after, steps, seed,
            trainable_params and versions.
        ranks: of every module; empty for a model that was trained as a whole.
        config: the method's fields.
    """
    local = Path(metrics["model"]).is_absolute()
    base = f"a model in a local folder named `{Path(metrics['model']).name}`" if local else f"`{metrics['model']}`"
    lines = ["---", "library_name: peft", "tags:", "- ranktune", f"- {metrics['method']}", "---", ""]
    lines += [f"# {metrics['method']} for {metrics['task']}", ""]
    lines += [f"Trained by ranktune {metrics['versions']['ranktune']} from {base}.", ""]
    lines += ["| | |", "|---|---|", f"| method | `{metrics['method']}` |"]
    if ranks:
        lowest, highest = min(ranks.values()), max(ranks.values())
        spread = f"{lowest}" if lowest == highest else f"{lowest} to {highest}"
        lines.append(f"| ranks | {spread} in {len(ranks)} modules, {sum(ranks.values()):,} in total |")
        lines += [f"| lora_alpha | {config['lora_alpha']} |"] if "lora_alpha" in config else []
    lines.append(f"| trainable parameters | {metrics['trainable_params']:,} |")
    score = str(metrics["metric"]).replace("_", " ")
    scores = f"{number(metrics['before'])} before, {number(metrics['after'])} after"
    lines.append(f"| {score} on the evaluation split | {scores} |")
    lines.append(f"| training | {metrics['steps']:,} steps, seed {metrics['seed']} |")
    lines += ["", "## How to load it", "", "```python", *_loading(metrics, local, adapter=bool(ranks)), "```", ""]
    if ranks:
        lines += ["`ranktune export` writes it as a plain LoRA, which loads without ranktune.", ""]
    return "\n".join(lines)


def _loading(metrics: Mapping[str, Any], local: bool, *, adapter: bool) -> list[str]:
    auto = _AUTO_CLASSES[metrics["task"]]
    if not adapter:
        return ["import transformers", "", f'model = transformers.{auto}.from_pretrained("path/of/this/folder")']
    base = "path/of/the/base/model" if local else metrics["model"]
    imports = ["import peft, ranktune, transformers  # ranktune makes its methods known to PEFT", ""]
    if metrics["model"] == "all-minilm":
        base = "path/of/all-MiniLM-L6-v2"
    labels = f", num_labels={metrics['num_labels']}" if metrics.get("num_labels") else ""
    return [
        *imports,
        f'base = transformers.{auto}.from_pretrained("{base}"{labels})',
        'model = peft.PeftModel.from_pretrained(base, "path/of/this/folder")',
    ]
