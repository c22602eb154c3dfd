"""`start_from`: training begins where a saved adapter ended, with its ranks, at the outputs that stock PEFT gives."""

from __future__ import annotations

import json
import re
import time

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import ranktune
from ranktune.adapters import layers, updates
from ranktune.errors import AdapterFileError, ConfigError
from ranktune.foreign_start import load_start, read_start, start_fields
from tests.methods import ROWS, TARGETS, build_base, inputs
from tests.test_export import adapted, config_of, tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:adapter .* is being trained without a controller"),
    pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape"),  # PEFT, of AdaLoRA's rank 0
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]

EVEN = {"r": 4, "lora_alpha": 6}
UNEVEN = {"r": 4, "lora_alpha": 5, "rank_pattern": {"wide": 2, "^narrow": 6}, "alpha_pattern": {"nar.*": 3.5}}
STOCK = {
    "lora": EVEN,
    "lora-uneven": UNEVEN,
    "lora-rslora": {**UNEVEN, "use_rslora": True},
    "dora": {**EVEN, "use_dora": True},
    "dora-uneven": {**UNEVEN, "use_dora": True},
    "adalora": {},
    "adalora-allocated": {},
}
RANKS = {
    "lora": {"square": 4, "wide": 4, "narrow": 4},
    "lora-uneven": {"square": 4, "wide": 2, "narrow": 6},
    "lora-rslora": {"square": 4, "wide": 2, "narrow": 6},
    "dora": {"square": 4, "wide": 4, "narrow": 4},
    "dora-uneven": {"square": 4, "wide": 2, "narrow": 6},
    "adalora": {"square": 5, "wide": 5, "narrow": 5},
}
METHODS = {
    "lora": {},
    "dora": {},
    "dylora": {},
    "dynamic-dora": {"r": 3},
    "increlora": {"r": 8},
    "lora-decomposed": {"use_dora": True},
    "dylora-decomposed": {"use_dora": True},
    "dynamic-dora-decomposed": {"r": 3, "use_dora": True},
    "increlora-decomposed": {"r": 8, "use_dora": True},
}


def stock(name, kind="Linear", **fields):
    """A model with an adapter by stock PEFT, every tensor of it away from its start; its head trained too."""
    torch.manual_seed(5)
    if name.startswith("adalora"):
        config = peft.AdaLoraConfig(
            init_r=5, target_r=2, lora_alpha=6, total_step=10, tinit=1, tfinal=2, deltaT=1, target_modules=TARGETS,
            fan_in_fan_out=kind == "Conv1D",
        )  # fmt: skip
    else:
        config = peft.LoraConfig(
            target_modules=TARGETS, modules_to_save=["head"], init_lora_weights=False,
            fan_in_fan_out=kind == "Conv1D", **{**STOCK[name], **fields},
        )  # fmt: skip
    model = peft.get_peft_model(build_base(kind), config)
    if name == "adalora-allocated":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for step in range(10):
            model(inputs(seed=step)).square().sum().backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "magnitude" in key or "modules_to_save" in key:
                parameter.mul_(1.0 + 0.2 * torch.randn_like(parameter))
            elif "lora_" in key and name == "adalora":
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def outputs_in_peft(folder, kind="Linear"):
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(build_base(kind), str(folder)).eval()(inputs())


def started(folder, method, kind="Linear", **fields):
    name = method.removesuffix("-decomposed")
    return ranktune.start_from(build_base(kind), folder, name, **{**METHODS[method], **fields})


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", list(STOCK))
def test_at_step_0_it_is_the_adapter(tmp_path, name, method, kind):
    stock(name, kind).save_pretrained(tmp_path)
    if name.startswith("dora") and method in ("lora", "dylora", "dynamic-dora", "increlora"):
        with pytest.raises(
            ConfigError, match=f"is a DoRA: its magnitudes .* and {method} without use_dora would drop them"
        ):
            started(tmp_path, method, kind)
        return
    if method.startswith("increlora") and ("uneven" in name or name in ("lora-rslora", "adalora-allocated")):
        with pytest.raises(ConfigError, match=r"ranks \d to \d, and increlora starts all of them at one"):
            started(tmp_path, method, kind)
        return
    expected = outputs_in_peft(tmp_path, kind)
    model = started(tmp_path, method, kind).eval()
    with torch.no_grad():
        found = model(inputs())
    assert (expected - build_base(kind)(inputs())).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    ranks = ranktune.ranks(model)
    if name in RANKS:
        largest = max(RANKS[name].values())
        wanted = dict.fromkeys(TARGETS, largest) if method.startswith("dynamic") else RANKS[name]
        assert ranks == wanted
    assert all(update.decomposed == ("decomposed" in method or method == "dora") for _, update in updates(model))


@pytest.mark.parametrize("name", ["lora-uneven", "lora-rslora"])
def test_factors_are_those_of_the_file(tmp_path, name):
    """And so is the scale, on which the size of every later step depends."""
    model = stock(name)
    model.save_pretrained(tmp_path)
    saved = tensors(tmp_path)
    ours = started(tmp_path, "lora")
    for key, layer in layers(ours, "default"):
        update = layer.update_of("default")
        assert torch.equal(update.lora_A, saved[f"base_model.model.{key}.lora_A.weight"])
        torch.testing.assert_close(update.lora_B, saved[f"base_model.model.{key}.lora_B.weight"], rtol=1e-7, atol=0)
        theirs = model.get_submodule(f"base_model.model.{key}")
        assert layer.scaling["default"] == pytest.approx(theirs.scaling["default"], rel=1e-12)
    config = ours.peft_config["default"]
    assert (config.lora_alpha, config.use_rslora) == (5, name == "lora-rslora")


def test_a_nested_adapter_has_its_best_components_first(tmp_path):
    """Cut at any rank it is the best approximation there is, but for the larger scale that dylora gives a cut."""
    model = stock("lora")
    model.save_pretrained(tmp_path)
    ours = started(tmp_path, "dylora")
    for b in (1, 3):
        ranktune.set_rank(ours, b)
        for key, layer in layers(ours, "default"):
            delta = model.get_submodule(f"base_model.model.{key}").get_delta_weight("default").double()
            U, S, Vh = torch.linalg.svd(delta)
            best = U[:, :b] @ torch.diag(S[:b]) @ Vh[:b]
            found = layer.get_delta_weight("default").double() * b / 4
            torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["dynamic-dora", "increlora"])
def test_gated_components_are_singular(tmp_path, method):
    model = stock("lora-uneven" if method == "dynamic-dora" else "lora")
    model.save_pretrained(tmp_path)
    ours = started(tmp_path, method)
    for key, layer in layers(ours, "default"):
        update = layer.update_of("default")
        values = torch.linalg.svdvals(model.get_submodule(f"base_model.model.{key}").get_delta_weight("default"))
        rank = RANKS["lora-uneven" if method == "dynamic-dora" else "lora"][key]
        gate = update.gate.detach() * layer.scaling["default"]
        torch.testing.assert_close(gate[:rank], values[:rank], rtol=1e-5, atol=1e-5)
        assert not gate[rank:].any()
        A, B = update.lora_A.detach()[:rank], update.lora_B.detach()[:, :rank]
        torch.testing.assert_close(A @ A.T, torch.eye(rank), rtol=0, atol=1e-5)
        torch.testing.assert_close(B.T @ B, torch.eye(rank), rtol=0, atol=1e-5)
        if update.capacity > rank:
            assert update.lora_A[rank:].abs().sum() > 0.0  # able to learn


@pytest.mark.parametrize("row", [row for row in ROWS if row.mergeable and "decomposed" not in row.name], ids=str)
def test_adapters_of_ours_and_of_runs(tmp_path, row):
    model = adapted(row, modules_to_save=["head"])
    model.save_pretrained(tmp_path / "out" / "adapter")
    method = "dora" if row.config().use_dora else "lora"
    found = started(tmp_path / "out", method).eval()
    torch.testing.assert_close(found(inputs()), model(inputs()), rtol=1e-6, atol=1e-6)
    assert ranktune.ranks(found) == ranktune.ranks(model)


@pytest.mark.parametrize("method", ["lora", "dora", "dynamic-dora", "increlora", "dylora"])
def test_it_trains_on_from_there(tmp_path, method):
    """The loss falls from where the adapter had it, and what is saved is an adapter of ours."""
    stock("lora").save_pretrained(tmp_path / "theirs")
    model = started(tmp_path / "theirs", method, **({"r": 5} if method == "increlora" else {}))
    optimizer = torch.optim.AdamW(ranktune.parameter_groups(model, lr=3e-3, weight_decay=0.0))
    controller = None
    if model.peft_config["default"].needs_controller:
        controller = ranktune.RankController(model, optimizer, total_steps=60)
    target = outputs_in_peft(tmp_path / "theirs") + 0.2
    losses = []
    for _ in range(60):
        loss = (model(inputs()) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if method != "dylora":  # which starts at a rank that is drawn
        assert losses[0] == pytest.approx(0.04, rel=1e-3)
    assert min(losses[-5:]) < 0.8 * losses[0]
    if method in ("dynamic-dora", "increlora"):
        assert controller.ended
        assert controller.total_rank() == {"dynamic-dora": 9, "increlora": 15}[method]
    model.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build_base("Linear"), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(inputs()), model.eval()(inputs()), rtol=1e-6, atol=1e-6)


def test_a_module_at_rank_0_is_left_alone_or_keeps_its_magnitude(tmp_path):
    row = next(row for row in ROWS if row.name == "dynamic-dora")
    for decomposed in (False, True):
        model = adapted(row, use_dora=decomposed)
        wide = dict(updates(model))["wide"]
        wide.rank_active[:] = False
        wide.gate.data.zero_()
        model.save_pretrained(tmp_path / str(decomposed))
        method = "dora" if decomposed else "lora"
        found = started(tmp_path / str(decomposed), method, init_weights=False).eval()
        assert ("wide" in ranktune.ranks(found)) == decomposed
        torch.testing.assert_close(found(inputs()), model(inputs()), rtol=1e-6, atol=1e-6)


def test_mixtures_are_no_start_and_have_none(tmp_path):
    stock("lora").save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="cannot be where mor starts"):
        ranktune.start_from(build_base("Linear"), tmp_path / "lora", "mor")
    adapted(next(row for row in ROWS if row.name == "mor")).save_pretrained(tmp_path / "mor")
    with pytest.raises(ConfigError, match="depends on the input"):
        ranktune.start_from(build_base("Linear"), tmp_path / "mor", "lora")
    with pytest.raises(ConfigError, match="Did you mean 'dylora'"):
        ranktune.start_from(build_base("Linear"), tmp_path / "lora", "dylor")


@pytest.mark.parametrize(("name", "method"), [(n, m) for n in (*STOCK, "ours-decomposed") for m in METHODS] + [
    (n, "mor") for n in STOCK
])  # fmt: skip
def test_what_a_refusal_recommends_works(tmp_path, name, method):
    """Each of it, for that very folder; and all that works is recommended."""
    if name == "ours-decomposed":
        adapted(next(row for row in ROWS if row.name == "dora")).save_pretrained(tmp_path / "saved")
    else:
        stock(name).save_pretrained(tmp_path / "saved")
    plain = method.removesuffix("-decomposed")
    fields = {"use_dora": True} if method != plain else {}
    try:
        ranktune.start_from(build_base("Linear"), tmp_path / "saved", plain, **fields)
    except ConfigError as error:
        said = str(error)
    else:
        return
    if "What can start there" not in said:
        (r,) = re.findall(r"set r (below|above) (\d+)", said)
        fields["r"] = int(r[1]) + (1 if r[0] == "above" else -1)
        ranktune.start_from(build_base("Linear"), tmp_path / "saved", plain, **fields)
        return
    ways = re.findall(r"([a-z-]+)(?: \(([^)]*)\))?[,.]", said.split("What can start there: ")[1].split(" Or ")[0])
    assert len(ways) >= 3
    for way, needs in ways:
        fields = {"use_dora": True} if "use_dora" in needs else {}
        for direction, bound in re.findall(r"r (below|above) (\d+)", needs):
            fields["r"] = int(bound) + (1 if direction == "above" else -1)
        ranktune.start_from(build_base("Linear"), tmp_path / "saved", way, **fields)
    decomposed = "dora" in name.split("-")[0] or name == "ours-decomposed"
    uneven = "uneven" in name or name in ("lora-rslora", "adalora-allocated")
    known = {"dora", "dylora", "dynamic-dora"} | ({"lora"} if not decomposed else set())
    assert {way for way, _ in ways} == known | (set() if uneven else {"increlora"})
    assert ("ranktune export" in said) == (name == "ours-decomposed")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 8}, "r=8 contradicts init_from=.*: r=4"),
        ({"lora_alpha": 1}, "lora_alpha=1 contradicts .* lora_alpha=6"),
        ({"rank_pattern": {"wide": 1}}, "rank_pattern="),
        ({"target_modules": ["square"]}, "target_modules="),
        ({"exclude_modules": ["square"]}, "exclude_modules=.*Leave exclude_modules out"),
        ({"layers_to_transform": [0]}, "layers_to_transform="),
    ],
)
def test_fields_that_the_adapter_decides(tmp_path, fields, message):
    stock("lora").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        started(tmp_path, "lora", **fields)
    same = {"r": 4, "lora_alpha": 6, "target_modules": [*reversed(TARGETS)], "rank_pattern": {}}
    assert start_fields(read_start(tmp_path), "lora", same)["r"] == 4
    assert started(tmp_path, "lora", lora_dropout=0.5).peft_config["default"].lora_dropout == 0.5


def test_another_base_model(tmp_path):
    """In under a second, and before the model has changed."""
    stock("lora").save_pretrained(tmp_path)
    theirs = {**config_of(tmp_path), "base_model_name_or_path": "org/theirs"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(theirs))
    changed = {
        "wide is not there": ("wode", torch.nn.Linear(12, 20)),
        "wide maps 12 features to 24 there, and the adapter's factors 12 to 20": ("wide", torch.nn.Linear(12, 24)),
    }
    for message, (name, layer) in changed.items():
        base = build_base("Linear")
        del base.wide
        setattr(base, name, layer)
        before = list(base.state_dict())
        began = time.perf_counter()
        with pytest.raises(AdapterFileError) as caught:
            ranktune.start_from(base, tmp_path, "lora")
        assert time.perf_counter() - began < 1.0
        assert "it was trained on 'org/theirs'" in str(caught.value)
        if name == "wide":
            assert message in str(caught.value)
        else:
            assert "1 of its 3 modules are not there, such as wide. Did you mean 'wode'?" in str(caught.value)
        assert list(base.state_dict()) == before
    base = build_base("Linear")
    base.head = torch.nn.Linear(7, 4)
    with pytest.raises(AdapterFileError, match=r"head\.\w+, trained in full beside it, has shape .*, and here \[4"):
        ranktune.start_from(base, tmp_path, "lora")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "pissa"}, "PEFT changes the base model's weights"),
        ({"bias": "all"}, "biases of the base model"),
        ({"modules_to_save": None}, r"holds head\.\w+, trained beside the adapter, and modules_to_save"),
        ({"peft_type": "IA3"}, "only adapters of the LoRA family"),
    ],
)
def test_folders_that_are_no_start(tmp_path, fields, message):
    stock("lora").save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_config.json"
    file.write_text(json.dumps({**config_of(tmp_path / "saved"), **fields}))
    with pytest.raises(AdapterFileError, match=message):
        started(tmp_path / "saved", "lora")
    with pytest.raises(AdapterFileError, match="does not exist"):
        started(tmp_path / "none", "lora")


def test_nothing_but_zeros_is_no_start(tmp_path):
    row = next(row for row in ROWS if row.name == "dynamic-dora")
    model = adapted(row)
    for _, update in updates(model):
        update.rank_active[:] = False
        update.gate.data.zero_()
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="every module has rank 0"):
        started(tmp_path, "lora")


@pytest.mark.parametrize("method", ["lora", "dylora", "dynamic-dora", "increlora"])
def test_what_an_adapter_held_before_does_not_matter(tmp_path, method):
    """Nor which scale it has: components take it up."""
    name = "lora" if method == "increlora" else "lora-uneven"
    stock(name).save_pretrained(tmp_path)
    start = read_start(tmp_path)
    config_class = type(started(tmp_path, method).peft_config["default"])
    fields = {**METHODS[method], **start_fields(start, method, METHODS[method])}
    fields |= {"init_weights": False, "lora_alpha": 1.7, "alpha_pattern": {}}
    model = peft.get_peft_model(build_base("Linear"), config_class(**fields))
    load_start(model, start)
    torch.testing.assert_close(model.eval()(inputs()), outputs_in_peft(tmp_path), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["dylora", "dynamic-dora"])
def test_more_components_than_a_module_can_have_directions(tmp_path, method):
    stock("lora", r=9).save_pretrained(tmp_path)
    model = started(tmp_path, method, init_weights=False).eval()
    assert ranktune.ranks(model)["narrow"] == 9
    torch.testing.assert_close(model(inputs()), outputs_in_peft(tmp_path), rtol=1e-6, atol=1e-6)


def test_no_random_number_is_drawn(tmp_path):
    """So that a run does not depend on whether it was resumed."""
    stock("lora").save_pretrained(tmp_path)
    start = read_start(tmp_path)
    model = started(tmp_path, "dynamic-dora")
    state = torch.get_rng_state()
    load_start(model, start)
    assert torch.equal(torch.get_rng_state(), state)
    other = peft.get_peft_model(build_base("Linear"), ranktune.RankConfig(r=4, target_modules=["square"]))
    with pytest.raises(ConfigError, match="the new adapter are not on the same modules: narrow"):
        load_start(other, start)


def test_half_precision_files_start_float32_adapters(tmp_path):
    stock("lora").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    model = started(tmp_path, "dora")
    assert {parameter.dtype for _, update in updates(model) for parameter in update.parameters()} == {torch.float32}
    torch.testing.assert_close(model.eval()(inputs()), outputs_in_peft(tmp_path), rtol=1e-6, atol=1e-6)
