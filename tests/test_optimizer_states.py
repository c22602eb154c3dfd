"""Optimizers with a state of their own kind through rank changes and `compact`: Adafactor, and Adam in 8 bits."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from torch import nn

import ranktune
from ranktune import DynamicDoraConfig, IncreLoraConfig, RankController
from ranktune.optimizer_state import forget_components, keep_components
from ranktune.quantised_state import keep_codes
from tests.methods import TARGETS
from tests.test_dynamic_dora import STEPS, build, train

ADAFACTORS = {
    "transformers": (
        lambda groups: transformers.Adafactor(groups, lr=0.02, relative_step=False, scale_parameter=False),
        ("exp_avg_sq_row", "exp_avg_sq_col"),
    ),
    "torch": (lambda groups: torch.optim.Adafactor(groups, lr=0.02), ("row_var", "col_var")),
}


def by_name(model):
    return dict(ranktune.adapters.updates(model))


@pytest.mark.parametrize("which", ADAFACTORS)
def test_adafactor_prunes_compacts_and_goes_on(which):
    make, (over_rows, over_columns) = ADAFACTORS[which]
    model = build()
    optimizer = make(ranktune.parameter_groups(model, 0.02, 0.0))
    controller = RankController(model, optimizer, STEPS)
    end = controller.policy.schedule.end
    train(model, optimizer, end)
    assert controller.ended
    for update in by_name(model).values():
        pruned = ~update.rank_active
        # Of A the rows are components, of B the columns; the other statistic is shared by all and stays.
        assert not optimizer.state[update.lora_A][over_rows].flatten()[pruned].any()
        assert not optimizer.state[update.lora_B][over_columns].flatten()[pruned].any()
        assert optimizer.state[update.lora_A][over_rows].flatten()[~pruned].all()
        assert optimizer.state[update.lora_A][over_columns].all()
        assert optimizer.state[update.lora_B][over_rows].all()
        gate = {name: value for name, value in optimizer.state[update.gate].items() if isinstance(value, torch.Tensor)}
        moments = [value for value in gate.values() if value.shape == pruned.shape]
        assert len(moments) == 1
        assert not moments[0][pruned].any()
        assert moments[0][~pruned].all()
    train(model, optimizer, 3)
    ranks = controller.ranks()
    assert all(not update.gate[~update.rank_active].any() for update in by_name(model).values())
    controller.close()
    ranktune.compact(model, optimizer)
    train(model, optimizer, 3)
    for name, update in by_name(model).items():
        assert update.capacity == ranks[name]
        assert optimizer.state[update.lora_A][over_rows].numel() == ranks[name]
        assert optimizer.state[update.lora_B][over_columns].numel() == ranks[name]
        assert all(parameter.isfinite().all() for parameter in update.parameters())
    assert sum(ranks.values()) == 12


@pytest.mark.parametrize("which", ADAFACTORS)
def test_adafactor_grows_and_compacts(which):
    torch.manual_seed(0)
    config = IncreLoraConfig(r=4, target_modules=TARGETS, grow_interval=2, top_h=1, grow_by=2, score_window=2)
    model = peft.get_peft_model(build().base_model.unload(), config)
    optimizer = ADAFACTORS[which][0](ranktune.parameter_groups(model, 0.02, 0.0))
    controller = RankController(model, optimizer, 24)
    train(model, optimizer, 24)
    controller.finish()
    assert controller.total_rank() == 12
    ranktune.compact(model, optimizer)
    train(model, optimizer, 2)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


BLOCK = 256


def quantised(numbers, code_map):
    """Codes and scales as bitsandbytes makes them, block by block and the nearest number each, in plain loops."""
    flat, codes, scales = numbers.flatten(), [], []
    for first in range(0, len(flat), BLOCK):
        block = flat[first : first + BLOCK]
        scales.append(block.abs().max())
        codes.append((block[:, None] / scales[-1] - code_map).abs().argmin(1))
    return torch.cat(codes).to(torch.uint8).view(numbers.shape), torch.stack(scales)


def dequantised(state, name="1"):
    codes = state[f"state{name}"]
    numbers = state[f"qmap{name}"][codes.flatten().int()]
    for block, scale in enumerate(state[f"absmax{name}"]):
        numbers[block * BLOCK : (block + 1) * BLOCK] *= scale
    return numbers.view(codes.shape)


def state_of(shape, seed=0):
    code_map = torch.cat([-torch.logspace(0, -6, 127), torch.zeros(1), torch.logspace(-6, 0, 128)])
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    # Rows of very different size: a wrong scale is far off.
    numbers = numbers * torch.logspace(-3, 3, shape[0])[:, None]
    codes, scales = quantised(numbers, code_map)
    return {"state1": codes, "qmap1": code_map, "absmax1": scales}


@pytest.mark.parametrize("shape", [(6, 512), (6, 256)])
def test_components_with_blocks_of_their_own_are_kept_to_the_bit(shape):
    state = state_of(shape)
    before, kept = dequantised(state), torch.tensor([0, 2, 5])
    keep_codes(state, "state1", 0, kept)
    assert state["absmax1"].numel() == 3 * shape[1] // BLOCK
    assert torch.equal(dequantised(state), before[kept])


@pytest.mark.parametrize(("shape", "dim"), [((6, 300), 0), ((300, 6), 1), ((6, 40), 0), ((6, 128), 0), ((512, 6), 1)])
@pytest.mark.parametrize("kept", [[0, 2, 5], [3], [0, 1, 2, 3, 4, 5]])
def test_components_that_share_blocks_are_quantised_again(shape, dim, kept):
    state = state_of(shape)
    before, kept = dequantised(state).index_select(dim, torch.tensor(kept)), torch.tensor(kept)
    keep_codes(state, "state1", dim, kept)
    codes, scales = quantised(before, state["qmap1"])
    assert torch.equal(state["absmax1"], scales)
    assert state["state1"].dtype == torch.uint8
    torch.testing.assert_close(dequantised(state), dequantised({**state, "state1": codes}), rtol=1e-6, atol=0)
    # Half the widest step of this map, relative to the block's largest number.
    flat, found = before.flatten(), dequantised(state).flatten()
    for first in range(0, len(flat), BLOCK):
        part = slice(first, first + BLOCK)
        assert (found[part] - flat[part]).abs().max() <= 0.06 * flat[part].abs().max()


def test_nothing_is_left_where_nothing_is_kept():
    state = state_of((6, 300))
    keep_codes(state, "state1", 0, torch.tensor([], dtype=torch.int64))
    assert state["state1"].shape == (0, 300)
    assert state["absmax1"].numel() == 0


def test_blocks_of_older_versions_are_known():
    state = state_of((6, 2048))
    state["absmax1"] = state["absmax1"].view(6, 8).amax(1)  # blocks of 2,048
    codes = state["state1"].clone()
    keep_codes(state, "state1", 0, torch.tensor([1, 4]))
    assert torch.equal(state["state1"], codes[[1, 4]])
    assert state["absmax1"].numel() == 2


class Wide(nn.Module):
    """Factors large enough that their moments are kept in 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(512, 640), nn.Linear(640, 320)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("name", ["AdamW8bit", "Adam8bit"])
def test_adam_in_8_bits_prunes_compacts_and_goes_on(name):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = DynamicDoraConfig(r=6, init_r=9, target_modules=["first", "second"], prune_interval=2)
    model = peft.get_peft_model(Wide(), config)
    groups = ranktune.parameter_groups(model, 1e-3, 0.0)
    optimizer = getattr(bitsandbytes.optim, name)(groups, lr=1e-3, min_8bit_size=1024)

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            (model(torch.randn(8, 512)) - 1.0).square().mean().backward()
            optimizer.step()

    def moment(parameter, which):
        state = optimizer.state[parameter]
        return dequantised(state, which) if state[f"state{which}"].dtype == torch.uint8 else state[f"state{which}"]

    controller = RankController(model, optimizer, 24)
    steps(11)
    assert not controller.ended
    updates = list(ranktune.adapters.updates(model))
    assert optimizer.state[updates[0][1].lora_A]["state1"].dtype == torch.uint8
    spoilt = updates[0][1]
    before = {which: moment(spoilt.lora_A, which).clone() for which in "12"}
    forget_components(optimizer, spoilt, torch.tensor([4]))
    for which, expected in before.items():
        expected[4] = 0.0
        assert torch.equal(moment(spoilt.lora_A, which), expected)
    steps(13)
    controller.close()
    assert controller.ended
    assert controller.total_rank() == 12
    kept = {id(update): update.rank_active.nonzero().squeeze(1) for _, update in updates}
    expected = {
        (id(update), which): moment(update.lora_A, which)[kept[id(update)]] for _, update in updates for which in "12"
    }
    ranktune.compact(model, optimizer)
    for _, update in updates:
        for which in "12":
            if update.lora_A.shape[1] % BLOCK == 0:  # rows have blocks of their own
                assert torch.equal(moment(update.lora_A, which), expected[id(update), which])
            assert moment(update.lora_B, which).shape == update.lora_B.shape
    steps(3)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_small_moments_of_an_8_bit_optimizer_are_sliced_as_they_are():
    model = build()
    update = by_name(model)["wide"]
    optimizer = torch.optim.AdamW([update.lora_A])
    optimizer.state[update.lora_A] = {"step": 1, "state1": update.lora_A.detach().clone()}
    keep_components(optimizer, update, torch.tensor([1, 3]))
    assert torch.equal(optimizer.state[update.lora_A]["state1"], update.lora_A.detach()[[1, 3]])
