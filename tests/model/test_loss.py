"""The chunked cross entropy against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llm.model import loss
from llm.model.loss import linear_cross_entropy


def problem(n: int = 11, vocab_size: int = 13) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab_size, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randint(vocab_size, (n,), generator=generator)


@pytest.mark.parametrize("multiple", [1, 8], ids=["", "padded"])
@pytest.mark.parametrize("rows", [1, 3, 4, 100])
def test_loss_and_gradients_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, rows: int, multiple: int) -> None:
    hidden, weight, targets = problem()
    monkeypatch.setattr(loss, "CHUNK_LOGITS", {"cpu": rows * (len(weight) + -len(weight) % multiple)})
    monkeypatch.setattr(loss, "MULTIPLE", {"cpu": multiple})
    (7.0 * linear_cross_entropy(hidden, weight, targets)).backward()
    found = hidden.grad, weight.grad
    hidden.grad, weight.grad = None, None
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    (7.0 * expected).backward()
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets).double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, (hidden.grad, weight.grad), rtol=1e-5, atol=1e-6)


def test_the_vocabulary_is_padded_to_a_multiple(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    product = loss.product
    monkeypatch.setattr(loss, "MULTIPLE", {"cpu": 8})
    monkeypatch.setattr(loss, "product", lambda x, weight: shapes.append(tuple(weight.shape)) or product(x, weight))
    linear_cross_entropy(*problem(vocab_size=13))
    assert set(shapes) == {(16, 6), (6, 16)}, "logits, and the gradient of what they were made from"


def test_no_chunk_holds_more_logits_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = problem(n=50)
    monkeypatch.setattr(loss, "CHUNK_LOGITS", {"cpu": 3 * len(weight) + 1})
    shapes = []
    exp_ = torch.Tensor.exp_
    monkeypatch.setattr(torch.Tensor, "exp_", lambda logits: shapes.append(logits.shape) or exp_(logits))
    linear_cross_entropy(hidden, weight, targets)
    assert {shape[0] for shape in shapes} == {3, 2}
    assert sum(shape[0] for shape in shapes) == 50


def test_frozen_inputs_get_no_gradient() -> None:
    hidden, weight, targets = problem()
    linear_cross_entropy(hidden, weight.detach(), targets).backward()
    assert hidden.grad is not None
    hidden.grad = None
    linear_cross_entropy(hidden.detach(), weight, targets).backward()
    assert hidden.grad is None and weight.grad is not None


def test_huge_logits_stay_finite() -> None:
    hidden, weight, targets = problem()
    value = linear_cross_entropy(hidden * 1e4, weight, targets)
    value.backward()
    assert value.isfinite() and hidden.grad is not None and hidden.grad.isfinite().all()


def test_no_positions_give_zero_loss() -> None:
    _, weight, _ = problem()
    value = linear_cross_entropy(torch.empty(0, 6, dtype=torch.float64), weight, torch.empty(0, dtype=torch.long))
    assert value.item() == 0


def test_autocast_multiplies_in_half_precision() -> None:
    hidden, weight, targets = (t.float() if t.is_floating_point() else t for t in problem())
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    exact = linear_cross_entropy(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = linear_cross_entropy(hidden, weight, targets)
    rounded.backward()
    assert rounded.dtype == torch.float32 and weight.grad is not None and weight.grad.dtype == torch.float32
    assert rounded != exact
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)
