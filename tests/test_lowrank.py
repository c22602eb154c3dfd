"""The fused low-rank op against the same formula composed from stock operators in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ranktune import lowrank
from ranktune.lowrank import Components, Span, low_rank_linear

IN, OUT, RANK, SCALE = 7, 5, 3, 0.7


def operands(bias: bool, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, requires_grad: bool = True) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(requires_grad)

    return {
        "x": draw(2, 4, IN),
        "weight": draw(OUT, IN, requires_grad=False),
        "bias": draw(OUT, requires_grad=False) if bias else None,
        "A": draw(RANK, IN),
        "B": draw(OUT, RANK),
        "offset": draw(OUT).detach().mul(0.3).requires_grad_(),
    }


def composed(x, weight, bias, A, B, offset, dropped, drop_base_path):
    """``W x + o W d(x) + (1 + o) s B A d(x) + bias``, the definition."""
    low_rank = SCALE * F.linear(F.linear(dropped, A), B)
    gained = F.linear(dropped if drop_base_path else x, weight)
    return F.linear(x, weight, bias) + low_rank + offset * (gained + low_rank)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("drop_base_path", [True, False], ids=["both-paths", "low-rank-path"])
@pytest.mark.parametrize("decomposed", [True, False], ids=["gain", "no-gain"])
def test_output_and_gradients_equal_the_composed_formula(bias, dropout, drop_base_path, decomposed):
    ours, theirs = operands(bias), operands(bias)
    if not decomposed:
        ours["offset"] = None
    torch.manual_seed(3)
    y = low_rank_linear(
        ours["x"], ours["weight"], ours["bias"], ours["A"], ours["B"], SCALE,
        offset=ours["offset"], dropout=dropout, drop_base_path=drop_base_path,
    )  # fmt: skip
    torch.manual_seed(3)
    dropped = F.dropout(theirs["x"].reshape(-1, IN), dropout).view_as(theirs["x"])
    if not decomposed:
        theirs["offset"] = torch.zeros(OUT, dtype=torch.float64)
    expected = composed(**theirs, dropped=dropped, drop_base_path=drop_base_path)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)

    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for name in ("x", "A", "B", "offset") if decomposed else ("x", "A", "B"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-11, atol=1e-11)
    assert ours["weight"].grad is None


@pytest.mark.parametrize("small_gain", [True, False])
def test_gain_gradient_where_the_gain_is_zero(small_gain):
    """m = 0 makes the output useless for the gain's gradient: the flag says to recompute, and then it is right."""
    ours, theirs = operands(True), operands(True)
    for side in (ours, theirs):
        with torch.no_grad():
            side["offset"][2] = -1.0
    y = low_rank_linear(**ours, scale=SCALE, small_gain=small_gain)
    y.square().sum().backward()
    composed(**theirs, dropped=theirs["x"], drop_base_path=True).square().sum().backward()
    right = torch.allclose(ours["offset"].grad, theirs["offset"].grad, rtol=1e-10)
    assert right == small_gain


def test_gain_gradient_survives_an_output_edited_in_place():
    """Some models add the residual into a layer's output; the saved output is then no longer what it was."""
    ours, theirs = operands(True), operands(True)
    y = low_rank_linear(**ours, scale=SCALE)
    y.add_(1.5)
    (y**3).sum().backward()
    ((composed(**theirs, dropped=theirs["x"], drop_base_path=True) + 1.5) ** 3).sum().backward()
    for name in ("x", "A", "B", "offset"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-11, atol=1e-11)


def test_a_transposed_weight_serves_conv1d():
    ours = operands(True)
    weight = ours.pop("weight")
    stored = weight.T.contiguous()
    torch.testing.assert_close(
        low_rank_linear(**ours, weight=stored.T, scale=SCALE),
        low_rank_linear(**ours, weight=weight, scale=SCALE),
        rtol=1e-13,
        atol=1e-13,
    )


@pytest.mark.parametrize("span", [None, Span(0, RANK), Span(0, 2), Span(1, 2)], ids=str)
@pytest.mark.parametrize("gates_trained", [None, 2])
@pytest.mark.parametrize(("dropout", "decomposed"), [(0.0, False), (0.0, True), (0.4, False), (0.4, True)])
def test_gates_inside_the_node_equal_gated_columns(span, gates_trained, dropout, decomposed):
    ours, theirs = operands(True), operands(True)
    gates = [torch.tensor([0.5, -2.0, 1e-5], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    if not decomposed:
        ours["offset"] = None
    torch.manual_seed(3)
    y = low_rank_linear(
        **ours, scale=SCALE, dropout=dropout, span=span, gate=gates[0], gates_trained=gates_trained,
    )  # fmt: skip
    first, end = span or (0, RANK)
    trained = torch.arange(RANK) >= first
    present = torch.arange(RANK) < end
    A = torch.where((trained & present).unsqueeze(1), theirs["A"], theirs["A"].detach())
    B = torch.where(trained & present, theirs["B"], theirs["B"].detach())
    free = (torch.arange(RANK) < (end if gates_trained is None else gates_trained)) & trained
    gate = torch.where(free, gates[1], gates[1].detach()) * present
    torch.manual_seed(3)
    dropped = F.dropout(theirs["x"].reshape(-1, IN), dropout).view_as(theirs["x"])
    offset = theirs["offset"] if decomposed else torch.zeros(OUT, dtype=torch.float64)
    expected = composed(theirs["x"], theirs["weight"], theirs["bias"], A, B * gate, offset, dropped, True)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for name in ("x", "A", "B", *(["offset"] if decomposed else [])):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gates[0].grad, gates[1].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gates_trained", [None, 1])
def test_stock_operators_get_the_same_components(gates_trained):
    ours = operands(False)
    gates = [torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    A, B = Components(ours["A"], ours["B"], SCALE, gates[0], Span(0, 2), gates_trained).plain()
    (SCALE * ours["x"].detach() @ A.T @ B.T).square().sum().backward()
    theirs = operands(False)
    low_rank_linear(
        theirs["x"].detach(), torch.zeros(OUT, IN, dtype=torch.float64), None, theirs["A"], theirs["B"], SCALE,
        span=Span(0, 2), gate=gates[1], gates_trained=gates_trained,
    ).square().sum().backward()  # fmt: skip
    for name in ("A", "B"):
        assert ours[name].grad.abs().sum() > 0
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gates[0].grad, gates[1].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [0, 1, 512, 1100])
def test_wide_gradients_are_summed_over_slices_of_tokens(tokens):
    generator = torch.Generator().manual_seed(0)
    u, dv = (torch.randn(tokens, width, generator=generator) for width in (3, lowrank._WIDE))
    whole = u.double().T @ dv.double()
    torch.testing.assert_close(lowrank._sum_over_tokens(u, dv).double(), whole, rtol=1e-5, atol=1e-4)
    low = lowrank._sum_over_tokens(u.bfloat16(), dv.bfloat16())
    assert torch.equal(low, u.bfloat16().T @ dv.bfloat16())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_computes_low_and_returns_full_precision_gradients(dropout):
    ours, theirs = operands(True, torch.float32), operands(True, torch.float32)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        y = low_rank_linear(**ours, scale=SCALE, dropout=dropout)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    torch.manual_seed(0)
    mask = F.dropout(torch.ones(8, IN, dtype=torch.bfloat16), dropout).float().view(2, 4, IN)
    composed(**theirs, dropped=theirs["x"] * mask, drop_base_path=True).square().sum().backward()
    for name in ("x", "A", "B", "offset"):
        assert ours[name].grad.dtype == torch.float32
        torch.testing.assert_close(
            ours[name].grad, theirs[name].grad, rtol=0.05, atol=0.05 * theirs[name].grad.abs().max()
        )


def test_a_gain_near_one_is_not_rounded_away_in_bfloat16():
    """bfloat16 cannot tell 1.001 from 1, but the offset can: the output moves where its own spacing lets it."""
    x = torch.eye(64, dtype=torch.bfloat16)
    weight = (torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) + 1.0).bfloat16()
    A, B = torch.zeros(2, 64), torch.zeros(64, 2)
    offset = torch.full((64,), 1.0 / 300)
    y = low_rank_linear(x, weight, None, A, B, 1.0, offset=offset)
    expected = (weight.T.float() * (1 + 1.0 / 300)).bfloat16()
    assert torch.equal(y, expected)
    assert (y != weight.T).float().mean() > 0.2


def test_a_small_offset_reaches_the_input_gradient_in_bfloat16():
    """Through the dropped-out base path flows offset times the gradient, not a difference of rounded ones."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = []
    for offset in (0.0, 1.0 / 300):
        x = torch.ones(16, 64, dtype=torch.bfloat16, requires_grad=True)
        torch.manual_seed(0)
        y = low_rank_linear(
            x, weight, None, torch.zeros(2, 64), torch.zeros(64, 2), 1.0, offset=torch.full((64,), offset), dropout=0.75
        )
        (y.float() * 100).sum().backward()
        gradients.append(x.grad.float())
    moved = gradients[1] - gradients[0]
    torch.manual_seed(0)
    kept = F.dropout(torch.ones(16, 64, dtype=torch.bfloat16), 0.75).float()
    expected = kept * (100 * weight.float().sum(0)) / 300
    assert (moved * expected).sum() / expected.square().sum() == pytest.approx(1.0, abs=0.15)


def test_nothing_is_kept_that_backward_does_not_need():
    """Bytes saved for backward: the input, A x and, with a gain, the output; one byte an element for a mask."""
    ours = operands(False, torch.float32)
    tokens = 8

    def saved(**kwargs) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = low_rank_linear(ours["x"], ours["weight"], None, ours["A"], ours["B"], SCALE, **kwargs)
        parameters = {ours[name].untyped_storage().data_ptr() for name in ("weight", "A", "B", "offset")}
        total = sum(size for pointer, size in kept.items() if pointer not in parameters)
        del output
        return total

    x_and_u = 4 * tokens * (IN + RANK)
    assert saved() == x_and_u
    assert saved(offset=ours["offset"]) == x_and_u + 4 * tokens * OUT
    assert saved(dropout=0.5) == x_and_u + tokens * IN
    assert saved(offset=ours["offset"], dropout=0.5) == x_and_u + tokens * IN + 4 * tokens * OUT


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_the_gain_gradient_sums_every_token(bias):
    """More tokens than one slice of the reduction holds, and not a multiple of it."""
    ours, theirs = operands(bias), operands(bias)
    for side in (ours, theirs):
        side["x"] = torch.randn(150, IN, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    low_rank_linear(**ours, scale=SCALE).square().sum().backward()
    composed(**theirs, dropped=theirs["x"], drop_base_path=True).square().sum().backward()
    torch.testing.assert_close(ours["offset"].grad, theirs["offset"].grad, rtol=1e-11, atol=1e-11)


def test_the_gain_gradient_is_summed_in_float32_under_bfloat16():
    """Sums of so many tokens do not fit bfloat16; with a gradient of one every product is exact."""
    tokens = 301
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(tokens, IN, generator=generator), torch.randn(OUT, IN, generator=generator)
    bias = torch.randn(OUT, generator=generator).bfloat16()
    A, B, offset = torch.zeros(RANK, IN), torch.zeros(OUT, RANK), torch.zeros(OUT, requires_grad=True)
    y = low_rank_linear(x.bfloat16(), weight.bfloat16(), bias, A, B, SCALE, offset=offset)
    y.backward(torch.ones_like(y))
    expected = y.detach().double().sum(0) - tokens * bias.double()
    torch.testing.assert_close(offset.grad.double(), expected, rtol=1e-5, atol=1e-3)


def test_a_gain_near_one_reaches_the_input_gradient_in_bfloat16():
    dy = (torch.rand(64, generator=torch.Generator().manual_seed(1)) + 1.0).bfloat16().diag()
    x = torch.zeros(64, 64, dtype=torch.bfloat16, requires_grad=True)
    weight, A, B = torch.eye(64, dtype=torch.bfloat16), torch.zeros(2, 64), torch.zeros(64, 2)
    low_rank_linear(x, weight, None, A, B, 1.0, offset=torch.full((64,), 1.0 / 300)).backward(dy)
    assert torch.equal(x.grad, (dy.float() * (1 + 1.0 / 300)).bfloat16())
    assert (x.grad != dy).sum() > 10


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_second_derivative_is_refused_rather_than_wrong(dropout):
    ours = operands(True)
    y = low_rank_linear(**ours, scale=SCALE, dropout=dropout)
    (first,) = torch.autograd.grad(y.square().sum(), ours["A"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
