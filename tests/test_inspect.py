"""`inspect`: figures of a saved adapter against dense computations on the model it came from."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import ranktune
from ranktune.adapter_file import read_adapter
from ranktune.adapters import layers, updates
from ranktune.cli import app
from ranktune.errors import AdapterFileError
from ranktune.report.inspection import inspection_lines
from ranktune.saved_adapter import load_saved_adapter
from tests.methods import ROWS, TARGETS, build_base, perturb
from tests.test_export import adapted

pytestmark = pytest.mark.filterwarnings("ignore:adapter .* is being trained without a controller")


def additive_delta(layer):
    """``s B diag(gate) A`` [out, in] in float64 without the magnitude, by hand for each kind of update."""
    update = layer.update_of("default")
    A, B, scale = update.plain_factors(layer.scaling["default"])
    return scale * B.detach().double() @ A.detach().double()


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("row", [row for row in ROWS if row.mergeable], ids=str)
def test_figures_of_every_method(tmp_path, row, kind):
    model = adapted(row, kind)
    model.save_pretrained(tmp_path)
    found = ranktune.inspect(tmp_path)
    assert (found.method, found.peft_type) == (row.config().method, "RANKTUNE")
    assert found.ranks == ranktune.ranks(model)
    assert found.parameters == sum(t.numel() for t in peft.get_peft_model_state_dict(model).values())
    for name, layer in layers(model, "default"):
        module, update, delta = found.modules[name], layer.update_of("default"), additive_delta(layer)
        assert module.shape == tuple(delta.shape)
        assert module.capacity == update.capacity
        assert module.norm == pytest.approx(float(delta.norm()), rel=1e-6)
        values = torch.linalg.svdvals(delta)
        torch.testing.assert_close(
            torch.tensor(module.singular_values, dtype=torch.float64),
            values[: len(module.singular_values)],
            rtol=1e-6,
            atol=1e-7,
        )
        assert float(values[len(module.singular_values) :].sum()) < 1e-9
        A, B, scale = update.plain_factors(layer.scaling["default"])
        A, B = A.detach(), B.detach()
        single = [scale * float(torch.outer(B[:, i], A[i]).norm()) for i in range(A.shape[0])]
        assert module.components == pytest.approx(single, rel=1e-5)
        if row.config().use_dora:
            m = update.lora_magnitude_vector.detach()
            assert module.magnitude == pytest.approx((float(m.min()), float(m.mean()), float(m.max())), rel=1e-6)
        else:
            assert module.magnitude is None


def test_a_nested_adapter_tells_its_norm_at_every_rank(tmp_path):
    model = adapted(next(row for row in ROWS if row.name == "dylora"))
    ranktune.set_rank(model, 2)
    model.save_pretrained(tmp_path)
    found = ranktune.inspect(tmp_path)
    for b in (1, 2, 3, 4):
        ranktune.set_rank(model, b)
        for name, layer in layers(model, "default"):
            assert found.modules[name].nested[b - 1] == pytest.approx(float(additive_delta(layer).norm()), rel=1e-6)
    assert set(found.ranks.values()) == {2}
    assert {module.capacity for module in found.modules.values()} == {4}


def test_a_mixture_tells_its_experts(tmp_path):
    model = adapted(next(row for row in ROWS if row.name == "mor"))
    model.save_pretrained(tmp_path)
    found = ranktune.inspect(tmp_path)
    for name, layer in layers(model, "default"):
        module, update = found.modules[name], layer.update_of("default").requires_grad_(False)
        assert module.norm is None
        assert len(module.experts) == 3
        for number, expert in enumerate(module.experts):
            delta = torch.diag(update.expert_B[number]) @ update.lora_B @ torch.diag(update.expert_A[number])
            assert expert.norm == pytest.approx(
                layer.scaling["default"] * float((delta @ update.lora_A).norm()), rel=1e-5
            )
            assert expert.rank_scaling == (float(update.expert_A[number].min()), float(update.expert_A[number].max()))
            assert expert.out_scaling == (float(update.expert_B[number].min()), float(update.expert_B[number].max()))
            assert expert.router_norm == pytest.approx(float(update.router[number].norm()))


STOCK = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False),
    "lora-rslora-patterns": peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        rank_pattern={"wide": 2},
        alpha_pattern={"nar.*": 7},
        target_modules=TARGETS,
        init_lora_weights=False,
    ),
    "dora": peft.LoraConfig(r=3, use_dora=True, target_modules=TARGETS, init_lora_weights=False),
    "adalora": peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=10, target_modules=TARGETS),
}


@pytest.mark.parametrize("name", list(STOCK))
def test_adapters_of_stock_peft(tmp_path, name):
    torch.manual_seed(0)
    model = peft.get_peft_model(build_base("Linear"), STOCK[name])
    if name == "adalora":
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_()
                if "lora_E" in key and "wide" in key:
                    parameter[1:] = 0.0
    model.save_pretrained(tmp_path)
    found = ranktune.inspect(tmp_path)
    assert found.method == name.split("-")[0]
    for module_name, module in found.modules.items():
        layer = model.get_submodule(f"base_model.model.{module_name}")
        if name == "dora":
            delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        else:
            delta = layer.get_delta_weight("default")
        assert module.norm == pytest.approx(float(delta.detach().norm()), rel=1e-5)
    if name == "adalora":
        assert found.ranks == {"square": 4, "wide": 1, "narrow": 4}
    if name == "lora-rslora-patterns":
        assert found.ranks == {"square": 3, "wide": 2, "narrow": 3}


def test_energy_counts_squares():
    module = next(iter(ranktune_module([3.0, 2.0, 1.0]).values()))
    # Squares 9, 4, 1 of 14: 64.3 %, 92.9 %, 100 %.
    assert [module.rank_for(share) for share in (0.6, 0.643, 0.9, 0.93, 1.0)] == [1, 2, 2, 3, 3]
    assert next(iter(ranktune_module([0.0, 0.0]).values())).rank_for(0.9) == 0


def ranktune_module(values):
    from ranktune.inspection import ModuleInspection

    return {"m": ModuleInspection((1, 1), 1, 1, 1, None, [], values, None, None, None)}


def test_a_run_with_its_history(tmp_path):
    model = adapted(next(row for row in ROWS if row.name == "dynamic-dora"))
    model.save_pretrained(tmp_path / "adapter")
    history = [{"step": 3, "module": "wide", "old": 6, "new": 2, "score": 0.1}]
    (tmp_path / "ranks.json").write_text(json.dumps({"final": {"wide": 2}, "history": history}))
    found = ranktune.inspect(tmp_path)
    assert found.history == [{"step": 3, "module": "wide", "old": 6, "new": 2}]
    (tmp_path / "ranks.json").write_text('{"history": [{"step": 3}]}')
    with pytest.raises(AdapterFileError, match=r"ranks.json is not what ranktune writes"):
        ranktune.inspect(tmp_path)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([10, 10], "2 rank changes in step 10: total rank 4 to 6"),
        ([10], "1 rank change in step 10:"),
        ([5, 1200], "2 rank changes in steps 5 to 1,200:"),
    ],
)
def test_when_ranks_changed_in_words(tmp_path, steps, said):
    model = adapted(next(row for row in ROWS if row.name == "dynamic-dora"))
    model.save_pretrained(tmp_path / "adapter")
    final = ranktune.ranks(model)
    grown = (sum(final.values()) - 3) // len(steps)
    history = [{"step": step, "module": "wide", "old": 1, "new": 1 + grown, "score": 0.1} for step in steps]
    (tmp_path / "ranks.json").write_text(json.dumps({"final": final, "history": history}))
    lines = list(inspection_lines(ranktune.inspect(tmp_path)))
    assert any(line.startswith(said) for line in lines), lines


def test_modules_stand_in_the_order_of_usual_models(tmp_path):
    """Not in that of the file: layer 10 before 2, keys before queries."""
    llama = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=12, num_attention_heads=2, vocab_size=16
    )  # fmt: skip
    bert = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=11, num_attention_heads=2, vocab_size=16)
    for model in (LlamaForCausalLM(llama), BertForMaskedLM(bert)):
        order = [
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name not in ("lm_head", "cls.predictions.decoder")
        ]
        config = peft.LoraConfig(r=1, target_modules=order, init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / type(model).__name__)
        folder = tmp_path / type(model).__name__
        assert list(ranktune.inspect(folder).modules) == order
        squeezed = ranktune.squeeze(folder, tmp_path / "small" / folder.name, energy=1.0)
        assert list(squeezed.ranks) == list(ranktune.inspect(folder).modules)


def test_what_is_not_in_use_is_not_called_a_record(tmp_path):
    model = adapted(next(row for row in ROWS if row.name == "dylora"))
    model.save_pretrained(tmp_path / "whole")
    ranktune.set_rank(model, 2)
    model.save_pretrained(tmp_path / "cut")
    for name, words in (("whole", "that record its ranks"), ("cut", "not in use, or record its ranks")):
        found = ranktune.inspect(tmp_path / name)
        record = found.parameters - found.adapter_parameters
        assert f"{record:,} {words}" in " ".join(inspection_lines(found))


@pytest.mark.parametrize("name", ["dynamic-dora-decomposed", "dylora", "mor"])
def test_the_command(tmp_path, name):
    model = adapted(next(row for row in ROWS if row.name == name), modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["inspect", str(tmp_path), "--png", str(tmp_path / "ranks.png")])
    assert done.exit_code == 0, done.output
    assert f"{name.removesuffix('-decomposed')} (RANKTUNE)" in done.output
    assert "trained in full beside it: head.bias, head.weight" in done.output
    assert {"dylora": "norm at ranks 1, 2, 4", "mor": "norm of each expert"}.get(name, "energy") in done.output
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    nowhere = CliRunner().invoke(app, ["inspect", str(tmp_path), "--png", str(tmp_path / "nowhere" / "ranks.png")])
    assert nowhere.exit_code == 2
    assert "there is no directory" in nowhere.output
    as_json = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path), "--json"]).output)
    assert as_json["modules"].keys() == {"square", "wide", "narrow"}
    assert as_json["modules"]["wide"]["rank"] == ranktune.ranks(model)["wide"]


def test_other_families_are_refused(tmp_path):
    peft.get_peft_model(
        build_base("Linear"), peft.IA3Config(target_modules=TARGETS, feedforward_modules=[])
    ).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"peft_type='IA3': only adapters of the LoRA family"):
        ranktune.inspect(tmp_path)


def test_a_saved_adapter_is_what_export_writes(tmp_path):
    """`SavedModule.plain` without the model gives the same factors as the model does."""
    for row in (row for row in ROWS if row.mergeable):
        model = adapted(row)
        model.save_pretrained(tmp_path / row.name)
        ranktune.export_lora(model, tmp_path / f"{row.name}-plain", "compact")
        ours = load_saved_adapter(read_adapter(tmp_path / row.name)).modules
        plain = load_saved_adapter(read_adapter(tmp_path / f"{row.name}-plain")).modules
        for name, _ in updates(model):
            for left, right in zip(ours[name].plain().A, plain[name].plain().A, strict=True):
                assert torch.equal(left, right)
            torch.testing.assert_close(ours[name].plain().B, plain[name].plain().B, rtol=1e-6, atol=0)


def test_perturbed_adapters_differ(tmp_path):
    """The figures above are of trained values, not of a start."""
    row = next(row for row in ROWS if row.name == "lora")
    fresh = peft.get_peft_model(build_base("Linear"), row.config(target_modules=TARGETS))
    fresh.save_pretrained(tmp_path / "fresh")
    assert {module.norm for module in ranktune.inspect(tmp_path / "fresh").modules.values()} == {0.0}
    perturb(fresh).save_pretrained(tmp_path / "moved")
    assert min(module.norm for module in ranktune.inspect(tmp_path / "moved").modules.values()) > 0.1


def test_zeros_that_fill_a_uniform_file_up_are_no_rank(tmp_path):
    model = adapted(next(row for row in ROWS if row.name == "dynamic-dora"))
    ranks = {name: len(update.plain_factors(1.0)[0]) for name, update in updates(model)}
    assert len(set(ranks.values())) > 1
    ranktune.export_lora(model, tmp_path / "even", "uniform")
    ranktune.export_lora(model, tmp_path / "uneven", "compact")
    even, uneven = (ranktune.inspect(tmp_path / name) for name in ("even", "uneven"))
    assert even.ranks == uneven.ranks == {name: rank for name, rank in ranks.items() if rank}
    assert {module.capacity for module in even.modules.values()} == {max(ranks.values())}
    assert even.adapter_parameters == uneven.adapter_parameters == uneven.parameters
    lines = " ".join(inspection_lines(even))
    assert f"{even.parameters - even.adapter_parameters:,} not in use, or record its ranks" in lines


def test_a_fresh_lora_has_its_rank_although_it_adds_nothing(tmp_path):
    config = peft.LoraConfig(r=3, target_modules=TARGETS)
    peft.get_peft_model(build_base("Linear"), config).save_pretrained(tmp_path)
    assert set(ranktune.inspect(tmp_path).ranks.values()) == {3}
