"""Late components of one tensor against components that really have an optimizer and a schedule of their own."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from ranktune import restart_warmup
from ranktune.growing import GrowingUpdate
from ranktune.optimizer_state import forget_components
from ranktune.restart_warmup import RestartWarmup

IN, OUT, CAPACITY, START, TOTAL, RAMP, LR = 6, 5, 7, 2, 40, 6, 0.03
# Optimizer step (counted from 0) -> what happens between its backward and itself: promoted, newly in reserve.
EVENTS = {0: (0, 2), 8: (2, 2), 16: (1, 0), 24: (0, 0)}
FINAL = 24


def update_of(reserve_learns=True):
    update = GrowingUpdate(IN, OUT, CAPACITY, start_rank=START, scale_power=1.0, reserve_learns=reserve_learns,
                           averages=2).double()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.normal_(generator=generator)
        update.gate[START:] = 0.0
    return update


def gradients(step):
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float64)
    return [draw(CAPACITY, IN), draw(OUT, CAPACITY), draw(CAPACITY)]


def run(update, optimizer, scheduler, ramp=RAMP):
    """Yields after every step: step, the update's rows as they are."""
    warmup = RestartWarmup(optimizer, [update], ramp, TOTAL)
    for step in range(TOTAL):
        grads = gradients(step)
        # Backward sees what was there before this step's event.
        grads[0][update.trained :] = 0.0
        grads[1][:, update.trained :] = 0.0
        grads[2][update.rank_now :] = 0.0
        for parameter, grad in zip(update.parameters(), grads, strict=True):
            parameter.grad = grad
        if step in EVENTS:
            promoted, added = EVENTS[step]
            if promoted:
                update.promote(promoted, step, keep_output=False)
            if step == FINAL:
                forget_components(optimizer, update, update.dissolve_reserve())
            update.stock(added, step, 1e-5)
        warmup.remember(step, final=step >= FINAL)
        optimizer.step()
        warmup.correct(step)
        scheduler.step()
        yield step


def own_share(age, birth, linear, group_share):
    """The row's learning rate as a share of the initial one, from the reference's formula."""
    s = age - 1
    if not linear:
        return min(s / RAMP, 1.0) * group_share
    remained = TOTAL - (birth + 1)
    return s / RAMP if s < RAMP else max(0.0, (remained - s) / (remained - RAMP))


SCHEDULES = {
    "linear": lambda o: get_linear_schedule_with_warmup(o, 5, TOTAL),
    "linear-without-warmup": lambda o: get_linear_schedule_with_warmup(o, 0, TOTAL),
    "constant": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda _: 1.0),
    "halved": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.5 ** (t // 9)),
    "cosine": lambda o: get_cosine_schedule_with_warmup(o, 0, TOTAL),
}


@pytest.mark.parametrize("reserve_learns", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("kind", "decay"), [("AdamW", 0.1), ("SGD", 0.1), ("AdamW", 0.0), ("SGD", 0.0)])
def test_every_late_row_moves_as_in_an_optimizer_group_of_its_own(kind, decay, schedule, reserve_learns):
    options = {"weight_decay": decay} | ({"betas": (0.8, 0.95)} if kind == "AdamW" else {"momentum": 0.9})
    make = getattr(torch.optim, kind)
    update = update_of(reserve_learns)
    start = [parameter.detach().clone() for parameter in update.parameters()]
    optimizer = make(update.parameters(), lr=LR, **options)
    scheduler = SCHEDULES[schedule](optimizer)
    linear = schedule.startswith("linear")

    alone: dict[tuple[int, int], tuple] = {}  # (parameter, row) -> parameter of its own, optimizer, birth
    rows = [p.movedim(d, 0) for p, d in zip(start, (0, 1, 0), strict=True)]
    for step in run(update, optimizer, scheduler):
        share = scheduler.lr_lambdas[0](step)
        gone = {key for key in alone if key[0] < 2 and step >= FINAL and key[1] >= update.rank_now}
        for (which, row), (own, own_optimizer, birth) in alone.items():
            grad = gradients(step)[which].movedim((0, 1, 0)[which], 0)[row]
            own.grad = grad.clone()
            age = step - birth
            own_optimizer.param_groups[0]["lr"] = LR * own_share(age, birth, linear, share)
            if (which, row) not in gone:
                own_optimizer.step()
        for which, births in enumerate((*[update.births()[0]] * 2, update.births()[1])):
            for offset, birth in enumerate(births):
                key = (which, START + offset)
                if key not in alone:
                    assert birth == step
                    value = rows[which][START + offset].clone()
                    if which == 2:
                        value.fill_(1e-5)
                    own = torch.nn.Parameter(value)
                    alone[key] = (own, make([own], lr=LR, **options), birth)
        for (which, row), (own, _, _) in alone.items():
            if (which, row) in gone:
                continue
            now = list(update.parameters())[which].detach().movedim((0, 1, 0)[which], 0)[row]
            torch.testing.assert_close(now, own.detach(), rtol=2e-14, atol=2e-15, msg=f"{step} {which} {row}")
        inert = [p.detach().movedim(d, 0)[update.window :] for p, d in zip(update.parameters(), (0, 1, 0), strict=True)]
        for which in range(2):
            if step < FINAL:
                assert torch.equal(inert[which], rows[which][update.window :])
        assert (update.gate[update.window :] == 0).all()
        reserve = update.gate[update.rank_now : update.window]
        assert torch.equal(reserve.detach(), torch.full_like(reserve, 1e-5))
    assert len(alone) > 8


@pytest.mark.parametrize("in_cache", [1, 30, 1 << 16])
def test_updates_move_together_as_each_would_alone(monkeypatch, in_cache):
    """However many of their components are moved in one go, bit for bit; a weight decay that comes later is seen."""
    monkeypatch.setattr(restart_warmup, "_IN_CACHE", in_cache)

    def moved(together):
        chosen = [update_of(learns) for learns in (True, False, True)]
        groups = [chosen] if together else [[update] for update in chosen]
        optimizers = [torch.optim.AdamW([p for u in g for p in u.parameters()], LR, weight_decay=0.0) for g in groups]
        warmups = [RestartWarmup(o, group, RAMP, TOTAL) for o, group in zip(optimizers, groups, strict=True)]
        for step in range(20):
            for which, update in enumerate(chosen):
                grads = gradients(7 * step + which)
                grads[0][update.trained :] = 0.0
                grads[1][:, update.trained :] = 0.0
                grads[2][update.rank_now :] = 0.0
                for parameter, grad in zip(update.parameters(), grads, strict=True):
                    parameter.grad = grad
                if step == 2 + which:
                    update.stock(3, step, 1e-5)
                if step == 9 + which:
                    update.promote(2, step, keep_output=False)
            for optimizer, warmup in zip(optimizers, warmups, strict=True):
                optimizer.param_groups[0]["weight_decay"] = 0.0 if step < 5 else 0.5
                warmup.remember(step, final=False)
                optimizer.step()
                warmup.correct(step)
        return chosen

    start = update_of()
    for one, other in zip(moved(together=True), moved(together=False), strict=True):
        for a, b, before in zip(one.parameters(), other.parameters(), start.parameters(), strict=True):
            assert torch.equal(a, b)
            assert not torch.equal(a, before)
        assert (one.rank_now, one.window) == (START + 2, START + 3)
        assert (one.gate[one.rank_now : one.window] == 1e-5).all()
        assert torch.equal(one.lora_A[one.window :], start.lora_A[one.window :])
        assert torch.equal(one.lora_B[:, one.window :], start.lora_B[:, one.window :])


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_rows_of_the_start_are_untouched_bit_for_bit(kind):
    results = []
    for corrected in (True, False):
        update = update_of()
        options = {"momentum": 0.9} if kind == "SGD" else {}
        optimizer = getattr(torch.optim, kind)(update.parameters(), lr=LR, weight_decay=0.1, **options)
        scheduler = SCHEDULES["linear"](optimizer)
        if corrected:
            list(run(update, optimizer, scheduler))
        else:
            for step in range(TOTAL):
                for parameter, grad in zip(update.parameters(), gradients(step), strict=True):
                    parameter.grad = grad
                optimizer.step()
                scheduler.step()
        results.append((update.lora_A[:START], update.lora_B[:, :START], update.gate[:START]))
    assert all(map(torch.equal, *results))


def test_without_a_ramp_a_late_row_follows_the_group_with_moments_of_its_own():
    update = update_of()
    optimizer = torch.optim.AdamW(update.parameters(), lr=LR, weight_decay=0.1)
    scheduler = SCHEDULES["linear"](optimizer)
    row = START  # in reserve from step 0
    own = torch.nn.Parameter(update.lora_A.detach()[row].clone())
    own_optimizer = torch.optim.AdamW([own], lr=LR, weight_decay=0.1)
    for step in run(update, optimizer, scheduler, ramp=0):
        if step >= 1:
            own.grad = gradients(step)[0][row]
            own_optimizer.param_groups[0]["lr"] = LR * scheduler.lr_lambdas[0](step)
            own_optimizer.step()
        torch.testing.assert_close(update.lora_A.detach()[row], own.detach(), rtol=1e-14, atol=1e-15)


def test_the_error_of_one_step_is_rounding():
    """The figure of the design: 6e-16 of the row."""
    worst = 0.0
    for birth in range(1, 30):
        update = update_of()
        optimizer = torch.optim.AdamW(update.parameters(), lr=LR, weight_decay=0.1)
        warmup = RestartWarmup(optimizer, [update], 0, TOTAL)
        own = torch.nn.Parameter(update.lora_A.detach()[START].clone())
        own_optimizer = torch.optim.AdamW([own], lr=LR, weight_decay=0.1)
        for step in range(birth + 1):
            A, B, gate = gradients(step)
            A[update.trained :], B[:, update.trained :], gate[update.rank_now :] = 0.0, 0.0, 0.0
            if step == birth:
                own.grad = A[START].clone()
                own_optimizer.step()
            update.lora_A.grad, update.lora_B.grad, update.gate.grad = A, B, gate
            if step == birth - 1:
                update.stock(1, step, 1e-5)
            warmup.remember(step, final=False)
            optimizer.step()
            warmup.correct(step)
        error = (update.lora_A[START] - own).detach().abs().max() / own.detach().abs().max()
        worst = max(worst, float(error))
    assert worst < 6e-16


def test_amsgrad_warns_and_keeps_the_ramp():
    update = update_of()
    with pytest.warns(UserWarning, match="AMSGrad only its learning-rate ramp is kept"):
        warmup = RestartWarmup(torch.optim.AdamW(update.parameters(), lr=LR, amsgrad=True), [update], RAMP, TOTAL)
    optimizer = warmup.optimizer
    update.stock(1, 0, 1e-5)
    for step in range(1, RAMP + 4):
        for parameter, grad in zip(update.parameters(), gradients(step), strict=True):
            parameter.grad = grad
        before = update.lora_A.detach()[START].clone()
        warmup.remember(step, final=False)
        optimizer.step()
        taken = update.lora_A.detach()[START] - before * (1.0 - LR * 0.01)
        warmup.correct(step)
        rho = min((step - 1) / RAMP, 1.0)
        torch.testing.assert_close(update.lora_A.detach()[START], before * (1.0 - rho * LR * 0.01) + rho * taken)


def test_eight_bit_moments_take_the_limit_of_the_gain(monkeypatch):
    """Where eps does not count, c is a scalar: compare with AdamW's exact gain at a tiny eps."""
    results = []
    for hidden in (False, True):
        update = update_of()
        optimizer = torch.optim.AdamW(update.parameters(), lr=LR, eps=1e-300)
        if hidden:
            monkeypatch.setattr(RestartWarmup, "correct", _correct_without_seconds)
        list(run(update, optimizer, SCHEDULES["linear"](optimizer)))
        results.append([p.detach() for p in update.parameters()])
    for exact, limit in zip(*results, strict=True):
        torch.testing.assert_close(limit, exact, rtol=1e-12, atol=1e-14)


_correct = RestartWarmup.correct


def _correct_without_seconds(self, step):
    hidden = {p: state.pop("exp_avg_sq") for p, state in self.optimizer.state.items()}
    _correct(self, step)
    for parameter, second in hidden.items():
        self.optimizer.state[parameter]["exp_avg_sq"] = second


def test_the_learning_rate_ends_at_zero_and_starts_at_zero():
    assert own_share(1, 0, True, 0.1) == 0.0
    assert math.isclose(own_share(TOTAL - 1 - 8, 8, True, 0.1), 1 / (TOTAL - 9 - RAMP))
