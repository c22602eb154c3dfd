"""`RankController`: the only object that changes ranks while a model trains.

It rides on the optimizer's own step hooks, so the same code serves a raw loop, `transformers.Trainer` and anything
built on accelerate. Before a step it looks at the gradients; before or after it, as the policy wants, it measures, asks
the policy and has carried out what that decides.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ranktune.adapters import updates
from ranktune.attachment import (
    active_adapter,
    adapter_config,
    layout_of,
    plain_optimizer,
    refuse_compacted,
    refuse_unless_optimized,
)
from ranktune.errors import ConfigError
from ranktune.gradients import (
    PATIENCE,
    ControllerError,
    FiniteGradients,
    amp_found_inf,
    loss_scale,
)
from ranktune.history import RankChange, Restart
from ranktune.magnitude import norm_dtype
from ranktune.moves import moves_for
from ranktune.policy import RankState
from ranktune.processes import mean_over_processes
from ranktune.update import LowRankUpdate

logger = logging.getLogger("ranktune")


class RankController:
    """Moves the ranks of one adapter through a run of ``total_steps`` optimizer steps.

    Nothing has to be called: it is attached to the optimizer when made, and `close` detaches it. Gradient accumulation
    does not matter, since it counts optimizer steps; a step that an AMP scaler skips is no step.

    Args:
        model: the PEFT model.
        optimizer: the optimizer that steps the adapter; accelerate's wrapper is unwrapped.
        total_steps: optimizer steps of the whole run, earlier parts of a resumed run included.
        adapter_name: which adapter; the active one by default.
        seed: of what a method draws (the ranks of ``dylora``). The same in every process and when a run is resumed.
        scaler: the ``torch.amp.GradScaler`` of a loop of one's own, if any; accelerate's is found.
        penalty_in_loss: the caller adds `penalty` to the loss, and no gradient is added here. Penalties otherwise act
            after gradient clipping, once per optimizer step.
        restart: True begins the rank schedule anew, from the present ranks and over the steps that remain of
            ``total_steps``; for a run that goes on under another length than it was planned for. When such a run is
            itself resumed, give the `Restart` that this controller's ``restart`` was. Ranks that were final stay final.

    Attributes:
        restart: where the schedule was begun anew, or None.
        history: one `RankChange` per module and change, oldest first.

    Raises:
        ConfigError: the adapter's method does not move ranks, its budget cannot be met in so many steps, or the
            optimizer does not hold every adapter parameter exactly once.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        total_steps: int,
        *,
        adapter_name: str | None = None,
        seed: int = 0,
        scaler: Any = None,
        penalty_in_loss: bool = False,
        restart: Restart | bool = False,
    ) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ConfigError(f"total_steps={total_steps!r} must be a whole number of optimizer steps, at least 1.")
        self.model = model
        self.optimizer = plain_optimizer(optimizer)
        self.total_steps = total_steps
        self.adapter_name = adapter_name or active_adapter(model)
        self.penalty_in_loss = penalty_in_loss
        config = adapter_config(model, self.adapter_name)
        named = list(updates(model, self.adapter_name))
        self._updates = [update for _, update in named]
        self.restart = Restart.here(self._updates) if restart is True else restart or None
        self._began = 0 if self.restart is None else self.restart.step
        if self._began >= total_steps:
            raise ConfigError(
                f"total_steps={total_steps} is the length of the whole run, and {self._began} steps of it are done: "
                "nothing remains to begin a rank schedule in. Train longer."
            )
        self._start_rank = config.start_rank
        self._layout = layout_of(named, None if self.restart is None else self.restart.ranks)
        policy = config.policy(self._layout, total_steps - self._began)
        if policy is None:
            raise ConfigError(
                f"adapter {self.adapter_name!r} is of method {config.method!r}, whose ranks do not move: it needs no "
                "controller."
            )
        self.policy = policy
        refuse_unless_optimized(self.optimizer, named)
        self._refuse_a_second()
        self.history: list[RankChange] = []
        self._scaler = getattr(optimizer, "scaler", None) if scaler is None else scaler
        self._gradients = FiniteGradients(model)
        self._moves = moves_for(policy, self.optimizer, self._updates, total_steps, seed)
        self._skipping = False
        self._bad_scores_in_a_row = 0
        self._loss_scale = 0.0
        self._acted = False
        self._version: tuple[int, int] | None = None
        self._step, self._ended = 0, False
        if not self.ended:
            refuse_compacted(named, config)
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        self._mark(in_charge=True)
        self._want_scores()

    def _refuse_a_second(self) -> None:
        """Two on one optimizer would both count every step, and both act."""
        hooks = self.optimizer._optimizer_step_pre_hooks.values()
        others = [owner for hook in hooks if isinstance(owner := getattr(hook, "__self__", None), RankController)]
        mine = {id(update) for update in self._updates}
        if any(id(update) in mine for other in others for update in other._updates):
            raise ConfigError(
                f"adapter {self.adapter_name!r} has a controller on this optimizer already. Call its close() first, or "
                "use that one."
            )

    @property
    def step(self) -> int:
        """Optimizer steps done, as the adapter's own state has it: a loaded checkpoint moves it."""
        self._follow_loading()
        return self._step

    @property
    def ended(self) -> bool:
        """Whether ranks can no longer change."""
        self._follow_loading()
        return self._ended

    @property
    def scheduled(self) -> bool:
        """Whether ranks move over the run at all, so that its length matters to them."""
        return not self.policy.has_ended(0, self._layout.ranks_from(self._start_rank).tolist())

    @property
    def skipped(self) -> int:
        """Steps that were not taken because a gradient was not finite."""
        return self._gradients.skipped

    def ranks(self) -> dict[str, int]:
        """Module name to its number of active components."""
        return {name: update.rank for name, update in zip(self._layout.modules, self._updates, strict=True)}

    def total_rank(self) -> int:
        """The active components of all modules together."""
        return sum(self.ranks().values())

    def importance(self) -> dict[str, dict[str, list[float]]]:
        """Module name to the scores of its components, active ("kept") and not ("dropped"), highest first.

        A method that scores whole modules has one "kept" score for each, and one that scores nothing has none.
        """
        found = {}
        for name, update in zip(self._layout.modules, self._updates, strict=True):
            if update.rank_average is None:
                continue
            # Module by module: once compacted, they differ in size.
            state = self._state([update])
            scores = self.policy.importance(state)
            kept = state.active if scores.shape == state.active.shape else torch.ones_like(scores, dtype=torch.bool)
            found[name] = {
                "kept": sorted(scores[kept].tolist(), reverse=True),
                "dropped": sorted(scores[~kept].tolist(), reverse=True),
            }
        return found

    def budget(self) -> int:
        """What the active components may cost at this step, in ranks or in parameters."""
        return self.policy.budget(self.step - self._began)

    def budgets(self) -> list[tuple[int, int]]:
        """How `budget` moved up to now: every step at which it changed, as `history` counts them, and its value."""
        # A policy that acts before a step has done so when that many steps, and not one more, are done.
        early = 1 if self.policy.before_step else 0
        changes: list[tuple[int, int]] = []
        for step in range(self._began, self.step + 1):
            value = self.policy.budget(step - self._began)
            if not changes or changes[-1][1] != value:
                changes.append((max(step - early, 0), value))
        return changes

    def drawn(self) -> dict[int, int]:
        """Rank to the number of optimizer steps that trained it, for a method that draws ranks; else empty."""
        return self._moves.drawn(self.step)

    def penalty(self) -> Tensor:
        """The method's regulariser as a scalar, for a loss of one's own (with ``penalty_in_loss=True``)."""
        if not self.policy.penalises(self.step - self._began):
            return torch.zeros((), device=self._updates[0].lora_A.device)
        return self.policy.penalty(self._updates)

    def recall(self, history: Sequence[RankChange], skipped: int = 0) -> None:
        """Take over what an earlier part of a resumed run has recorded, oldest first."""
        self.history = [*history, *self.history]
        self._gradients.skipped += skipped

    def close(self) -> None:
        """Detach from the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._moves.release()
        self._mark(in_charge=False)
        for update in self._updates:
            update.score = None

    def finish(self) -> None:
        """Detach, and make sure that the controller did its work; a run that ended before its schedule is warned of.

        Raises:
            ControllerError: no optimizer step ever reached it.
        """
        self.close()
        if self._acted and self.scheduled and not self.ended:
            logger.warning(
                "the run ended at step %d of total_steps=%d, before the ranks of adapter %r were final: the total rank "
                "is %d. Plan for as many steps as are taken, or go on training.",
                self.step, self.total_steps, self.adapter_name, self.total_rank(),
            )  # fmt: skip
        if not self._acted:
            raise ControllerError(
                f"the controller of adapter {self.adapter_name!r} never saw an optimizer step, so no rank was chosen. "
                "Give RankController the optimizer that is stepped (with accelerate: the prepared one, or the one "
                "inside it), and make it before training starts."
            )

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Look at the gradients: skip the step where one is not finite, else add the regulariser's."""
        self._skipping = amp_found_inf(optimizer) or self._gradients.drop_step(optimizer, self.step + 1)
        if self._skipping:
            self._clear_scores()
            return
        with torch.no_grad():
            if not self.penalty_in_loss and self.policy.penalises(self._step - self._began):
                scale = getattr(optimizer, "grad_scale", None)
                self.policy.add_penalty_gradients(self._updates, 1.0 if scale is None else scale)
            if self.policy.before_step:
                self._consult()
            self._moves.before_step(self._step, self._ended)

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        """Count the step, and let a policy act that looks at the adapter's tensors."""
        if self._skipping:
            return
        self._acted = True
        self._moves.after_step(self._step, self._ended)
        self._advance()
        if not self.policy.before_step:
            self._consult()
        self._want_scores()

    def _consult(self) -> None:
        """Measure, ask the policy, and have carried out what it decides."""
        if self._ended or not self.policy.measures(self._step - self._began):
            return
        state = self._state(self._updates)
        measured = self._measure()
        if measured is not None:
            state = self.policy.observe(state, measured)
            for update, row in zip(self._updates, state.average, strict=True):
                cast(Tensor, update.rank_average).copy_(row)
        chosen = self.policy.decide(state)
        if chosen is not None:
            self._choose(state, chosen.to(state.active.device))

    def _choose(self, state: RankState, chosen: Tensor) -> None:
        """Make the chosen components the active ones; for good when ranks can no longer change."""
        self._record(state, chosen)
        self._ended = self.policy.has_ended(state.step, chosen.sum(1).tolist())
        self._moves.apply(chosen, self._step, self._ended)
        if self._ended:
            self._mark(in_charge=True)

    def _measure(self) -> Tensor | None:
        """What the policy measures, the same in every process; None where it is not finite."""
        measured = self.policy.measure(self._updates)
        if not self.policy.before_step:
            return measured
        self._clear_scores()
        scale = loss_scale(self.optimizer, self._scaler)
        backed_off, self._loss_scale = scale < self._loss_scale, scale
        if backed_off:
            # A step that a scaler skipped, with no hook called, has left its scores among these.
            return None
        (measured,) = mean_over_processes([measured / scale])
        finite = torch.isfinite(measured)
        if finite.all():
            self._bad_scores_in_a_row = 0
            return measured
        module = self._layout.modules[int((~finite).nonzero()[0])]
        self._bad_scores_in_a_row += 1
        logger.warning("step %d: the score of %s is not finite, so no score is counted", self._step + 1, module)
        if self._bad_scores_in_a_row >= PATIENCE:
            raise ControllerError(
                f"{PATIENCE} times in a row a module's score was not finite, first that of {module}. Train in float32 "
                "or bfloat16, or give RankController the loop's scaler."
            )
        return None

    def _want_scores(self) -> None:
        """Have the next backward score the modules, or not."""
        wanted = self.policy.before_step and not self._ended and self.policy.measures(self._step - self._began)
        for update in self._updates:
            if wanted and update.score is None:
                A = update.lora_A
                update.score = torch.zeros(1, dtype=norm_dtype(A.dtype), device=A.device, requires_grad=True)
            elif not wanted:
                update.score = None

    def _clear_scores(self) -> None:
        for update in self._updates:
            if update.score is not None:
                update.score.grad = None

    def _mark(self, in_charge: bool) -> None:
        """Tell the adapter whether somebody moves its ranks, and whether they still will."""
        for update in self._updates:
            update.needs_controller = not in_charge
            update.ranks_will_move = in_charge and not self.ended

    def _record(self, state: RankState, chosen: Tensor) -> None:
        old, new = state.active.sum(1).tolist(), chosen.sum(1).tolist()
        scores = self.policy.importance(state)
        weights = chosen if scores.shape == chosen.shape else torch.ones_like(scores)
        scores = (scores * weights).sum(1).div(weights.sum(1).clamp_min(1)).tolist()
        for module, before, after, score in zip(self._layout.modules, old, new, scores, strict=True):
            if before != after:
                self.history.append(RankChange(self._step, module, before, after, score if after else None))

    def _state(self, updates: Sequence[LowRankUpdate]) -> RankState:
        device = updates[0].lora_A.device
        return RankState(
            self.step - self._began,
            torch.stack([cast(Tensor, update.rank_active).to(device) for update in updates]),
            torch.stack([cast(Tensor, update.rank_average).to(device) for update in updates]),
        )

    def _advance(self) -> None:
        counters = [cast(Tensor, update.rank_step) for update in self._updates]
        for counter in counters:
            counter.fill_(self._step + 1)
        self._step += 1
        self._version = (id(counters[0]), counters[0]._version)

    def _follow_loading(self) -> None:
        """Take step and end from the adapter where somebody else than `_advance` has written them."""
        counter = cast(Tensor, self._updates[0].rank_step)
        version = (id(counter), counter._version)
        if version != self._version:
            self._version = version
            self._step = int(counter)
            ranks = [update.rank for update in self._updates]
            self._ended = self.policy.has_ended(self._step - self._began, ranks)
