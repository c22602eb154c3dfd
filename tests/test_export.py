"""`export_lora`: what stock PEFT loads from the folder gives the outputs the adapter gave."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ranktune
from ranktune.adapters import layers, updates
from ranktune.errors import ConfigError, ExportError
from ranktune.plain_lora import exact_pattern, exact_targets
from tests.methods import ROWS, TARGETS, build_base, inputs, perturb

pytestmark = pytest.mark.filterwarnings("ignore:adapter .* is being trained without a controller")

KINDS = ["Linear", "Conv1D"]
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-5, torch.bfloat16: 0.06}


def adapted(row, kind="Linear", dtype=torch.float32, **fields):
    """A model with an adapter whose components have been pruned or grown where its method does that."""
    model = peft.get_peft_model(build_base(kind, dtype), row.config(target_modules=TARGETS, **fields))
    return uneven(perturb(model)).eval()


def uneven(model):
    """Give every gated module another number of active components, as a policy would leave them."""
    for number, (_, update) in enumerate(updates(model)):
        if update.gate is not None:
            update.rank_active[:] = torch.arange(update.capacity) < 1 + number
            update.gate.data[1 + number :] = 0.0
            if hasattr(update, "count"):
                update.count()
    return model


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def in_stock_peft(folder, kind="Linear", dtype=torch.float32, base=None):
    model = peft.PeftModel.from_pretrained(build_base(kind, dtype) if base is None else base, str(folder)).eval()
    assert type(model.base_model) is peft.LoraModel
    return model


@pytest.mark.parametrize("profile", ["uniform", "compact"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("row", [row for row in ROWS if row.mergeable], ids=str)
def test_stock_peft_computes_the_same(tmp_path, row, dtype, kind, profile):
    model = adapted(row, kind, dtype)
    ranktune.export_lora(model, tmp_path / "plain", profile=profile)
    x, base = inputs(dtype), build_base(kind, dtype)
    expected = model(x)
    assert (expected - base(x)).abs().max() > 0.1
    loaded = in_stock_peft(tmp_path / "plain", kind, dtype)
    torch.testing.assert_close(loaded(x), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("row", [row for row in ROWS if row.config_class.gated], ids=str)
def test_profiles(tmp_path, row):
    model = adapted(row)
    uniform = ranktune.export_lora(model, tmp_path / "uniform")
    compact = ranktune.export_lora(model, tmp_path / "compact", profile="compact")
    ranks = ranktune.ranks(model)
    assert sorted(ranks.values()) == [1, 2, 3] == sorted(uniform.ranks.values())
    assert uniform.ranks == compact.ranks == ranks
    config = config_of(tmp_path / "uniform")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (3, 3, {}, {})
    assert not config["use_rslora"]
    assert config["peft_type"] == "LORA"
    shapes = {tensor.shape[0] for name, tensor in tensors(tmp_path / "uniform").items() if "lora_A" in name}
    assert shapes == {3}
    config = config_of(tmp_path / "compact")
    assert config["rank_pattern"] == config["alpha_pattern"] == {n: r for n, r in ranks.items() if r != config["r"]}
    assert config["r"] == config["lora_alpha"] == 1
    for name, tensor in tensors(tmp_path / "compact").items():
        if "lora_A" in name:
            assert tensor.shape[0] == ranks[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")]


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("row", [row for row in ROWS if not row.mergeable], ids=str)
@pytest.mark.parametrize("svd_rank", [None, 2])
def test_what_depends_on_its_input_is_refused(tmp_path, row, svd_rank):
    with pytest.raises(ConfigError, match="depends on the input"):
        ranktune.export_lora(adapted(row), tmp_path / "plain", svd_rank=svd_rank)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("row", [row for row in ROWS if row.config_class is ranktune.DyLoraConfig], ids=str)
def test_a_nested_adapter_is_cut_at_any_rank(tmp_path, row):
    """In stock PEFT it computes what the adapter does at that rank, whatever rank is set."""
    model = adapted(row)
    for b in (1, 3, 4):
        ranktune.set_rank(model, 2)
        exported = ranktune.export_lora(model, tmp_path / str(b), rank=b)
        assert set(exported.ranks.values()) == {b} == {config_of(tmp_path / str(b))["r"]}
        ranktune.set_rank(model, b)
        torch.testing.assert_close(in_stock_peft(tmp_path / str(b))(inputs()), model(inputs()), rtol=2e-5, atol=2e-5)


def test_modules_without_components_are_dropped_unless_their_magnitude_counts(tmp_path):
    row = next(row for row in ROWS if row.name == "dynamic-dora")
    for decomposed in (False, True):
        model = adapted(row, use_dora=decomposed)
        wide = dict(updates(model))["wide"]
        wide.rank_active[:] = False
        wide.gate.data.zero_()
        for profile in ("uniform", "compact"):
            folder = tmp_path / f"{profile}-{decomposed}"
            exported = ranktune.export_lora(model, folder, profile=profile)
            assert exported.dropped == ([] if decomposed else ["wide"])
            assert any("wide" in name for name in tensors(folder)) == decomposed
            torch.testing.assert_close(in_stock_peft(folder)(inputs()), model(inputs()), rtol=2e-5, atol=2e-5)


def test_an_adapter_without_any_component_is_refused(tmp_path):
    model = adapted(next(row for row in ROWS if row.name == "dynamic-dora"))
    for _, update in updates(model):
        update.rank_active[:] = False
        update.gate.data.zero_()
    with pytest.raises(ConfigError, match="every module of this adapter has rank 0"):
        ranktune.export_lora(model, tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_a_component_pruned_for_now_counts_as_long_as_it_contributes(tmp_path):
    """Inside the pruning window a gate that was zeroed is trained on, and forward adds it."""
    model = adapted(next(row for row in ROWS if row.name == "dynamic-dora"))
    update = dict(updates(model))["square"]
    update.gate.data[5] = 0.7
    exported = ranktune.export_lora(model, tmp_path / "plain")
    assert exported.ranks["square"] == update.rank + 1
    torch.testing.assert_close(in_stock_peft(tmp_path / "plain")(inputs()), model(inputs()), rtol=2e-5, atol=2e-5)


def test_the_reserve_of_a_growing_adapter_is_dropped(tmp_path):
    model = adapted(next(row for row in ROWS if row.name == "increlora"))
    expected = model(inputs())
    for _, update in updates(model):
        update.stock(2, step=7, gate=0.5)
    assert (model(inputs()) - expected).abs().max() > 0.01
    exported = ranktune.export_lora(model, tmp_path / "plain")
    assert exported.ranks == ranktune.ranks(model)
    torch.testing.assert_close(in_stock_peft(tmp_path / "plain")(inputs()), expected, rtol=2e-5, atol=2e-5)


def test_a_grown_module_takes_the_scale_of_its_own_rank(tmp_path):
    """In float64 by hand: s = alpha / r_k, gates inside."""
    model = adapted(next(row for row in ROWS if row.name == "increlora"))
    ranktune.export_lora(model, tmp_path / "plain", profile="compact")
    saved = tensors(tmp_path / "plain")
    for name, update in updates(model):
        k = update.rank
        A, B, e = (t.detach().double() for t in (update.lora_A[:k], update.lora_B[:, :k], update.gate[:k]))
        expected = 6 / k * (B @ torch.diag(e) @ A)
        B_file, A_file = (saved[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "BA")
        torch.testing.assert_close(B_file @ A_file, expected, rtol=1e-6, atol=1e-7)


def test_a_rank_to_cut_at_is_for_nested_adapters(tmp_path):
    model = adapted(ROWS[0])
    with pytest.raises(ConfigError, match="it was not trained to work at other ranks than its own"):
        ranktune.export_lora(model, tmp_path / "cut", rank=2)
    assert list(tmp_path.iterdir()) == []


class Twins(nn.Module):
    """Modules whose names end in one another's, and one that is not adapted."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"q": nn.Linear(4, 4), "xq": nn.Linear(4, 4)})
        self.outer = nn.ModuleDict({"inner": nn.ModuleDict({"q": nn.Linear(4, 4)})})

    def forward(self, x):
        return self.q(x) + 2 * self.inner["q"](x) + 3 * self.inner["xq"](x) + 5 * self.outer["inner"]["q"](x)


@pytest.mark.parametrize("profile", ["uniform", "compact"])
@pytest.mark.parametrize("left_out", [None, "q", "inner.q", "inner.xq", "outer.inner.q"])
def test_names_that_end_in_one_another(tmp_path, profile, left_out):
    """Every module gets its own rank and scale, and the one left out gets nothing."""
    base = Twins()
    names = ["q", "inner.q", "inner.xq", "outer.inner.q"]
    chosen = "|".join(name.replace(".", r"\.") for name in names if name != left_out)
    config = ranktune.DynamicDoraConfig(r=4, target_modules=chosen)
    model = uneven(perturb(peft.get_peft_model(base, config))).eval()
    expected = model(torch.eye(4))
    exported = ranktune.export_lora(model, tmp_path / "plain", profile=profile)
    assert set(exported.ranks) == set(names) - {left_out}
    loaded = in_stock_peft(tmp_path / "plain", base=model.unload())
    torch.testing.assert_close(loaded(torch.eye(4)), expected)
    found = {name.removeprefix("base_model.model.") for name, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert found == set(exported.ranks)


def test_the_shortest_exact_targets():
    adapted_names = ["layer.0.q", "layer.1.q"]
    assert exact_targets(adapted_names, ["layer", "layer.0", "layer.1", "head"]) == ["q"]
    assert exact_targets(adapted_names, ["layer.2.q"]) == ["layer.0.q", "layer.1.q"]
    assert exact_targets(adapted_names, ["deep.layer.1.q"]) == r"layer\.0\.q|layer\.1\.q"
    # A module whose name only ends in the same letters is no obstacle.
    assert exact_targets(adapted_names, ["xlayer.1.xq"]) == ["q"]


def test_patterns_are_anchored_only_where_they_have_to_be():
    assert exact_pattern({"a.q": 1, "b.q": 2, "c.q": 3}, 2) == {"a.q": 1, "c.q": 3}
    assert exact_pattern({"a.q": 1, "b.a.q": 2}, 2) == {r"^a\.q": 1}
    assert exact_pattern({"a.q": 1, "b.a.q": 3}, 2) == {r"^a\.q": 1, r"^b\.a\.q": 3}
    assert exact_pattern({"b.a.q": 3, "a.q": 1}, 2) == {"b.a.q": 3, "a.q": 1}  # the first that matches wins


def test_a_head_trained_in_full_travels(tmp_path):
    model = adapted(ROWS[0], modules_to_save=["head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    ranktune.export_lora(model, tmp_path / "plain")
    assert config_of(tmp_path / "plain")["modules_to_save"] == ["head"]
    torch.testing.assert_close(in_stock_peft(tmp_path / "plain")(inputs()), model(inputs()), rtol=2e-5, atol=2e-5)


def test_another_adapter_of_the_model(tmp_path):
    model = adapted(ROWS[0])
    model.add_adapter("second", ROWS[2].config(target_modules=["wide"]))
    perturb(model, seed=5)
    model.set_adapter("second")
    expected = model.eval()(inputs())
    model.set_adapter("default")
    ranktune.export_lora(model, tmp_path / "plain", adapter_name="second")
    torch.testing.assert_close(in_stock_peft(tmp_path / "plain")(inputs()), expected, rtol=2e-5, atol=2e-5)
    with pytest.raises(ConfigError, match=r"'secnd' is not on this model.*Did you mean 'second'"):
        ranktune.export_lora(model, tmp_path / "none", adapter_name="secnd")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [row for row in ROWS if row.name in ("lora", "dora", "increlora-decomposed")], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_svd_rank_gives_the_best_lora_and_says_what_it_loses(tmp_path, row, kind, rank):
    model = adapted(row, kind)
    exported = ranktune.export_lora(model, tmp_path / "plain", svd_rank=rank, profile="compact")
    assert not config_of(tmp_path / "plain")["use_dora"]
    loaded = in_stock_peft(tmp_path / "plain", kind)
    for name, layer in layers(model, "default"):
        delta = layer.get_delta_weight("default").double()
        values = torch.linalg.svdvals(delta)
        lost = float(values[rank:].norm() / values.norm())
        assert exported.errors[name] == pytest.approx(lost, abs=2e-6)
        found = loaded.get_submodule(f"base_model.model.{name}").get_delta_weight("default").double()
        assert float((found - delta).norm() / delta.norm()) == pytest.approx(lost, abs=2e-6)
        assert exported.ranks[name] == min(rank, exported.ranks[name])


def test_a_dora_with_zero_rows_is_refused_because_stock_peft_divides_by_them(tmp_path):
    row = next(row for row in ROWS if row.name == "dora")
    base = build_base("Linear")
    base.wide.weight.data[3] = 0.0
    model = peft.get_peft_model(base, row.config(target_modules=TARGETS))
    with pytest.raises(ConfigError, match="wide: a row of its weight is zero"):
        ranktune.export_lora(model, tmp_path / "plain")
    ranktune.export_lora(model, tmp_path / "svd", svd_rank=2)


@pytest.mark.parametrize("bad", ["a file", "a full folder"])
def test_what_is_there_stays(tmp_path, bad):
    path = tmp_path / "there"
    if bad == "a file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        ranktune.export_lora(adapted(ROWS[0]), path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["there" if bad == "a file" else "mine"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"profile": "unifrom"}, "Did you mean 'uniform'"),
        ({"svd_rank": 0}, "svd_rank=0"),
        ({"svd_rank": True}, "svd_rank=True"),
    ],
)
def test_values_that_cannot_work(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        ranktune.export_lora(adapted(ROWS[0]), tmp_path / "plain", **fields)


def test_an_adapter_of_pefts_own_is_refused(tmp_path):
    model = peft.get_peft_model(build_base("Linear"), peft.LoraConfig(target_modules=TARGETS))
    with pytest.raises(ConfigError, match=r"PEFT's own \(LORA\)"):
        ranktune.export_lora(model, tmp_path / "plain")
    with pytest.raises(ConfigError, match="no adapters"):
        ranktune.export_lora(build_base("Linear"), tmp_path / "plain")


@pytest.mark.parametrize("what", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_a_file_that_says_something_else_is_not_kept(tmp_path, monkeypatch, what):
    """As a bug in the writer, or a disk, would leave it."""
    import ranktune.plain_lora as plain_lora

    def wrong(tensors, path, **options):
        name = next(name for name in tensors if what in name and "narrow" in name)
        save_file({**tensors, name: tensors[name] * 1.001}, path, **options)

    monkeypatch.setattr(plain_lora, "save_file", wrong)
    model = adapted(next(row for row in ROWS if row.name == "dora"))
    with pytest.raises(ExportError, match="narrow: the "):
        ranktune.export_lora(model, tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_not_finite_is_not_exported(tmp_path):
    model = adapted(ROWS[0])
    dict(updates(model))["wide"].lora_A.data[0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"wide: .*NaN"):
        ranktune.export_lora(model, tmp_path / "plain")


def test_bfloat16_factors_lose_nothing(tmp_path):
    """Scale times B is written wider than bfloat16, so that no rounding is added."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        build_base("Linear", torch.bfloat16), ROWS[0].config(target_modules=TARGETS), autocast_adapter_dtype=False
    )
    perturb(model)
    ranktune.export_lora(model, tmp_path / "plain")
    saved = tensors(tmp_path / "plain")
    for name, update in updates(model):
        assert update.lora_B.dtype == torch.bfloat16
        expected = update.lora_B.detach().double() * (6 / 4)
        torch.testing.assert_close(saved[f"base_model.model.{name}.lora_B.weight"].double(), expected, rtol=0, atol=0)


def test_the_model_is_left_as_it_was(tmp_path):
    model = adapted(next(row for row in ROWS if row.name == "increlora-decomposed")).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ranktune.export_lora(model, tmp_path / "plain")
    assert model.training
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
