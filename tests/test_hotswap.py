"""PEFT's hot-swapping: exported adapters take each other's place on a loaded model, and it computes what each did."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

import ranktune
from tests.methods import ROWS, build_base, inputs
from tests.test_export import adapted, in_stock_peft

pytestmark = pytest.mark.filterwarnings("ignore:adapter .* is being trained without a controller")

# What PEFT itself compares is equal in all of them: it swaps neither magnitudes nor patterns.
NAMES = ["lora", "increlora", "dynamic-dora", "dylora", "mor-uniform"]
KINDS = ["Linear", "Conv1D"]


@pytest.fixture(params=KINDS)
def exported(request, tmp_path):
    """A folder of uniform profile from every method, of other ranks and scales, and the outputs each has to give."""
    folders = {}
    for position, name in enumerate(NAMES):
        row = next(row for row in ROWS if row.name == name)
        model = adapted(row, request.param, lora_alpha=3 + position)
        if name == "dylora":
            ranktune.set_rank(model, 2)
        result = ranktune.export_lora(model, tmp_path / name)
        folders[tmp_path / name] = (model(inputs()).detach(), max(result.ranks.values()))
    return request.param, folders


def test_any_takes_the_place_of_any(exported):
    kind, folders = exported
    largest = max(rank for _, rank in folders.values())
    assert len({rank for _, rank in folders.values()}) > 1
    order = [*folders, *reversed(folders)]
    model = in_stock_peft(order[0], kind)
    prepare_model_for_compiled_hotswap(model, target_rank=largest)
    for folder in order:
        hotswap_adapter(model, str(folder), adapter_name="default", torch_device="cpu")
        torch.testing.assert_close(model(inputs()), folders[folder][0], rtol=2e-5, atol=2e-5)
        base = build_base(kind)(inputs())
        assert (model(inputs()) - base).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_compiled_model_is_not_compiled_again(exported):
    kind, folders = exported
    first, *others = folders
    model = in_stock_peft(first, kind)
    prepare_model_for_compiled_hotswap(model, target_rank=max(rank for _, rank in folders.values()))
    torch.compiler.reset()
    model.compile(backend="eager")
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for folder in (first, *others):
            hotswap_adapter(model, str(folder), adapter_name="default", torch_device="cpu")
            torch.testing.assert_close(model(inputs()), folders[folder][0], rtol=2e-5, atol=2e-5)


def test_equal_ranks_need_no_preparation(tmp_path):
    row = next(row for row in ROWS if row.name == "lora")
    expected = {}
    for name, alpha in (("first", 2), ("second", 9)):
        model = adapted(row, lora_alpha=alpha)
        ranktune.export_lora(model, tmp_path / name)
        expected[name] = model(inputs()).detach()
    loaded = in_stock_peft(tmp_path / "first")
    hotswap_adapter(loaded, str(tmp_path / "second"), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(loaded(inputs()), expected["second"], rtol=2e-5, atol=2e-5)
    assert (expected["first"] - expected["second"]).abs().max() > 0.1


def test_modules_that_were_dropped_are_reset(tmp_path):
    """The incoming adapter may adapt fewer modules than the one that leaves, whose other modules then add nothing."""
    row = next(row for row in ROWS if row.name == "dynamic-dora")
    full, fewer = adapted(row), adapted(row)
    wide = dict(ranktune.adapters.updates(fewer))["wide"]
    wide.rank_active[:] = False
    wide.gate.data.zero_()
    ranktune.export_lora(full, tmp_path / "full")
    assert ranktune.export_lora(fewer, tmp_path / "fewer").dropped == ["wide"]
    model = in_stock_peft(tmp_path / "full")
    hotswap_adapter(model, str(tmp_path / "fewer"), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(model(inputs()), fewer(inputs()), rtol=2e-5, atol=2e-5)


def test_a_compact_file_is_refused_by_peft(tmp_path):
    """Its scales lie in a pattern, which PEFT does not swap: this is what the uniform profile is for."""
    row = next(row for row in ROWS if row.name == "dynamic-dora")
    model = adapted(row)
    ranktune.export_lora(model, tmp_path / "uniform")
    ranktune.export_lora(model, tmp_path / "compact", profile="compact")
    loaded = in_stock_peft(tmp_path / "uniform")
    with pytest.raises(ValueError, match="Configs are incompatible: for alpha_pattern"):
        hotswap_adapter(loaded, str(tmp_path / "compact"), adapter_name="default", torch_device="cpu")


def test_a_squeezed_adapter_takes_the_place_of_the_whole_one(tmp_path):
    row = next(row for row in ROWS if row.name == "increlora")
    model = adapted(row)
    model.save_pretrained(tmp_path / "saved")
    ranktune.export_lora(model, tmp_path / "whole")
    result = ranktune.squeeze(tmp_path / "saved", tmp_path / "small", total_rank=4, profile="uniform")
    largest = max(max(result.ranks_before.values()), max(result.ranks.values()))
    loaded = in_stock_peft(tmp_path / "whole")
    prepare_model_for_compiled_hotswap(loaded, target_rank=largest)
    hotswap_adapter(loaded, str(tmp_path / "small"), adapter_name="default", torch_device="cpu")
    expected = peft.PeftModel.from_pretrained(build_base("Linear"), str(tmp_path / "small")).eval()
    torch.testing.assert_close(loaded(inputs()), expected(inputs()), rtol=2e-5, atol=2e-5)
