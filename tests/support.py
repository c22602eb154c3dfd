"""docs/support.md: which methods were seen to work on which layers in stock PEFT, and what is refused, with the reason.

`make support` writes the page; tests/test_support.py fails when it is out of date.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer

import ranktune
from ranktune.baselines import Full
from ranktune.dequantising import dequantised
from ranktune.errors import RanktuneError
from ranktune.quantised_weight import quantised_weight
from ranktune.run.quantization import check_quantization
from ranktune.run.session import libraries_quiet
from ranktune.tasks.models import resolve_model
from tests import support_in_stock_peft
from tests.methods import BASES
from tests.quantised import quantise

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
STEPS = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = ["Linear", "Conv1D", "NF4", "int8", "torchao int8"]
# How far outputs may be apart, as a share of the largest. bfloat16 has 8 bits; and where 8-bit layers round their
# inputs to 8 bits as well, the last bit of an input decides how.
TOLERANCES = {"float32": 1e-5, "bfloat16": 3e-2}
ROUNDED_INPUTS = 2e-2
TEXTS = ["Return the number of elements.", "Raise ValueError if the file is closed.", "Split a path into two."]


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    config: type[ranktune.RankConfig]
    fields: dict[str, Any]

    def make(self) -> ranktune.RankConfig:
        return self.config(target_modules=["query", "value", "dense"], lora_alpha=8, **self.fields)


_PRUNED = {"r": 2, "init_r": 4, "prune_interval": 1}
_GROWN = {"r": 3, "grow_interval": 1, "grow_by": 1, "top_h": 3, "score_window": "all"}
METHODS = [
    Method("`lora`", ranktune.RankConfig, {"r": 4}),
    Method("`dora`", ranktune.DoraConfig, {"r": 4}),
    Method("`dynamic-dora`", ranktune.DynamicDoraConfig, _PRUNED),
    Method("`dynamic-dora`, `use_dora`", ranktune.DynamicDoraConfig, {**_PRUNED, "use_dora": True}),
    Method("`increlora`", ranktune.IncreLoraConfig, _GROWN),
    Method("`increlora`, `use_dora`", ranktune.IncreLoraConfig, {**_GROWN, "use_dora": True}),
    Method("`dylora`", ranktune.DyLoraConfig, {"r": 4}),
    Method("`dylora`, `use_dora`", ranktune.DyLoraConfig, {"r": 4, "use_dora": True}),
    Method("`mor`, `router: uniform`", ranktune.MorConfig, {"r": 4, "router": "uniform"}),
]


@dataclass(frozen=True)
class Case:
    """One cell of the table: a method on layers of a kind. `outputs` are ours; `effect` is what the adapter changes."""

    method: Method
    dtype: str
    kind: str
    dequantise: bool
    outputs: torch.Tensor
    effect: float

    @property
    def tolerance(self) -> float:
        """A share of the largest output."""
        rounded = self.kind == "int8" and not self.dequantise
        return max(TOLERANCES[self.dtype], ROUNDED_INPUTS if rounded else 0.0)

    def judge(self, stock: torch.Tensor) -> str | None:
        """What is wrong with stock PEFT's outputs, or None."""
        largest, apart = float(self.outputs.abs().max()), float((stock - self.outputs).abs().max())
        if apart > self.tolerance * largest:
            return f"outputs are {apart:.3g} apart, in outputs up to {largest:.3g}"
        if self.effect < 5 * apart:
            return f"the adapter changes outputs by {self.effect:.3g} only, where {apart:.3g} is the difference"
        return None


def train_and_export(folder: Path) -> list[Case]:
    """Every method on every kind of layer: trained, written as plain LoRA, and what it computes here."""
    source = folder / "model"
    inputs = save_base(source)
    save_file(inputs, folder / "inputs.safetensors")
    cases: list[Case] = []
    bases = []
    for dtype in DTYPES:
        for kind in KINDS:
            base = support_in_stock_peft.load_base(str(source), DTYPES[dtype], kind)
            first = len(cases)
            for method in METHODS:
                model = train(base, method, inputs)
                number = len(cases)
                ranktune.export_lora(model, folder / f"adapter-{number}")
                # Stock PEFT's DoRA spoils these weights when it reads them on a CPU.
                spoilt = kind == "int8" and model.peft_config["default"].use_dora
                model.save_pretrained(folder / "own")
                shown = _on_dequantised(source, dtype, kind, folder / "own") if spoilt else model
                cases.append(Case(method, dtype, kind, spoilt, *_compute(shown, inputs)))
                base = model.unload()
            numbered = range(first, len(cases))
            bases.append(((dtype, kind), [(number, cases[number].dequantise) for number in numbered]))
    (folder / "job.json").write_text(json.dumps({"model": str(source), "bases": bases}))
    return cases


def save_base(folder: Path) -> dict[str, torch.Tensor]:
    """all-MiniLM's first layer and its pooler, with the words that the texts need; the texts as inputs."""
    place = resolve_model("all-minilm").path
    base = AutoModel.from_pretrained(place, num_hidden_layers=1)
    encoded = AutoTokenizer.from_pretrained(place)(TEXTS, padding=True, return_tensors="pt")
    used, ids = encoded["input_ids"].unique(return_inverse=True)
    words = base.embeddings.word_embeddings.weight.data[used]
    base.embeddings.word_embeddings = nn.Embedding.from_pretrained(words)
    base.config.vocab_size, base.config.pad_token_id = len(used), None
    base.save_pretrained(folder)
    return {"input_ids": ids.contiguous(), "attention_mask": encoded["attention_mask"]}


def train(base: nn.Module, method: Method, inputs: dict[str, torch.Tensor]) -> peft.PeftModel:
    """A few steps towards other texts' outputs."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base, method.make()).train()
    optimizer = torch.optim.AdamW(ranktune.parameter_groups(model, 0.05, 0.0))
    config = model.peft_config["default"]
    controller = ranktune.RankController(model, optimizer, total_steps=STEPS) if config.needs_controller else None
    for _ in range(STEPS):
        hidden = model(**inputs).last_hidden_state.float()
        (hidden - hidden.detach().roll(1, 0)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if controller is not None:
        controller.finish()
    return model.eval()


def _on_dequantised(source: Path, dtype: str, kind: str, adapter: Path) -> peft.PeftModel:
    base = dequantised(support_in_stock_peft.load_base(str(source), DTYPES[dtype], kind)).to(DTYPES[dtype])
    return peft.PeftModel.from_pretrained(base, adapter).eval()


@torch.no_grad()
def _compute(model: peft.PeftModel, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    outputs = model(**inputs).last_hidden_state.float()
    with model.disable_adapter():
        without = model(**inputs).last_hidden_state.float()
    return outputs, float((outputs - without).abs().max())


def outputs_in_stock_peft(folder: Path) -> dict[str, torch.Tensor]:
    """Of every case by its number, from a process that never imports ranktune."""
    script = Path(support_in_stock_peft.__file__)
    subprocess.run(
        [sys.executable, str(script), str(folder)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": ""},
    )
    return load_file(folder / "outputs.safetensors")


def adapted(**fields: Any) -> peft.PeftModel:
    """A small model with an adapter of the config that `fields` names by `config`."""
    config = fields.pop("config", ranktune.RankConfig)
    return peft.get_peft_model(BASES["Linear"](), config(**{"target_modules": ["square"], **fields}))


def _merge_quantised() -> None:
    base = quantise(BASES["Linear"](), "int8")
    peft.get_peft_model(base, ranktune.RankConfig(target_modules=["square"])).merge_and_unload()


def _dora_without_values() -> None:
    backend = peft.utils.quantization_utils.ForwardOnlyQuantizationBackend("gptq")
    quantised_weight(nn.Linear(4, 4), backend)


def _evaluated_before() -> None:
    base = quantise(BASES["Linear"](), "nf4")
    base.wide.weight.quant_state.packing_format_for_cpu = True
    peft.get_peft_model(base, ranktune.RankConfig(target_modules=["square"]))


def _zero_row() -> None:
    base = BASES["Linear"]()
    base.square.weight.data[0] = 0.0
    with tempfile.TemporaryDirectory() as folder:
        model = peft.get_peft_model(base, ranktune.DoraConfig(target_modules=["square"]))
        ranktune.export_lora(model, Path(folder, "out"))


def _export(model: peft.PeftModel, **more: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranktune.export_lora(model, Path(folder, "out"), **more)


def _full_on_quantised() -> None:
    check_quantization("nf4", Full())


def _embedding() -> None:
    peft.get_peft_model(nn.Sequential(nn.Embedding(4, 4)), ranktune.RankConfig(target_modules=["0"]))


def _per_sample() -> None:
    adapted()(torch.zeros(1, 12), adapter_names=["default"])


REFUSED: list[tuple[str, Callable[[], Any]]] = [
    ("`mor` with a router, exported", lambda: _export(adapted(config=ranktune.MorConfig))),
    ("`mor` with a router, merged", lambda: adapted(config=ranktune.MorConfig).merge_and_unload()),
    ("`mor`, `use_dora`", lambda: ranktune.MorConfig(use_dora=True)),
    ("`mor`, balanced with a bias", lambda: ranktune.MorConfig(router="balanced", router_bias=True)),
    ("`dynamic-dora`, `rank_pattern`", lambda: ranktune.DynamicDoraConfig(rank_pattern={"query": 2})),
    ("`increlora`, `rank_pattern`", lambda: ranktune.IncreLoraConfig(rank_pattern={"query": 2})),
    ("cutting what is not nested", lambda: _export(adapted(), rank=2)),
    ("merging into quantised weights", _merge_quantised),
    ("`use_dora` on weights that cannot be dequantised", _dora_without_values),
    ("4-bit weights that were evaluated on a CPU before", _evaluated_before),
    ("training quantised weights themselves", _full_on_quantised),
    ("`use_dora`, exported, where a row of the weight is zero", _zero_row),
    ("an embedding", _embedding),
    ("another adapter for every sample", _per_sample),
]


def reasons() -> Iterator[tuple[str, str]]:
    """Every refused combination with the message of the error that it ends in."""
    for what, attempt in REFUSED:
        try:
            attempt()
        except RanktuneError as error:
            yield what, re.sub(r"^/\S+: ", "", str(error))
        else:
            raise AssertionError(f"{what} was not refused")


def page(verdicts: dict[tuple[str, str, str], str | None]) -> str:
    """docs/support.md, from what was found wrong with each cell (method, dtype, kind): None is nothing."""
    lines = [
        "# What works with what",
        "",
        *textwrap.wrap(
            "Made by `make support`; a test fails when it is out of date. Each cell with a tick is a run: all-MiniLM's "
            f"first layer and pooler, adapted, trained for {STEPS} steps with the ranks moving, exported with "
            "`export_lora`, loaded by stock PEFT in a process that never imports ranktune, and compared with the "
            "outputs of the model that was trained, on a CPU. They are equal within "
            f"{TOLERANCES['float32']:g} of the largest output on float32 bases and {TOLERANCES['bfloat16']:g} on "
            f"bfloat16 ones; within {ROUNDED_INPUTS:g} where bitsandbytes' 8-bit layers round their inputs to 8 bits "
            "too, since the last bit of an input then decides how. The adapter changes outputs by at least five times "
            "the difference.",
            120,
        ),
        "",
    ]
    for dtype in DTYPES:
        lines += [f"## {dtype}", "", "| method | " + " | ".join(KINDS) + " |", "|---" * (1 + len(KINDS)) + "|"]
        for method in METHODS:
            cells = []
            for kind in KINDS:
                wrong = verdicts[method.name, dtype, kind]
                note = " (1)" if kind == "int8" and method.make().use_dora else ""
                cells.append(f"✓{note}" if wrong is None else f"**no**: {wrong}")
            lines.append(f"| {method.name} | {' | '.join(cells)} |")
        lines.append("")
    lines += [
        *textwrap.wrap(
            "`Conv1D` is GPT-2's transposed layer; NF4 and int8 are bitsandbytes', torchao int8 is its weight-only "
            "kind. What is quantised is frozen; adapters stay in full precision.",
            120,
        ),
        "",
        *textwrap.wrap(
            "(1) Compared on the dequantised weights: on a CPU, stock PEFT's DoRA quantises 8-bit weights of "
            "bitsandbytes a second time when it reads them, so that every output after it is wrong; ranktune's "
            "does not.",
            120,
        ),
        "",
        "## Refused",
        "",
        "| what | the message |",
        "|---|---|",
        *(f"| {what} | {reason} |" for what, reason in reasons()),
        "",
    ]
    return "\n".join(lines)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say, and without warnings about controllers that these few steps do not need."""
    with warnings.catch_warnings(), libraries_quiet():
        warnings.simplefilter("ignore")
        yield


def examine() -> dict[tuple[str, str, str], str | None]:
    """Do every case, here and in stock PEFT."""
    with tempfile.TemporaryDirectory() as scratch, quiet():
        folder = Path(scratch)
        cases = train_and_export(folder)
        stock = outputs_in_stock_peft(folder)
    return {(c.method.name, c.dtype, c.kind): c.judge(stock[str(number)]) for number, c in enumerate(cases)}


if __name__ == "__main__":
    text = page(examine())
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE}")  # noqa: T201
