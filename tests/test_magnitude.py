"""Factored row norms against a dense float64 computation, on easy rows and on those where the expansion cancels."""

from __future__ import annotations

import pytest
import torch

from ranktune.magnitude import gain_offset, has_small_gain, row_norms, weight_norms


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(weight, A, B, scale) -> torch.Tensor:
    return (weight.double() + scale * (B.double() @ A.double())).norm(dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("out", "inputs", "r"), [(96, 64, 4), (64, 96, 16), (2500, 40, 8)])
@pytest.mark.parametrize("scale", [0.02, 1.0, 16.0])
def test_equals_the_dense_norm(dtype, out, inputs, r, scale):
    weight, A, B = draw(out, inputs, seed=0, dtype=dtype), draw(r, inputs, seed=1), draw(out, r, seed=2)
    norms = row_norms(weight, weight_norms(weight), A, B, scale)
    assert norms.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(norms.double(), dense(weight, A, B, scale), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_rows_that_the_update_cancels_are_computed_densely(scale):
    """W_j + s (B A)_j near zero: the expansion loses every digit, the guard recovers them."""
    A, B = draw(4, 50, seed=1), draw(30, 4, seed=2)
    weight = -scale * (B @ A)
    weight += 1e-4 * draw(30, 50, seed=3)
    expected = dense(weight, A, B, scale)
    guarded = row_norms(weight, weight_norms(weight), A, B, scale)
    torch.testing.assert_close(guarded.double(), expected, rtol=1e-3, atol=0)
    unguarded = row_norms(weight, weight_norms(weight), A, B, scale, guard=False)
    assert ((unguarded.double() - expected).abs() / expected).max() > 1e-2


def test_zero_rows_get_the_floor_and_a_finite_gain():
    weight = draw(20, 30, seed=0)
    weight[3] = 0.0
    A, B = draw(4, 30, seed=1), torch.zeros(20, 4)
    constants = weight_norms(weight)
    norms = row_norms(weight, constants, A, B, 1.0)
    assert norms[3] == constants.floor
    assert 0 < norms[3] <= 1e-6 * weight.norm(dim=1).mean() * 1.001
    assert torch.equal(gain_offset(norms.clone(), norms), torch.zeros(20))


def test_an_all_zero_weight_still_has_a_floor():
    assert weight_norms(torch.zeros(4, 5)).floor == pytest.approx(1e-12)


def test_exact_gradient_equals_the_dense_one():
    weight, A, B = (draw(*shape, seed=seed).double() for shape, seed in (((12, 9), 0), ((3, 9), 1), ((12, 3), 2)))
    A.requires_grad_()
    B.requires_grad_()
    coefficients = draw(12, seed=4).double()
    ours = torch.autograd.grad((row_norms(weight, weight_norms(weight), A, B, 0.6) * coefficients).sum(), (A, B))
    theirs = torch.autograd.grad(((weight + 0.6 * B @ A).norm(dim=1) * coefficients).sum(), (A, B))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_exact_gradient_of_a_zero_row_is_finite():
    weight = draw(6, 9, seed=0)
    weight[2] = 0.0
    A, B = draw(3, 9, seed=1).requires_grad_(), torch.zeros(6, 3, requires_grad=True)
    row_norms(weight, weight_norms(weight), A, B, 1.0).sum().backward()
    assert torch.isfinite(B.grad).all()
    assert torch.isfinite(A.grad).all()


def test_no_dense_temporary_is_allocated():
    """The largest tensor made is [out, r] or [chunk, in]: never [out, in] beside a low-precision weight."""
    out, inputs, r = 6000, 512, 4
    weight, A, B = draw(out, inputs, seed=0, dtype=torch.bfloat16), draw(r, inputs, seed=1), draw(out, r, seed=2)
    constants = weight_norms(weight)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() != weight.untyped_storage().data_ptr():
                        largest = max(largest, storage.nbytes())
            return result

    with Largest():
        row_norms(weight, constants, A, B, 1.0)
    assert 0 < largest <= 4 * 1024 * inputs


def test_small_gain_is_noticed():
    assert has_small_gain(torch.tensor([0.5, -1.0]))
    assert has_small_gain(torch.tensor([-0.9995]))
    assert not has_small_gain(torch.tensor([0.5, -0.99, -2.0]))


def test_exact_gradient_of_cancelled_rows_equals_the_dense_one():
    """The guard's dense rows carry gradients too, beside rows that need no guard."""
    A, B = draw(4, 50, seed=1), draw(30, 4, seed=2)
    weight = -0.3 * (B @ A) + 1e-3 * draw(30, 50, seed=3)
    weight[::2] = draw(15, 50, seed=4)
    A.requires_grad_()
    B.requires_grad_()
    norms = row_norms(weight, weight_norms(weight), A, B, 0.3)
    torch.testing.assert_close(norms.detach().double(), dense(weight, A.detach(), B.detach(), 0.3), rtol=1e-4, atol=0)
    ours = torch.autograd.grad(norms.sum(), (A, B))
    theirs = torch.autograd.grad(dense(weight, A, B, 0.3).sum(), (A, B))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
