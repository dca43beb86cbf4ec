"""Products by oneDNN against the plain formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llm.model.linear import FEW_ROWS, ONEDNN, Linear, linear, matrix_products, product

SIZES = [(1, 48), (5, 48), (90, 48), (2, 3, 48), (1, 1, 48), (4, 1, 7, 48), (48,), (0, 48)]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def with_gradients(x: Tensor, weight: Tensor, bias: Tensor | None, by_hand: bool) -> list[Tensor]:
    """The product and its gradients, by hand in float64."""
    inputs = [t.detach().double() if by_hand else t.detach() for t in (x, weight, bias) if t is not None]
    inputs = [t.requires_grad_() for t in inputs]
    if by_hand:
        y = (inputs[0][..., None, :] * inputs[1]).sum(-1)
        y = y if bias is None else y + inputs[2]
    else:
        y = linear(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype))]


@pytest.fixture(params=[False, True], ids=["fast BLAS", "slow BLAS"])
def slow_blas(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Let a BLAS be taken for a fast or a slow one; it is slow on processors with AVX-512 only."""
    if request.param and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("oneDNN takes this place on processors with AVX-512")
    monkeypatch.setattr("llm.model.linear._is_blas_slow", lambda: request.param)
    return bool(request.param)


@pytest.mark.usefixtures("slow_blas")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_product_and_gradients_equal_the_plain_formula(size: tuple[int, ...], has_bias: bool) -> None:
    x, weight, bias = random(*size), random(31, 48), random(31) if has_bias else None
    found, expected = with_gradients(x, weight, bias, False), with_gradients(x, weight, bias, True)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), plain, atol=3e-5, rtol=1e-5)
    with torch.no_grad():
        for without_gradients in (linear(x, weight, bias), product(x, weight, bias)):
            torch.testing.assert_close(without_gradients.double(), expected[0], atol=3e-5, rtol=1e-5)


@pytest.mark.usefixtures("slow_blas")
@pytest.mark.parametrize("shape", [(300, 40, 50), (2000, 130, 20)])
def test_gradients_of_weights_of_every_form_equal_the_plain_formula(shape: tuple[int, int, int]) -> None:
    n, n_in, n_out = shape
    x, weight = random(n, n_in), random(n_out, n_in)
    found, expected = with_gradients(x, weight, None, False), with_gradients(x, weight, None, True)
    torch.testing.assert_close(found[2].double(), expected[2], atol=2e-3, rtol=1e-5)
    swapped = with_gradients(random(n, n_out), random(n_in, n_out), None, False)
    plain = with_gradients(random(n, n_out), random(n_in, n_out), None, True)
    torch.testing.assert_close(swapped[2].double(), plain[2], atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 260, 270, 280), (2, 5, 6, 7)])
def test_matrix_products_are_the_plain_ones(shape: tuple[int, int, int, int], slow_blas: bool) -> None:
    n, rows, inner, columns = shape
    a, b = random(n, rows, inner), random(n, inner, columns)
    with torch.profiler.profile() as profile:
        found = matrix_products(a, b)
    torch.testing.assert_close(found.double(), a.double() @ b.double(), atol=3e-4, rtol=1e-5)
    calls = sum(event.name == "mkldnn::_linear_pointwise" for event in profile.events())
    assert calls == (n if slow_blas and ONEDNN and rows > 256 else 0)
    assert torch.equal(matrix_products(a.double(), b.double()), a.double() @ b.double())


@pytest.mark.skipif(not ONEDNN, reason="this PyTorch has no oneDNN")
def test_onednn_computes_few_rows_and_trainings_in_fp32_only() -> None:
    """Otherwise the other tests could pass without it."""
    with torch.profiler.profile() as profile:
        linear(random(2, 48), random(31, 48))
        linear(random(2, 48).requires_grad_(), random(31, 48)).sum().backward()
    assert sum(event.name == "mkldnn::_linear_pointwise" for event in profile.events()) == 3
    with torch.profiler.profile() as profile:
        linear(random(FEW_ROWS + 1, 48), random(31, 48))
        linear(random(2, 48).double(), random(31, 48).double())
        linear(random(2, 48).bfloat16(), random(31, 48).bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(random(2, 48), random(31, 48)).dtype == torch.bfloat16
    assert not [event for event in profile.events() if event.name == "mkldnn::_linear_pointwise"]


def test_strided_inputs_give_the_plain_formula() -> None:
    x, weight = random(6, 5, 96)[:, -1, ::2], random(62, 96)[::2, ::2]
    torch.testing.assert_close(linear(x, weight), x @ weight.T, atol=3e-5, rtol=1e-5)
    turned = random(48, 31).T
    torch.testing.assert_close(linear(x, turned), x @ turned.T, atol=3e-5, rtol=1e-5)
    assert linear(random(1, 48).expand(4, 48), weight).unique(dim=0).shape == (1, 31)


@pytest.mark.usefixtures("slow_blas")
def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    x, weight, bias = random(300, 48), random(70, 48), random(70)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(with_gradients(x, weight, bias, False))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_only_required_gradients_are_computed() -> None:
    layer = Linear(48, 31).requires_grad_(False)
    x = random(3, 48).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 48), atol=1e-5, rtol=1e-5)
    assert layer.weight.grad is None


def test_initial_weights_equal_those_of_nn_linear() -> None:
    torch.manual_seed(3)
    ours = Linear(48, 31)
    torch.manual_seed(3)
    theirs = nn.Linear(48, 31)
    assert {name: tensor.tolist() for name, tensor in ours.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in theirs.state_dict().items()
    }
