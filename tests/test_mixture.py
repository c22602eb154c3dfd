"""The mixture of rank experts against its definition, computed expert by expert in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ranktune.mixture import balance_gradient, mixture_delta, mixture_linear, route, stacked_up

IN, OUT, RANK, EXPERTS, SCALE = 7, 5, 3, 4, 0.7
TRAINED = ("x", "A", "B", "expert_A", "expert_B", "router")


def operands(bias: bool = True, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, requires_grad: bool = True) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(requires_grad)

    return {
        "x": draw(2, 4, IN),
        "weight": draw(OUT, IN, requires_grad=False),
        "bias": draw(OUT, requires_grad=False) if bias else None,
        "A": draw(RANK, IN),
        "B": draw(OUT, RANK),
        "expert_A": draw(EXPERTS, RANK),
        "expert_B": draw(EXPERTS, OUT),
        "router": draw(EXPERTS, IN),
    }


def expert_by_expert(x, weight, bias, A, B, expert_A, expert_B, router, dropped=None):
    """``W x + bias + s sum_i G_i diag(b_i) B diag(a_i) A d(x)``, the definition (F2)."""
    y = F.linear(x, weight, bias)
    gates = torch.softmax(F.linear(x, router), -1)
    h = F.linear(x if dropped is None else dropped, A)
    for i in range(expert_A.shape[0]):
        y = y + SCALE * gates[..., i : i + 1] * (expert_B[i] * F.linear(expert_A[i] * h, B))
    return y


def stacked(x, A, B, expert_A, expert_B, router):
    """The update alone with all experts' outputs side by side (F1): [..., N, out]."""
    gates = torch.softmax(F.linear(x, router), -1)
    Z = (F.linear(x, A).unsqueeze(-2) * expert_A) @ B.T
    return SCALE * torch.einsum("...n,...no,no->...o", gates, Z, expert_B)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_output_and_gradients_equal_the_definition(bias, dropout):
    ours, theirs = operands(bias), operands(bias)
    torch.manual_seed(3)
    y, gates = mixture_linear(**ours, scale=SCALE, dropout=dropout)
    torch.manual_seed(3)
    dropped = F.dropout(theirs["x"].reshape(-1, IN), dropout).view_as(theirs["x"])
    expected = expert_by_expert(**theirs, dropped=dropped)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gates, route(theirs["x"], theirs["router"]).view(-1, EXPERTS), rtol=1e-12, atol=1e-12)
    assert not gates.requires_grad

    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for name in TRAINED:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-11, atol=1e-11)
    assert ours["weight"].grad is None


def test_all_three_forms_are_one_function():
    """F1 = F2 = F3, fused and composed."""
    values = operands(bias=False)
    zero = {**values, "weight": torch.zeros(OUT, IN, dtype=torch.float64)}
    update = {name: values[name] for name in ("x", "A", "B", "expert_A", "expert_B", "router")}
    f1, f2 = stacked(**update), expert_by_expert(**zero)
    f3, gates = mixture_linear(**zero, scale=SCALE)
    composed = SCALE * mixture_delta(
        values["x"], gates.view(2, 4, EXPERTS), *(values[name] for name in ("A", "B", "expert_A", "expert_B"))
    )
    for other in (f2, f3, composed):
        torch.testing.assert_close(other, f1, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["x", "adapter"])
def test_what_needs_no_gradient_gets_none(frozen):
    ours, theirs = operands(), operands()
    for values in (ours, theirs):
        for name in ["x"] if frozen == "x" else TRAINED[1:]:
            values[name].requires_grad_(False)
    mixture_linear(**ours, scale=SCALE)[0].square().sum().backward()
    expert_by_expert(**theirs).square().sum().backward()
    for name in TRAINED:
        if theirs[name].grad is None:
            assert ours[name].grad is None
        else:
            torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-11, atol=1e-11)


def test_a_transposed_weight_serves_conv1d():
    values = operands()
    transposed = {**values, "weight": values["weight"].T.contiguous().T}
    assert transposed["weight"].stride() != values["weight"].stride()
    torch.testing.assert_close(
        mixture_linear(**transposed, scale=SCALE)[0], mixture_linear(**values, scale=SCALE)[0], rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_computes_low_and_returns_full_precision_gradients(dropout):
    ours, theirs = operands(True, torch.float32), operands(True, torch.float32)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        y, gates = mixture_linear(**ours, scale=SCALE, dropout=dropout)
    assert y.dtype == torch.bfloat16
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates.sum(1), torch.ones(8), rtol=1e-6, atol=0)
    y.float().square().sum().backward()
    torch.manual_seed(0)
    mask = F.dropout(torch.ones(8, IN, dtype=torch.bfloat16), dropout).float().view(2, 4, IN)
    expert_by_expert(**theirs, dropped=theirs["x"] * mask).square().sum().backward()
    for name in TRAINED:
        assert ours[name].grad.dtype == torch.float32
        torch.testing.assert_close(
            ours[name].grad, theirs[name].grad, rtol=0.05, atol=0.05 * theirs[name].grad.abs().max()
        )


@pytest.mark.parametrize("autocast", [True, False])
def test_the_router_is_not_rounded_to_bfloat16(autocast):
    """Two experts that differ by less than bfloat16 resolves are told apart, by the fused op and by `route`."""
    x = torch.ones(1, 64, dtype=torch.float32 if autocast else torch.bfloat16)
    router = torch.full((2, 64), 1.0)
    router[1] += 1.0 / 1000
    expected = torch.softmax(torch.tensor([64.0, 64.064]), 0)
    values = operands(False, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, gates = mixture_linear(
            x,
            torch.zeros(OUT, 64),
            None,
            torch.zeros(RANK, 64),
            values["B"],
            values["expert_A"][:2],
            values["expert_B"][:2],
            router,
            SCALE,
        )
        composed = route(x, router)
    for found in (gates, composed):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=0)


def test_nothing_is_kept_that_backward_does_not_need():
    """Bytes saved for backward: x, A x and the gates; one byte an element for a mask. No expert's output, no M."""
    values = operands(False, torch.float32)
    tokens = 8

    def saved(**kwargs) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = mixture_linear(**values, scale=SCALE, **kwargs)
        parameters = {values[name].untyped_storage().data_ptr() for name in (*TRAINED[1:], "weight")}
        total = sum(size for pointer, size in kept.items() if pointer not in parameters)
        del output
        return total

    assert saved() == 4 * tokens * (IN + RANK + EXPERTS)
    assert saved(dropout=0.5) == 4 * tokens * (IN + RANK + EXPERTS) + tokens * IN


def test_the_stacked_matrix_lists_experts_in_blocks():
    values = operands()
    M = stacked_up(values["B"], values["expert_A"], values["expert_B"])
    for i in range(EXPERTS):
        block = values["expert_B"][i].diag() @ values["B"] @ values["expert_A"][i].diag()
        torch.testing.assert_close(M[i * RANK : (i + 1) * RANK], block.T, rtol=1e-13, atol=1e-13)


def test_the_balance_gradient_is_that_of_the_switch_loss():
    values = operands()
    x = values["x"].detach().reshape(-1, IN)
    gates = torch.softmax(x @ values["router"].T, 1)
    chosen = torch.stack([(gates.argmax(1) == i).double().mean() for i in range(EXPERTS)])
    (EXPERTS * (chosen * gates.mean(0)).sum()).backward()
    found = balance_gradient(gates.detach(), x)
    torch.testing.assert_close(found, values["router"].grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_the_balance_leaves_do_not_see_the_loss(dropout, factor):
    """Their gradient is the same whatever the loss is multiplied by, and each backward counts as one."""
    values = operands()
    leaves = torch.zeros(EXPERTS, IN, dtype=torch.float64).requires_grad_(), torch.zeros(1).double().requires_grad_()
    for _ in range(2):
        y, gates = mixture_linear(**values, scale=SCALE, dropout=dropout, balance=leaves)
        (factor * y.square().sum()).backward()
    expected = 2 * balance_gradient(gates, values["x"].detach().reshape(-1, IN))
    torch.testing.assert_close(leaves[0].grad, expected, rtol=1e-12, atol=1e-14)
    assert leaves[1].grad == 2


def test_a_second_derivative_is_refused_rather_than_wrong():
    values = operands()
    y, _ = mixture_linear(**values, scale=SCALE)
    (first,) = torch.autograd.grad(y.square().sum(), values["A"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_gates_that_underflow_are_zero():
    """Products with them would be below the smallest normal number, where matrix products are many times slower."""
    x, router = torch.ones(2, 3), torch.tensor([[0.0, 0, 0], [-30.0, -30, -30], [-20.0, -20, -20], [-10.0, -10, -10]])
    exact = torch.softmax(x.double() @ router.double().T, 1)
    assert (exact[0] < 1e-30).tolist() == [False, True, False, False]
    gates = route(x, router)
    assert gates[0, 1] == 0.0
    torch.testing.assert_close(gates[:, [0, 2, 3]].double(), exact[:, [0, 2, 3]], rtol=1e-5, atol=0)
    weight, (A, B) = torch.zeros(5, 3), (torch.ones(2, 3), torch.ones(5, 2))
    _, fused = mixture_linear(x, weight, None, A, B, torch.ones(4, 2), torch.ones(4, 5), router, 1.0)
    assert torch.equal(fused[:, 1], torch.zeros(2))
