"""A CUDA device computes the results of a CPU; skipped where there is none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from llm.bench.harness import compare
from llm.bench.models import Shape
from llm.bench.training import TRAIN
from llm.inference.compiled import CompiledDecoder
from llm.inference.generate import generate
from llm.model.gpt import GPT
from tests.helpers import FORMS, gpt_config, randomize, runtime_params, train_params
from tests.training.tiny import new_gpt, random_batch, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("asked", "tolerance"), [("fp32", 1e-3), ("tf32", 0.01), ("bf16", 0.02)])
def test_the_loss_curve_is_that_of_a_cpu(optimizer: str, asked: str, tolerance: float) -> None:
    batches = [random_batch(seed) for seed in range(3)]

    def losses(device: str, precision: str) -> list[float]:
        model = new_gpt().to(device)
        try:
            result = train(
                model,
                train_params(max_steps=30, eval_interval=5, optimizer=optimizer, precision=precision),
                batches=lambda step: [batches[step % 3]],
                val_batches=lambda: batches,
                runtime=runtime_params(device=device),
            )
        finally:
            torch.set_float32_matmul_precision("highest")
        return [row["val/loss"] for row in result.history]

    expected = losses("cpu", "fp32")
    assert losses("cuda", asked) == pytest.approx(expected, rel=tolerance)
    assert expected[-1] < expected[0] - 0.5


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_text_is_that_of_a_cpu(form: dict[str, Any]) -> None:
    """In double precision, past the context; alone also with the step as a graph."""
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
    model = GPT(gpt_config(**form)).double()
    randomize(model)
    expected = generate(model, prompts, max_new_tokens=30)
    model = copy.deepcopy(model).to(CUDA)
    assert generate(model, prompts, max_new_tokens=30) == expected
    decoder = CompiledDecoder(model)
    assert [generate(decoder, [prompt], max_new_tokens=30)[0] for prompt in prompts] == expected
    assert generate(decoder, prompts, max_new_tokens=[3, 30, 3]) == [expected[0][:3], expected[1], expected[2][:3]]


def test_benchmark_of_training_runs_on_the_device() -> None:
    shape = Shape(layers=2, width=64, heads=2, vocab=100, context=32, batch=2)
    found = compare(TRAIN, shape, 1, 0.1, ["this project"])
    result = found["results"]["this project"]
    assert 0 < result["of_limit"] < 1
    assert result["memory"] < 2**28, "what the device holds, not the process"
