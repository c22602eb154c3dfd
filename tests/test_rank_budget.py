"""A rank for each module under a budget of parameters: exact, leading components only, and as good as it claims."""

from __future__ import annotations

import itertools
import json
from typing import Any, cast

import peft
import pytest
import torch
from safetensors.torch import load_file

import ranktune
from ranktune import DyLoraConfig, RankConfig, exporting
from ranktune.adapters import layers, updates
from ranktune.allocation import spend_best
from ranktune.cut_energy import cut_energy
from ranktune.errors import ConfigError, ExportError
from ranktune.evaluation import rebuilt
from ranktune.rank_budget import Choices, _half, choices_under, ranks_by_energy, ranks_by_loss
from ranktune.rank_setting import at_rank
from ranktune.run.display import SilentDisplay
from ranktune.truncation import truncate
from tests.command_line import command
from tests.methods import TARGETS, build_base, inputs, perturb

R = 4


def nested_model(**fields):
    config = DyLoraConfig(**{"r": R, "lora_alpha": 6, "target_modules": TARGETS, **fields})
    model = perturb(peft.get_peft_model(build_base("Linear"), config)).eval()
    with torch.no_grad():
        for number, (_, update) in enumerate(updates(model)):
            # Energies that differ between modules and components.
            sizes = torch.tensor([[1.0, 0.2, 3.0, 0.5], [2.0, 1.0, 0.1, 0.1], [0.3, 0.3, 0.3, 2.0]])[number]
            update.lora_B.mul_(sizes[: update.capacity])
    return model


@torch.no_grad()
def dense_loss(model, ranks, power):
    """``sum ||dW_r - dW_b||^2`` from whole matrices, ``dW_b = 6 / b^p B[:, :b] A[:b]``."""
    total = 0.0
    for name, update in updates(model):
        A, B, b = update.lora_A.double(), update.lora_B.double(), ranks[name]
        total += float((6 / R**power * B @ A - 6 / b**power * B[:, :b] @ A[:b]).square().sum())
    return total


def test_the_energy_that_a_cut_loses():
    """Against whole matrices, each rank with a scale of its own."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(5, 9, generator=generator), torch.randn(7, 5, generator=generator)
    scales = torch.tensor([3.0, 1.5, 1.0, 0.75, 0.6])
    ranks = [s * (B[:, :b].double() @ A[:b].double()) for b, s in enumerate(scales.double(), start=1)]
    expected = torch.stack([(ranks[-1] - cut).square().sum() for cut in ranks])
    found = cut_energy(A, B, scales)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found[-1] == 0.0
    assert cut_energy(A.bfloat16(), B.bfloat16(), scales).dtype == torch.float64


def brute_force(errors, costs, spare):
    """The smallest sum of errors within the budget."""
    places = itertools.product(*(range(len(cost)) for cost in costs))
    least = sum(cost[0] for cost in costs)
    fitting = [p for p in places if sum(c[i] for c, i in zip(costs, p, strict=True)) <= least + spare]
    return min(sum(e[i] for e, i in zip(errors, p, strict=True)) for p in fitting)


def spent(costs, chosen):
    return sum(cost[place] - cost[0] for cost, place in zip(costs, chosen, strict=True))


@pytest.mark.parametrize("spare", range(0, 28, 3))
def test_convex_errors_at_equal_prices_are_spent_on_in_the_best_way(spare):
    errors = [[9.0, 5.0, 2.0, 1.0], [4.0, 3.0, 2.5, 2.25], [20.0, 2.0, 1.0, 0.5]]
    costs = [[3, 6, 9, 12]] * 3
    chosen = spend_best(errors, costs, spare)
    assert sum(e[i] for e, i in zip(errors, chosen, strict=True)) == brute_force(errors, costs, spare)
    assert spent(costs, chosen) == min(spare // 3 * 3, 27)


def test_a_step_that_gains_little_may_lead_to_one_that_gains_much():
    assert spend_best([[10.0, 9.9, 0.0], [3.0, 2.0, 1.0]], [[1, 2, 3], [1, 2, 3]], 2) == [2, 0]
    # Where the long step does not fit, what is left is spent all the same.
    assert spend_best([[10.0, 9.9, 0.0], [3.0, 2.0, 1.0]], [[1, 2, 3], [1, 2, 3]], 1) == [0, 1]
    # Even on steps that seem to harm, the least harmful first; of equal ones the earlier module's.
    assert spend_best([[1.0, 3.0], [1.0, 2.0]], [[1, 2], [1, 2]], 1) == [0, 1]
    assert spend_best([[1.0, 0.0], [1.0, 0.0]], [[1, 2], [1, 2]], 1) == [1, 0]
    # A long step that does not fit does not hide a short one of the same module behind it.
    assert spend_best([[5.0, 4.0, 0.0]], [[1, 2, 5]], 3) == [1]
    assert spend_best([[1.0]], [[7]], 100) == [0]


def test_what_is_spent_is_exact_for_any_errors():
    draw = torch.Generator().manual_seed(1)
    for _ in range(50):
        sizes = torch.randint(1, 6, (4,), generator=draw).tolist()
        errors = [torch.rand(size, generator=draw).tolist() for size in sizes]
        prices = torch.randint(1, 9, (4,), generator=draw).tolist()
        costs = [[price * place for place in range(1, size + 1)] for price, size in zip(prices, sizes, strict=True)]
        spare = int(torch.randint(0, 60, (1,), generator=draw))
        chosen = spend_best(errors, costs, spare)
        left = spare - spent(costs, chosen)
        assert left >= 0
        for cost, place in zip(costs, chosen, strict=True):
            assert place + 1 == len(cost) or cost[place + 1] - cost[place] > left


@pytest.mark.parametrize(
    "fields", [{}, {"ranks": [1, 2, 4]}, {"use_dora": True}, {"rank_pattern": {"wide": 3}}], ids=str
)
def test_a_budget_is_used_up_to_less_than_one_component(fields):
    model = nested_model(**fields)
    prices = {name: u.lora_A.shape[1] + u.lora_B.shape[0] for name, u in updates(model)}
    with at_rank(model, 1):
        least = ranktune.active_parameters(model)
    for budget in range(least, ranktune.active_parameters(model) + 1, 7):
        ranks = ranks_by_energy(model, budget)
        with at_rank(model, ranks):
            left = budget - ranktune.active_parameters(model)
        assert left >= 0
        for name, choices in choices_under(model, budget).ranks.items():
            place = choices.index(ranks[name])
            assert place + 1 == len(choices) or (choices[place + 1] - choices[place]) * prices[name] > left
    assert set(ranktune.ranks(model).values()) <= {R, 3}  # left as it was


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_energy_chooses_what_loses_little(power):
    """Never worse than one rank for all, and mostly the best there is, judged by whole matrices."""
    model = nested_model(use_rslora=power == 0.5)
    prices = {name: u.lora_A.shape[1] + u.lora_B.shape[0] for name, u in updates(model)}
    every = [dict(zip(prices, p, strict=True)) for p in itertools.product(range(1, R + 1), repeat=3)]
    best_found = 0
    for b in range(1, R + 1):
        budget = b * sum(prices.values())
        found = dense_loss(model, ranks_by_energy(model, budget), power)
        assert found <= dense_loss(model, dict.fromkeys(prices, b), power) + 1e-9
        within = [ranks for ranks in every if sum(prices[name] * k for name, k in ranks.items()) <= budget]
        best_found += found <= min(dense_loss(model, ranks, power) for ranks in within) + 1e-9
    assert best_found >= 3


def separable(model, worth):
    """A loss that adds up over modules: ``worth[name] / rank``."""
    calls = []

    def measure():
        calls.append(dict(ranktune.ranks(model)))
        return sum(worth[name] / rank for name, rank in calls[-1].items())

    return measure, calls


def test_exchanges_find_the_best_of_a_loss_that_adds_up():
    """Several rounds from rank 2 everywhere: raised where it pays, lowered where that costs least."""
    model = nested_model()
    worth = {"square": 1.0, "wide": 50.0, "narrow": 4.0}
    measure, calls = separable(model, worth)
    ranks = ranks_by_loss(model, 2 * (24 + 32 + 27), measure, 100)
    assert calls[0] == dict.fromkeys(worth, 2)
    assert {tuple(call.values()) for call in calls[1:7]} == {
        (1, 2, 2), (3, 2, 2), (2, 1, 2), (2, 3, 2), (2, 2, 1), (2, 2, 3)
    }  # fmt: skip
    prices = {"square": 24, "wide": 32, "narrow": 27}
    within = [
        found
        for found in itertools.product(range(1, R + 1), repeat=3)
        if sum(price * b for price, b in zip(prices.values(), found, strict=True)) <= 2 * 83
    ]
    best = min(within, key=lambda found: sum(worth[name] / b for name, b in zip(worth, found, strict=True)))
    assert tuple(ranks.values()) == best == (1, 3, 1)
    assert set(ranktune.ranks(model).values()) == {R}
    # A gain is worth what it costs: 1.0 for 24 parameters, against 1.2 for 32.
    measure, _ = separable(model, {"square": 2.0, "wide": 2.4, "narrow": 0.1})
    assert ranks_by_loss(model, 24 * 2 + 32 + 27, measure, 100) == {"square": 2, "wide": 1, "narrow": 1}


def test_moves_that_only_help_one_by_one_are_halved():
    """Two modules that do the same: each alone is worth raising, both together harm."""
    model = nested_model()
    seen = []

    def measure():
        ranks = ranktune.ranks(model)
        raised = (ranks["square"] > 2) + (ranks["narrow"] > 2)
        seen.append((*ranks.values(), (0.0, -1.0, 0.5)[raised]))
        return seen[-1][-1] - 0.001 * (ranks["wide"] - 1)

    ranks = ranks_by_loss(model, 2 * 83 + 24 + 27, measure, 100)
    assert (ranks["square"] > 2) + (ranks["narrow"] > 2) == 1
    assert any(square > 2 and narrow > 2 for square, _, narrow, _ in seen)  # both were tried first
    seen.clear()
    ranks = ranks_by_loss(model, 2 * 83 + 24 + 27, measure, 8)
    assert len(seen) == 8  # the half would have been the ninth
    assert set(ranks.values()) == {2}


def test_the_better_half_of_the_moves_is_kept():
    """Of the raised modules those that gain most for their price, of the lowered those that lose least."""
    names = ["a", "b", "c", "d"]
    prices = {"a": 10, "b": 20, "c": 10, "d": 20}
    choices = Choices({m: [1, 2, 3] for m in names}, {m: [p, 2 * p, 3 * p] for m, p in prices.items()}, 0)
    places = dict.fromkeys(names, 1)
    moved = {"a": 2, "b": 2, "c": 0, "d": 0}
    after = {"a": 0.8, "b": 0.7, "c": 1.2, "d": 1.3}
    near = {m: {1: 1.0, moved[m]: after[m]} for m in names}
    kept = _half(near, places, moved, choices)
    assert kept == {"a": near["a"], "b": {1: 1.0}, "c": {1: 1.0}, "d": near["d"]}


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_exchanges_are_never_worse_than_one_rank_for_all(sign):
    """On a loss that changes wildly from one choice of ranks to the next."""
    for seed in range(6):
        model = nested_model()
        calls = []

        def measure(model=model, calls=calls, seed=seed):
            ranks = tuple(ranktune.ranks(model).values())
            draw = torch.Generator().manual_seed(seed * 1000 + ranks[0] * 100 + ranks[1] * 10 + ranks[2])
            calls.append((ranks, sign * float(torch.rand(1, generator=draw))))
            return calls[-1][1]

        evaluations = 60 if seed % 2 else 8
        ranks = tuple(ranks_by_loss(model, 2 * 83 + 20, measure, evaluations).values())
        assert len(calls) <= evaluations
        assert calls[0][0] == (2, 2, 2)
        assert dict(calls)[ranks] <= calls[0][1]
        assert sum(price * b for price, b in zip((24, 32, 27), ranks, strict=True)) <= 2 * 83 + 20


@pytest.mark.parametrize("evaluations", [8, 9, 14, 15, 30])
def test_evaluations_are_bounded(evaluations):
    model = nested_model()
    measure, calls = separable(model, {"square": 1.0, "wide": 50.0, "narrow": 4.0})
    ranks = ranks_by_loss(model, 2 * 83 + 2, measure, evaluations)
    assert 8 <= len(calls) <= evaluations
    assert ranks["wide"] == 3
    assert ranks in calls


def test_unequal_capacities_begin_at_their_own():
    model = nested_model(rank_pattern={"wide": 1})
    measure, calls = separable(model, {"square": 1.0, "wide": 1.0, "narrow": 1.0})
    ranks = ranks_by_loss(model, 3 * (24 + 27) + 32, measure, 20)
    assert calls[0] == {"square": 3, "wide": 1, "narrow": 3}
    assert ranks == calls[0]


def test_what_cannot_be_chosen_is_refused():
    model = nested_model()
    with pytest.raises(ConfigError, match=r"a budget of 82 parameters is below the 83 .* at rank 1.* at 4 it has 332"):
        ranks_by_energy(model, 82)
    with pytest.raises(ConfigError, match=r"a budget of True"):
        ranks_by_energy(model, True)
    with pytest.raises(ConfigError, match=r"evaluations=7 is too few: .* 3 modules .* give 8 or more"):
        ranks_by_loss(model, 83, lambda: 0.0, 7)
    plain = peft.get_peft_model(build_base("Linear"), RankConfig(target_modules=TARGETS))
    with pytest.raises(ConfigError, match="of method 'lora'"):
        ranks_by_energy(plain, 1000)


def test_a_rank_for_each_module_can_be_set():
    """What each computes is the leading components at the scale of its own rank; others stay."""
    model = nested_model()
    ranktune.set_rank(model, 3)
    ranktune.set_rank(model, {"wide": 1, "narrow": 2})
    assert ranktune.ranks(model) == {"square": 3, "wide": 1, "narrow": 2}
    base, x = build_base("Linear"), inputs()
    with torch.no_grad():
        for name, layer in layers(model, "default"):
            update, b = layer.update_of("default"), ranktune.ranks(model)[name]
            getattr(base, name).weight += 6 / b * update.lora_B[:, :b] @ update.lora_A[:b]
        torch.testing.assert_close(model(x), base(x), rtol=1e-5, atol=1e-5)
    with at_rank(model, {"square": 4}):
        assert ranktune.ranks(model) == {"square": 4, "wide": 1, "narrow": 2}
    assert ranktune.ranks(model) == {"square": 3, "wide": 1, "narrow": 2}
    with pytest.raises(ConfigError, match=r"no module 'wid'.*Did you mean 'wide'"):
        ranktune.set_rank(model, {"square": 1, "wid": 1})
    for wrong in ({"square": 5}, {"square": 0}, {"square": "2"}, "2", 2.0, None):
        with pytest.raises(ConfigError, match="is not among those"):
            ranktune.set_rank(model, cast(Any, wrong))
    assert ranktune.ranks(model) == {"square": 3, "wide": 1, "narrow": 2}


@pytest.mark.parametrize("by", ["energy", "loss"])
def test_a_budget_on_the_command_line(nested_run, tmp_path, by):
    """The file holds the leading components of each module; the table tells what they are worth beside one rank."""
    out, folder = nested_run / "out", tmp_path / "small"
    budget = json.loads((out / "metrics.json").read_text())["active_params"] // 2 + 30
    done = command("truncate", out, "--budget", budget, "--by", by, "--out", folder, "--evaluations", 40)
    assert done.exit_code == 0, done.output
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    found, total = set(), 0
    for name, A in tensors.items():
        if name.endswith("lora_A.weight"):
            B = tensors[name.replace("lora_A", "lora_B")]
            stem = name.removesuffix("lora_A.weight")
            b = len(A)
            assert torch.equal(A, saved[f"{stem}ranktune_update.lora_A"][:b])
            scale = config["alpha_pattern"].get(stem[17:-1], config["lora_alpha"]) / b
            torch.testing.assert_close(scale * B, 8 / b * saved[f"{stem}ranktune_update.lora_B"][:, :b])
            found.add(b)
            total += A.numel() + B.numel()
    assert len(found) > 1
    assert budget - 32 < total <= budget
    assert f"{total:,} parameters" in done.output
    assert f"at most {budget:,} parameters" in done.output
    assert "rank 2 everywhere" in done.output
    assert "the whole adapter" in done.output
    assert "in a process without ranktune: largest difference" in done.output
    assert ("their score there is optimistic" in done.output) == (by == "loss")


def test_the_table_tells_the_scores_of_what_it_names(nested_run, tmp_path):
    budget = json.loads((nested_run / "out" / "metrics.json").read_text())["active_params"] // 2 + 30
    result = truncate(
        nested_run / "out", SilentDisplay(), budget=budget, by="energy", split="train", out=tmp_path / "small"
    )
    spending = result.spending
    assert spending is not None
    with rebuilt(nested_run / "out", SilentDisplay(), "train") as scorer:
        for ranks, score, parameters in (
            (spending.ranks, spending.score, result.parameters),
            (2, spending.uniform_score, spending.uniform_parameters),
            (R, spending.full_score, spending.full_parameters),
        ):
            with at_rank(scorer.model, ranks):
                assert scorer.scores()[spending.metric] == score
                assert ranktune.active_parameters(scorer.model) == parameters
        assert spending.ranks == ranks_by_energy(scorer.model, budget)
        # The mean over the first examples, and over no others.
        whole, some = scorer.loss(10**9), scorer.loss(16)
        assert whole == pytest.approx(scorer.scores()["loss"], rel=1e-5)
        assert some != whole
    assert (result.rank, spending.split, spending.uniform_rank) == (max(spending.ranks.values()), "train", 2)


def test_what_computes_something_else_in_stock_peft_is_not_kept(nested_run, tmp_path, monkeypatch):
    real = exporting.adapter_agreement

    def wrong(opened, folder):
        ranktune.set_rank(opened.model, R)
        return real(opened, folder)

    monkeypatch.setattr(exporting, "adapter_agreement", wrong)
    with pytest.raises(ExportError, match="in stock PEFT outputs differ by up to"):
        truncate(nested_run / "out", SilentDisplay(), rank=1, out=tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", 10, "--by", "energy"), "a budget of 10 parameters is below the"),
        (("--budget", 100000, "--rank", 2), "give one of --rank"),
        (("--budget", 3000, "--by", "loss", "--evaluations", 2), "evaluations=2 is too few"),
    ],
)
def test_budgets_that_are_refused(nested_run, tmp_path, options, message):
    done = command("truncate", nested_run / "out", *options, "--out", tmp_path / "small")
    assert done.exit_code == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
