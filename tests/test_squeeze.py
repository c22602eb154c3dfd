"""`squeeze`: ranks chosen by energy, errors as dense SVDs tell them, results that stock PEFT computes with."""

from __future__ import annotations

import itertools
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import ranktune
from ranktune import squeezing
from ranktune.adapters import layers, updates
from ranktune.errors import AdapterFileError, ConfigError, ExportError
from ranktune.recompression import difference_norm, product_norm, singular_form
from ranktune.report.squeezing import squeezed_lines
from ranktune.squeezed_run import SqueezedRun
from ranktune.squeezing import chosen_ranks
from tests.methods import ROWS, TARGETS, build_base, inputs
from tests.test_export import adapted, config_of, in_stock_peft, tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:adapter .* is being trained without a controller"),
    # Of what lies in the base model an adapter of ours says nothing; PEFT finds out, and says so.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


def rows(*values):
    return [torch.tensor(row, dtype=torch.float64) for row in values]


@pytest.mark.parametrize(("out", "inner", "r"), [(30, 20, 4), (5, 40, 8), (40, 5, 8), (6, 6, 6)])
def test_the_singular_form_is_that_of_the_dense_matrix(out, inner, r):
    """Also where the factors are wider than the matrix is."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(r, inner, generator=generator).double(), torch.randn(out, r, generator=generator).double()
    form, dense = singular_form(A, B), B @ A
    values = torch.linalg.svdvals(dense)
    torch.testing.assert_close(form.values, values[: len(form.values)])
    for rank in range(len(form.values) + 1):
        a, b = form.factors(rank)
        assert (a.shape[0], b.shape[1]) == (rank, rank)
        lost = float((dense - b @ a).norm() / dense.norm())
        assert form.error(rank) == pytest.approx(lost, abs=1e-7)
        assert lost == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-12)
        assert difference_norm((A, B), (a, b)) == pytest.approx(lost * float(dense.norm()), abs=1e-6)
    assert product_norm(A, B) == pytest.approx(float(dense.norm()))


def test_nothing_of_a_zero_update_is_lost():
    assert singular_form(torch.zeros(2, 3), torch.ones(4, 2)).error(0) == 0.0


def test_no_choice_of_ranks_loses_less():
    """Against every choice there is."""
    generator = torch.Generator().manual_seed(3)
    values = [sorted(torch.rand(4, generator=generator).tolist(), reverse=True) for _ in range(3)]
    squares = [[v * v for v in row] for row in values]
    for total in range(1, 13):
        ranks = chosen_ranks(rows(*values), [2, 3, 4], total_rank=total)
        assert sum(ranks) == total
        best = max(
            sum(sum(row[:k]) for row, k in zip(squares, choice, strict=True))
            for choice in itertools.product(range(5), repeat=3)
            if sum(choice) == total
        )
        assert sum(sum(row[:k]) for row, k in zip(squares, ranks, strict=True)) == pytest.approx(best)


def test_a_budget_in_parameters_is_never_exceeded_and_pays_by_energy():
    costs = [10, 100]
    # The expensive module's first component has 4 times the energy of the cheap one's, for 10 times the price.
    assert chosen_ranks(rows([1.0, 0.9], [2.0, 0.1]), costs, target_params=25) == [2, 0]
    assert chosen_ranks(rows([1.0, 0.9], [2.0, 0.1]), costs, target_params=119) == [2, 0]
    assert chosen_ranks(rows([1.0, 0.9], [2.0, 0.1]), costs, target_params=120) == [2, 1]
    for budget in range(10, 260, 7):
        ranks = chosen_ranks(rows([1.0, 0.9], [2.0, 0.1]), costs, target_params=budget)
        spent = ranks[0] * 10 + ranks[1] * 100
        assert spent <= budget
        left = budget - spent
        assert ranks == [2, 2] or left < min(c for c, r in zip((10, 100), ranks, strict=True) if r < 2)


@pytest.mark.parametrize(
    ("energy", "ranks"),
    [(0.5, [1, 0]), (9 / 14, [1, 0]), (0.65, [1, 1]), (13 / 14, [1, 1]), (0.93, [1, 2]), (1.0, [1, 2])],
)
def test_an_energy_share_takes_the_fewest_components(energy, ranks):
    assert chosen_ranks(rows([3.0, 0.0], [2.0, 1.0]), [1, 1], energy=energy) == ranks


@pytest.mark.parametrize(
    ("budget", "ranks"),
    [
        ({"total_rank": 2}, [1, 1]),
        ({"total_rank": 3}, [2, 1]),
        ({"target_params": 11}, [1, 1]),
        ({"target_params": 21}, [2, 1]),
        ({"energy": 0.5}, [1, 1]),  # 9.01 of 13.02
        ({"energy": 0.7}, [2, 1]),
    ],
)
def test_components_that_are_kept_whatever_they_hold(budget, ranks):
    """They are paid for first, and their energy counts."""
    assert chosen_ranks(rows([3.0, 2.0], [0.1, 0.1]), [10, 1], [1, 1], **budget) == ranks
    assert chosen_ranks(rows([3.0, 2.0], [0.0]), [10, 1], [1, 1], total_rank=2) == [1, 1]


def test_ties_are_broken_by_order_and_rounding_is_nothing():
    assert chosen_ranks(rows([1.0, 1.0], [1.0, 1.0]), [1, 1], total_rank=3) == [1, 2]
    assert chosen_ranks(rows([1.0, 1e-14], [2.0]), [1, 1], total_rank=3) == [1, 1]


def test_rounding_of_a_sum_asks_for_no_further_component():
    for components in (13, 16, 29):
        for count in range(1, components + 1):
            ranks = chosen_ranks(rows([0.3] * 4, [0.3] * (components - 4)), [1, 1], energy=count / components)
            assert sum(ranks) == count


def test_more_than_there_is():
    assert chosen_ranks(rows([1.0, 0.0], [2.0]), [1, 1], total_rank=99) == [1, 1]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "exactly one budget"),
        ({"total_rank": 2, "energy": 0.5}, "exactly one budget"),
        ({"total_rank": 0}, "total_rank=0"),
        ({"target_params": True}, "target_params=True"),
        ({"energy": 1.5}, r"energy=1\.5"),
        ({"energy": 0}, "energy=0"),
        ({"target_params": 4}, r"every module would have rank 0: target_params=4 .* \(5 numbers\)"),
    ],
)
def test_budgets_that_cannot_work(budget, message):
    with pytest.raises(ConfigError, match=message):
        chosen_ranks(rows([1.0]), [5], **budget)
    with pytest.raises(ConfigError, match=r"in each of its 1 modules: .* at least 7 parameters"):
        chosen_ranks(rows([1.0]), [7], [1], target_params=6)
    with pytest.raises(ConfigError, match="every update of this adapter is zero"):
        chosen_ranks(rows([0.0]), [5], total_rank=1)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("row", [row for row in ROWS if row.mergeable and not row.config().use_dora], ids=str)
def test_squeezed_adapters_of_every_method(tmp_path, row, kind):
    model = adapted(row, kind)
    model.save_pretrained(tmp_path / "saved")
    total = ranktune.total_rank(model) - 2
    result = ranktune.squeeze(tmp_path / "saved", tmp_path / "small", total_rank=total)
    assert sum(result.ranks.values()) == total
    assert result.ranks_before == ranktune.ranks(model)
    loaded = in_stock_peft(tmp_path / "small", kind)
    lost = everything = 0.0
    for name, layer in layers(model, "default"):
        delta = layer.get_delta_weight("default").double()
        values = torch.linalg.svdvals(delta)
        rank = result.ranks[name]
        assert result.errors[name] == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-6)
        target = loaded.get_submodule(f"base_model.model.{name}")
        found = target.get_delta_weight("default").double() if hasattr(target, "lora_A") else torch.zeros_like(delta)
        assert float((found - delta).norm()) == pytest.approx(float(values[rank:].norm()), abs=1e-5)
        lost += float(values[rank:].square().sum())
        everything += float(values.square().sum())
    assert result.error == pytest.approx((lost / everything) ** 0.5, abs=1e-6)


@pytest.mark.parametrize("energy", [0.4, 1.0])
def test_a_dora_keeps_its_magnitudes_and_a_component_in_every_module(tmp_path, energy):
    """All of the energy is all of the outputs."""
    row = next(row for row in ROWS if row.name == "dora")
    model = adapted(row)
    with torch.no_grad():
        dict(layers(model, "default"))["wide"].update_of("default").lora_B.mul_(1e-3)
    model.save_pretrained(tmp_path / "saved")
    result = ranktune.squeeze(tmp_path / "saved", tmp_path / "small", energy=energy)
    assert result.decomposed
    assert result.ranks["wide"] == (1 if energy < 1.0 else 4)
    saved = tensors(tmp_path / "small")
    for name, layer in layers(model, "default"):
        m = layer.update_of("default").lora_magnitude_vector.detach()
        assert torch.equal(saved[f"base_model.model.{name}.lora_magnitude_vector"], m)
        assert saved[f"base_model.model.{name}.lora_A.weight"].shape[0] == result.ranks[name]
    loaded = in_stock_peft(tmp_path / "small")
    if energy == 1.0:
        torch.testing.assert_close(loaded(inputs()), model(inputs()), rtol=2e-5, atol=2e-5)
    else:
        assert max(result.ranks.values()) < 4


def test_a_dora_whose_modules_were_all_but_one_pruned(tmp_path):
    """Magnitudes count where no component is left: a component of zeros holds their place."""
    model = adapted(next(row for row in ROWS if row.name == "dynamic-dora"), use_dora=True)
    wide = dict(updates(model))["wide"]
    wide.rank_active[:] = False
    wide.gate.data.zero_()
    model.save_pretrained(tmp_path / "saved")
    result = ranktune.squeeze(tmp_path / "saved", tmp_path / "same", energy=1.0)
    assert (result.ranks["wide"], result.errors["wide"]) == (1, 0.0)
    torch.testing.assert_close(in_stock_peft(tmp_path / "same")(inputs()), model(inputs()), rtol=2e-5, atol=2e-5)
    with pytest.raises(ConfigError, match="must be at least 3 components, and is 2"):
        ranktune.squeeze(tmp_path / "saved", tmp_path / "small", total_rank=2)


@pytest.mark.parametrize("profile", ["compact", "uniform"])
@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_adapters_of_stock_peft(tmp_path, kind, profile):
    torch.manual_seed(0)
    if kind == "lora":
        config = peft.LoraConfig(
            r=6,
            lora_alpha=5,
            target_modules=TARGETS,
            init_lora_weights=False,
            modules_to_save=["head"],
            use_rslora=True,
        )
    else:
        config = peft.AdaLoraConfig(init_r=6, lora_alpha=5, total_step=10, target_modules=TARGETS)
    model = peft.get_peft_model(build_base("Linear"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "saved")
    ranktune.squeeze(tmp_path / "saved", tmp_path / "same", energy=1.0, profile=profile)
    expected = model.eval()(inputs())
    torch.testing.assert_close(in_stock_peft(tmp_path / "same")(inputs()), expected, rtol=1e-3, atol=1e-3)
    result = ranktune.squeeze(tmp_path / "saved", tmp_path / "small", target_params=300, profile=profile)
    assert result.parameters <= 300 < result.parameters_before
    config = config_of(tmp_path / "small")
    assert bool(config["rank_pattern"]) == (profile == "compact")
    assert config["modules_to_save"] == (["head"] if kind == "lora" else None)


def test_a_module_that_is_left_out_is_not_targeted(tmp_path):
    model = adapted(ROWS[0])
    with torch.no_grad():
        dict(layers(model, "default"))["wide"].update_of("default").lora_B.mul_(1e-4)
    model.save_pretrained(tmp_path / "saved")
    result = ranktune.squeeze(tmp_path / "saved", tmp_path / "small", energy=0.99)
    assert result.ranks["wide"] == 0
    assert sorted(config_of(tmp_path / "small")["target_modules"]) == ["narrow", "square"]
    assert not any("wide" in name for name in tensors(tmp_path / "small"))
    in_stock_peft(tmp_path / "small")


def test_what_depends_on_its_input_is_refused(tmp_path):
    adapted(next(row for row in ROWS if row.name == "mor")).save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match="depends on the input"):
        ranktune.squeeze(tmp_path / "saved", tmp_path / "small", energy=0.9)
    assert not (tmp_path / "small").exists()


def test_what_a_stock_adapter_says_beside_its_ranks_is_kept(tmp_path):
    config = peft.LoraConfig(
        r=3,
        target_modules=r".*(square|wide|narrow)",
        exclude_modules=["narrow"],
        init_lora_weights=False,
        modules_to_save=["head"],
        revision="v1",
    )
    model = peft.get_peft_model(build_base("Linear"), config)
    model.save_pretrained(tmp_path / "saved")
    ranktune.squeeze(tmp_path / "saved", tmp_path / "same", total_rank=5)
    kept, before = config_of(tmp_path / "same"), config_of(tmp_path / "saved")
    for field in ("exclude_modules", "target_modules", "modules_to_save", "revision", "auto_mapping", "bias"):
        assert kept[field] == before[field], field
    assert torch.equal(
        tensors(tmp_path / "same")["base_model.model.head.weight"],
        tensors(tmp_path / "saved")["base_model.model.head.weight"],
    )


def test_an_adapter_is_squeezed_from_a_run_and_in_its_own_precision(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    peft.get_peft_model(build_base("Linear"), config).save_pretrained(tmp_path / "out" / "adapter")
    file = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    result = ranktune.squeeze(tmp_path / "out", tmp_path / "small", total_rank=12)
    assert {tensor.dtype for tensor in tensors(tmp_path / "small").values()} == {torch.float64}
    assert result.error == 0.0
    assert result.nbytes_before == file.stat().st_size
    assert result.nbytes == (tmp_path / "small" / "adapter_model.safetensors").stat().st_size


def test_half_precision_factors_become_float32(tmp_path):
    """Singular vectors rounded to bfloat16 would lose more than the truncation does."""
    adapted(ROWS[0]).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    result = ranktune.squeeze(tmp_path / "saved", tmp_path / "same", energy=1.0)
    assert {tensor.dtype for tensor in tensors(tmp_path / "same").values()} == {torch.float32}
    assert result.error < 1e-6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "PEFT changes the base model's weights"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"bias": "all"}, "bias='all': biases of the base model were trained"),
        ({"lora_bias": True}, "not only s B A"),
        ({"target_parameters": ["experts.weight"]}, "not only s B A"),
    ],
)
def test_stock_adapters_that_are_more_than_their_factors(tmp_path, fields, message):
    model = peft.get_peft_model(build_base("Linear"), peft.LoraConfig(target_modules=TARGETS, init_lora_weights=False))
    model.save_pretrained(tmp_path / "saved")
    config = config_of(tmp_path / "saved")
    (tmp_path / "saved" / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(AdapterFileError, match=message):
        ranktune.squeeze(tmp_path / "saved", tmp_path / "small", energy=0.9)
    assert not (tmp_path / "small").exists()


def test_a_start_that_leaves_the_base_alone_is_no_obstacle(tmp_path):
    model = peft.get_peft_model(
        build_base("Linear"), peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="orthogonal")
    )
    model.save_pretrained(tmp_path / "saved")
    ranktune.squeeze(tmp_path / "saved", tmp_path / "same", energy=1.0)
    torch.testing.assert_close(in_stock_peft(tmp_path / "same")(inputs()), model.eval()(inputs()), rtol=1e-4, atol=1e-4)


def test_a_file_that_is_not_what_was_computed_is_not_kept(tmp_path, monkeypatch):
    adapted(ROWS[0]).save_pretrained(tmp_path / "saved")
    real = squeezing.PlainLora.write

    def wrong(self, folder, profile):
        real(self, folder, profile)
        file = folder / "adapter_model.safetensors"
        changed = {name: tensor * (1.001 if "wide" in name else 1.0) for name, tensor in load_file(file).items()}
        save_file(changed, file, {"format": "pt"})

    monkeypatch.setattr(squeezing.PlainLora, "write", wrong)
    with pytest.raises(ExportError, match="wide: what was written differs"):
        ranktune.squeeze(tmp_path / "saved", tmp_path / "small", total_rank=11)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="exists already"):
        ranktune.squeeze(tmp_path / "saved", tmp_path / "full", total_rank=11)


@pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape")  # PEFT, of a module at rank 0
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")
def test_an_allocated_adalora(tmp_path):
    """PEFT drops what its allocator masked when it saves, and writes the masks as a rank pattern."""
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, total_step=10, tinit=1, tfinal=2, deltaT=1, target_modules=TARGETS
    )
    model = peft.get_peft_model(build_base("Linear"), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(10):
        model(inputs(seed=step)).square().sum().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "saved")
    total = sum(sum(mask) for mask in config_of(tmp_path / "saved")["rank_pattern"].values())
    assert 0 < total <= 6
    result = ranktune.squeeze(tmp_path / "saved", tmp_path / "same", energy=1.0)
    assert sum(result.ranks_before.values()) == total
    reloaded = peft.PeftModel.from_pretrained(build_base("Linear"), str(tmp_path / "saved")).eval()
    torch.testing.assert_close(in_stock_peft(tmp_path / "same")(inputs()), reloaded(inputs()), rtol=1e-4, atol=1e-4)
    config = config_of(tmp_path / "saved")
    masks = config["rank_pattern"]
    name = next(key for key, mask in masks.items() if not all(mask))
    masks[name] = [True] * 4
    (tmp_path / "saved" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFileError, match=r"says that 4 components of .* were kept"):
        ranktune.squeeze(tmp_path / "saved", tmp_path / "small", energy=1.0)


@pytest.mark.parametrize("profile", ["compact", "uniform"])
def test_what_the_file_holds_and_what_inspect_counts(tmp_path, profile):
    """Gates go into the factors, magnitudes beside them, and zeros of the uniform profile are told."""
    for name in ("dynamic-dora", "dora", "increlora"):
        model = adapted(next(row for row in ROWS if row.name == name))
        model.save_pretrained(tmp_path / name)
        total = ranktune.total_rank(model) - 1
        result = ranktune.squeeze(tmp_path / name, tmp_path / f"{name}-small", total_rank=total, profile=profile)
        written = tensors(tmp_path / f"{name}-small")
        factors = [tensor for key, tensor in written.items() if "lora_A" in key or "lora_B" in key]
        assert result.stored == sum(tensor.numel() for tensor in factors)
        counted = sum(int((tensor != 0).any(1 if "lora_A" in key else 0).sum()) * tensor.shape["lora_A" in key]
                      for key, tensor in written.items() if "lora_A" in key or "lora_B" in key)  # fmt: skip
        assert result.parameters == counted
        assert (result.stored > result.parameters) == (profile == "uniform")
        magnitudes = sum(tensor.numel() for key, tensor in written.items() if "magnitude" in key)
        assert result.magnitudes == magnitudes == (12 + 20 + 7 if name == "dora" else 0)
        assert result.folded == (0 if name == "dora" else ranktune.total_rank(model))
        in_use = ranktune.inspect(tmp_path / name).adapter_parameters
        assert result.parameters_before + result.folded + result.magnitudes == in_use
        ranktune.compact(model)
        assert in_use == ranktune.active_parameters(model)


@pytest.mark.parametrize(
    ("budget", "whole"),
    [
        ({"total_rank": 12}, True),
        ({"total_rank": 11}, False),
        ({"target_params": 10**6}, True),
        ({"energy": 1.0}, True),
        ({"energy": 0.9}, False),
    ],
)
def test_a_budget_for_everything_is_noticed(tmp_path, budget, whole):
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    peft.get_peft_model(build_base("Linear"), config).save_pretrained(tmp_path / "saved")
    result = ranktune.squeeze(tmp_path / "saved", tmp_path / "small", **budget)
    assert result.whole == whole
    said = next(squeezed_lines(SqueezedRun(result, None, "as you asked"), tmp_path / "small", tmp_path / "saved"))
    assert said.startswith("nothing to squeeze: the budget is no less than this adapter has, total rank 12") == whole


@pytest.mark.parametrize(("dtype", "step"), [("float32", 2**-24), ("bfloat16", 2**-9), ("float16", 2**-12)])
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_factors_in_another_precision_lose_what_is_told(tmp_path, name, dtype, step):
    model = adapted(next(row for row in ROWS if row.name == name))
    model.save_pretrained(tmp_path / "saved")
    whole = ranktune.squeeze(tmp_path / "saved", tmp_path / dtype, energy=1.0, dtype=dtype)
    assert 0.1 * step < whole.error < 4 * step
    small = ranktune.squeeze(tmp_path / "saved", tmp_path / "small", total_rank=9, dtype=dtype)
    saved = tensors(tmp_path / "small")
    lost = everything = 0.0
    for module, layer in layers(model, "default"):
        A, B, scale = layer.update_of("default").plain_factors(layer.scaling["default"])
        delta = (scale * B.double() @ A.double()).detach()
        stem = f"base_model.model.{module}.lora_"
        assert {saved[f"{stem}{part}.weight"].dtype for part in "AB"} == {getattr(torch, dtype)}
        if name == "dora":
            assert saved[f"{stem}magnitude_vector"].dtype == torch.float32
        difference = saved[f"{stem}B.weight"].double() @ saved[f"{stem}A.weight"].double() - delta
        assert small.errors[module] == pytest.approx(
            float(difference.norm() / delta.norm()), rel=1e-4 if step > 1e-6 else 0.3
        )
        lost += float(difference.square().sum())
        everything += float(delta.square().sum())
    assert small.error == pytest.approx((lost / everything) ** 0.5, rel=1e-4 if step > 1e-6 else 0.3)
    assert not small.whole


def test_precisions_that_do_not_work(tmp_path):
    model = adapted(ROWS[0])
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"dtype='bfloat' must be one of .*Did you mean 'bfloat16'"):
        ranktune.squeeze(tmp_path / "saved", tmp_path / "small", energy=0.9, dtype="bfloat")
    with torch.no_grad():
        dict(layers(model, "default"))["wide"].update_of("default").lora_B.fill_(1e11)
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(ConfigError, match="dtype='float16' cannot hold the factors"):
        ranktune.squeeze(tmp_path / "large", tmp_path / "small", energy=0.9, dtype="float16")
    assert not (tmp_path / "small").exists()
