"""Processes that train one model together, asked to stop at any place: they leave it together and can go on."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.common import distributed
from llm.data.batches import Batch
from llm.model.gpt import GPT
from llm.training.optim import Muon
from tests.forks import Fork
from tests.helpers import gpt_config, train_params
from tests.training.tiny import random_batch, train

STOPS = [(rank, made, read) for made in (0, 2, 4) for rank, read in ((0, 2), (1, 4), (0, 5))]


def run(folder: Path, stop: tuple[int, int, int] | None = None) -> tuple[int, bool, int, list[str], str]:
    """Train; `stop` asks one rank to stop after some steps, once some batches of an evaluation are made."""
    torch.manual_seed(0)
    model, made, read = GPT(gpt_config()), 0, 0

    def batches(step: int) -> list[Batch]:
        nonlocal made
        made = step + 1
        return [random_batch(step)]

    def held_out() -> Iterator[Batch]:
        nonlocal read
        for read in range(1, 6):  # a last round with nothing for rank 1
            yield random_batch(1000 + read)

    result = train(
        model,
        train_params(max_steps=4, eval_interval=2),
        batches=batches,
        val_batches=held_out,
        should_stop=lambda: (distributed.rank(), made, read) == stop,
        state_dir=folder,
    )
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    saved = sorted(path.name for path in folder.glob("step-*"))
    return result.steps, result.stopped, len(result.history), saved, hashlib.md5(weights).hexdigest()


def write_answers(folder: Path) -> None:
    """Do as one rank what is compared; write its answers."""
    distributed.init_distributed()
    computed = []

    def doubled(part: torch.Tensor) -> torch.Tensor:
        computed.append(len(part))
        return part * 2

    items = torch.arange(30.0).view(5, 2, 3)
    spread = [distributed.sharded_map(doubled, items[:n]).equal(items[:n] * 2) for n in (5, 2, 1)]
    muon = step_of_muon(items)
    answers: dict[str, Any] = {"spread": spread, "computed": computed, "muon": [p.tolist() for p in muon]}
    answers["undisturbed"] = [run(folder / "undisturbed")]
    for stop in STOPS:
        answers[str(stop)] = [run(folder / str(stop), stop), run(folder / str(stop))]
    (folder / f"answers-{distributed.rank()}.json").write_text(json.dumps(answers))


def step_of_muon(items: torch.Tensor) -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(item.clone()) for item in items]
    for i, p in enumerate(parameters):
        p.grad = (p.detach() - 10 * i).sin()
    Muon([{"params": parameters, "lr": 0.1}], 0.1, 0.0, 0.95, 5).step()
    return parameters


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the answers of two ranks about their trainings."""
    folder = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [Fork(lambda: write_answers(folder), **world, RANK=str(rank)) for rank in range(2)]
    for rank in ranks:
        said = rank.communicate(timeout=300)[1]
        assert rank.returncode == 0, said
    return [json.loads((folder / f"answers-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_stopped_between_batches_of_an_evaluation_both_leave_it_and_go_on(
    answers: list[dict[str, Any]], stop: tuple[int, int, int]
) -> None:
    for answer in answers:
        (steps, stopped, evaluations, _, _), went_on = answer[str(stop)]
        assert (steps, stopped, evaluations) == (stop[1], True, stop[1] // 2), "the evaluation does not count"
        assert went_on[:3] == [4, False, 3]
        assert went_on[4] == answer["undisturbed"][0][4]
    assert answers[0][str(stop)][0][3] == [f"step-{stop[1]:08d}"], "rank 0 has saved where it was"
    assert answers[1][str(stop)][0][4] == answers[0][str(stop)][0][4]


def test_each_process_computes_some_items_and_has_all(answers: list[dict[str, Any]]) -> None:
    assert [answer["spread"] for answer in answers] == [[True] * 3] * 2
    assert [answer["computed"] for answer in answers] == [[3, 1, 1], [2, 1]], "of 5, 2 and 1"


def test_muon_is_that_of_one_process(answers: list[dict[str, Any]]) -> None:
    items = torch.arange(30.0).view(5, 2, 3)
    alone = step_of_muon(items)
    for answer in answers:
        torch.testing.assert_close(torch.tensor(answer["muon"]), torch.stack(alone).detach(), rtol=1e-5, atol=1e-5)
