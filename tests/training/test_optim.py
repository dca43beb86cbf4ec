"""Learning rates at every corner, who optimizes what, and Muon against its own definition."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.training.freeze import freeze
from llm.training.optim import Muon, make_optimizers, orthogonalize, set_lr
from llm.training.schedule import lr_factor
from tests.helpers import gpt_config, train_params

# ---- schedules -------------------------------------------------------------------------------------------------------


def test_warmup_is_linear_and_ends_at_the_peak() -> None:
    params = train_params(max_steps=100, warmup_steps=4)
    assert [lr_factor(step, params) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_schedules_halfway_and_at_the_end() -> None:
    for schedule, halfway, end in (
        ("cosine", 0.55, 0.1),
        ("linear", 0.55, 0.1),
        ("constant", 1.0, 1.0),
        ("wsd", 1.0, 0.1),
    ):
        params = train_params(max_steps=110, warmup_steps=10, schedule=schedule, min_lr_ratio=0.1)
        assert lr_factor(60, params) == pytest.approx(halfway)
        assert lr_factor(110, params) == pytest.approx(end)
    params = train_params(max_steps=100, warmup_steps=0, schedule="cosine", min_lr_ratio=0.2)
    assert lr_factor(25, params) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


def test_wsd_is_constant_until_its_decay_which_is_linear() -> None:
    params = train_params(max_steps=20, warmup_steps=2, schedule="wsd", decay_steps=5, min_lr_ratio=0.5)
    assert params.stable_steps == 15
    assert [lr_factor(step, params) for step in range(21)] == pytest.approx(
        [0.5] + [1.0] * 15 + [0.9, 0.8, 0.7, 0.6, 0.5]
    )
    longer = params.model_copy(update={"max_steps": 30, "decay_steps": 12})
    assert [lr_factor(step, longer) for step in range(16)] == [lr_factor(step, params) for step in range(16)]


def test_wsd_needs_room_for_its_decay() -> None:
    assert train_params(max_steps=10, warmup_steps=7, schedule="wsd", decay_steps=3).stable_steps == 7
    with pytest.raises(ValueError, match="warmup_steps 8 and decay_steps 3 together exceed max_steps 10"):
        train_params(max_steps=10, warmup_steps=8, schedule="wsd", decay_steps=3)
    train_params(max_steps=10, warmup_steps=8, decay_steps=3)  # another schedule has no decay_steps


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_without_warmup_the_first_step_has_the_peak(schedule: str) -> None:
    for max_steps in (0, 1, 2, 50):
        assert lr_factor(0, train_params(max_steps=max_steps, warmup_steps=0, schedule=schedule)) == 1


@given(
    max_steps=st.integers(0, 60),
    warmup_steps=st.integers(0, 80),
    schedule=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    decay_steps=st.integers(1, 60),
    min_lr_ratio=st.floats(0, 1),
)
def test_every_step_has_a_learning_rate_that_first_rises_and_then_falls(
    max_steps: int, warmup_steps: int, schedule: str, decay_steps: int, min_lr_ratio: float
) -> None:
    assume(schedule != "wsd" or warmup_steps + decay_steps <= max_steps)
    params = train_params(
        max_steps=max_steps,
        warmup_steps=warmup_steps,
        schedule=schedule,
        decay_steps=decay_steps,
        min_lr_ratio=min_lr_ratio,
    )
    factors = [lr_factor(step, params) for step in range(max_steps)]
    peak = min(warmup_steps, max_steps)
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert all(factor >= min_lr_ratio for factor in factors[peak:])
    if warmup_steps < max_steps:
        assert max(factors) == 1 and factors[peak] == 1
        assert lr_factor(max_steps, params) == pytest.approx(1 if schedule == "constant" else min_lr_ratio, abs=1e-9)


# ---- who optimizes what ----------------------------------------------------------------------------------------------


def groups_by_name(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, tuple[str, float]]:
    """Each parameter's optimizer and weight decay; a parameter in two groups fails."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[str, float]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[id(p)] not in found
                found[names[id(p)]] = (type(optimizer).__name__, group["weight_decay"])
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_adamw_decays_matrices_only(tied: bool) -> None:
    model = GPT(gpt_config(tie_embeddings=tied))
    found = groups_by_name(model, make_optimizers(model, train_params(optimizer="adamw", weight_decay=0.3)))
    assert found == {name: ("AdamW", 0.3 if p.ndim == 2 else 0.0) for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_muon_takes_the_matrices_of_the_blocks(tied: bool) -> None:
    model = GPT(gpt_config(tie_embeddings=tied))
    found = groups_by_name(model, make_optimizers(model, train_params(optimizer="muon", weight_decay=0.3)))
    for name, p in model.named_parameters():
        if name.startswith("blocks.") and p.ndim == 2:
            assert found[name] == ("Muon", 0.3)
        else:
            assert found[name] == ("AdamW", 0.3 if p.ndim == 2 else 0.0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("trainable", ["head", "last_blocks", "lora", "all"])
def test_only_trainable_parameters_are_optimized(optimizer: str, trainable: str) -> None:
    classifier = GPTClassifier(GPT(gpt_config()), 2)
    params = train_params(optimizer=optimizer, trainable=trainable)
    freeze(classifier, params)
    found = groups_by_name(classifier, make_optimizers(classifier, params))
    assert set(found) == {name for name, p in classifier.named_parameters() if p.requires_grad}


def test_muon_leaves_adapters_to_adamw() -> None:
    model = GPT(gpt_config())
    params = train_params(optimizer="muon", trainable="lora")
    freeze(model, params)
    found = groups_by_name(model, make_optimizers(model, params))
    assert found == {
        f"blocks.{i}.attn.{name}.{factor}": ("AdamW", 0.1)
        for i in (0, 1)
        for name in ("q_proj", "v_proj")
        for factor in "AB"
    }


def test_set_lr_scales_each_optimizer_from_its_own_peak() -> None:
    optimizers = make_optimizers(GPT(gpt_config()), train_params(optimizer="muon", lr=0.01, muon_lr=0.2))
    set_lr(optimizers, 0.1)
    set_lr(optimizers, 0.5)  # of the peak, not of what it was
    rates = {type(optimizer).__name__: {group["lr"] for group in optimizer.param_groups} for optimizer in optimizers}
    assert rates == {"AdamW": {0.005}, "Muon": {0.1}}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_without_a_gradient_weight_decay_shrinks_matrices_and_nothing_else(optimizer: str) -> None:
    model = GPT(gpt_config())
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    params = train_params(optimizer=optimizer, lr=0.1, muon_lr=0.2, weight_decay=0.5)
    for each in make_optimizers(model, params):
        each.step()
    for name, p in model.named_parameters():
        matrix_lr = 0.2 if optimizer == "muon" and name.startswith("blocks.") else 0.1
        factor = 1 - matrix_lr * 0.5 if p.ndim == 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


# ---- Muon ------------------------------------------------------------------------------------------------------------


def random_matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def newton_schulz(matrix: Tensor, iterations: int) -> Tensor:
    """Quintic steps on the singular values themselves: U f(S) V^T, without an iteration on matrices."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = s / (matrix.square().sum().sqrt() + 1e-7)
    for _ in range(iterations):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vt


@pytest.mark.parametrize("iterations", [3, 5])
def test_muon_is_its_definition(iterations: int) -> None:
    """Nesterov momentum, orthogonalised, scaled for tall matrices, with decoupled weight decay; four steps."""
    shapes = [(6, 4), (4, 6), (5, 5), (6, 4), (3, 12)]
    lr, weight_decay, momentum = 0.1, 0.2, 0.9
    parameters = [torch.nn.Parameter(random_matrix(*shape, seed=i)) for i, shape in enumerate(shapes)]
    expected = [p.detach().clone() for p in parameters]
    means = [torch.zeros_like(p) for p in expected]
    muon = Muon([{"params": parameters}], lr, weight_decay, momentum, iterations)
    for step in range(4):
        for i, p in enumerate(parameters):
            gradient = random_matrix(*shapes[i], seed=100 + 10 * step + i)
            p.grad = gradient.clone()
            means[i] = momentum * means[i] + (1 - momentum) * gradient
            update = newton_schulz((1 - momentum) * gradient + momentum * means[i], iterations)
            scale = math.sqrt(max(1.0, shapes[i][0] / shapes[i][1]))
            expected[i] = expected[i] * (1 - lr * weight_decay) - lr * scale * update
        muon.step()
    for p, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach(), wanted, atol=1e-9, rtol=1e-9)


def test_muon_has_the_momentum_and_iterations_of_the_params() -> None:
    params = train_params(optimizer="muon", muon_momentum=0.5, muon_iterations=2)
    *_, muon = make_optimizers(GPT(gpt_config()), params)
    assert isinstance(muon, Muon)
    assert (muon.param_groups[0]["momentum"], muon.iterations) == (0.5, 2)


def test_muon_passes_over_parameters_without_a_gradient() -> None:
    with_gradient, without = (torch.nn.Parameter(random_matrix(4, 4, seed)) for seed in (0, 1))
    before = without.detach().clone()
    with_gradient.grad = random_matrix(4, 4, 2)
    Muon([{"params": [with_gradient, without]}], 0.1, 0.1, 0.95, 5).step()
    assert torch.equal(without, before)


@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    seed=st.integers(0, 1000),
    scale=st.floats(1e-3, 1e3),
    iterations=st.integers(3, 6),
)
def test_orthogonalize_brings_singular_values_near_one(
    rows: int, columns: int, seed: int, scale: float, iterations: int
) -> None:
    matrix = random_matrix(rows, columns, seed) * scale
    result = orthogonalize(matrix[None], iterations)[0]
    assert result.shape == matrix.shape
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    clear = s > 0.02 * 3.4 ** (3 - iterations) * s.norm()  # the smallest are not lifted all the way
    ours = u.T @ result @ vt.T  # diagonal: the same singular vectors
    torch.testing.assert_close(ours, torch.diag(ours.diagonal()), atol=1e-6, rtol=0)
    assert ((ours.diagonal()[clear] > 0.65) & (ours.diagonal()[clear] < 1.25)).all()


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 40, 160), (2, 160, 40), (1, 30, 50)])
def test_orthogonalize_is_the_plain_iteration(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = matrices.double()
    x = x / torch.linalg.matrix_norm(x, keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(orthogonalize(matrices, iterations=5).double(), x, atol=2e-5, rtol=0)


def test_orthogonalize_treats_each_matrix_of_a_stack_alone() -> None:
    matrices = torch.stack([random_matrix(4, 7, seed) * 10**seed for seed in range(3)])
    together = orthogonalize(matrices, iterations=5)
    for matrix, result in zip(matrices, together, strict=True):
        torch.testing.assert_close(orthogonalize(matrix[None], iterations=5)[0], result)


def test_orthogonalize_of_zero_is_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(1, 3, 5), iterations=5), torch.zeros(1, 3, 5))


def test_muon_iterates_in_the_dtype_of_the_products() -> None:
    matrices = torch.randn(2, 12, 20, generator=torch.Generator().manual_seed(0))
    plain = orthogonalize(matrices, iterations=5)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = orthogonalize(matrices, iterations=5)
    assert (plain.dtype, mixed.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(mixed.float(), plain, atol=0.05, rtol=0)


@pytest.mark.parametrize("iterations", [3, 5, 10])
@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (64, 64)])
def test_rounding_errors_of_bf16_do_not_outgrow_an_update(shape: tuple[int, int], iterations: int) -> None:
    u, s, vt = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    matrix = (u * torch.logspace(0, -3, len(s)) @ vt)[None]  # as gradients are: few directions have most of it
    plain = orthogonalize(matrix, iterations)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = orthogonalize(matrix, iterations).float()
    assert torch.linalg.svdvals(mixed).max() < 1.25
    assert torch.cosine_similarity(mixed.flatten(), plain.flatten(), dim=0) > 0.97
