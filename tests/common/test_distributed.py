"""Processes that train one model together, asked to stop at any place: they leave it together and can go on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch

from llm.training.optim import Muon
from tests.conftest import ROOT

PROGRAM = """
import hashlib, json, os, sys
from pathlib import Path
import torch
from llm.common import distributed
from llm.model.gpt import GPT
from llm.training.optim import Muon
from tests.helpers import gpt_config, train_params
from tests.training.tiny import random_batch, train

distributed.init_distributed()
rank, folder = distributed.rank(), Path(sys.argv[1])


def run(name, stop=(None, None, None)):
    "Asked to stop in process `stop[0]` after `stop[1]` steps, when `stop[2]` batches of an evaluation are made."
    torch.manual_seed(0)
    model, made, read = GPT(gpt_config()), 0, 0

    def batches(step):
        nonlocal made
        made = step + 1
        return [random_batch(step)]

    def held_out():
        nonlocal read
        for read in range(1, 6):  # a last round with nothing for rank 1
            yield random_batch(1000 + read)

    result = train(
        model, train_params(max_steps=4, eval_interval=2), batches=batches, val_batches=held_out,
        should_stop=lambda: (rank, made, read) == stop, state_dir=folder / name,
    )
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    saved = sorted(path.name for path in (folder / name).glob("step-*"))
    return result.steps, result.stopped, len(result.history), saved, hashlib.md5(weights).hexdigest()


computed = []


def doubled(part):
    computed.append(len(part))
    return part * 2


items = torch.arange(30.0).view(5, 2, 3)
spread = [distributed.sharded_map(doubled, items[:n]).equal(items[:n] * 2) for n in (5, 2, 1)]
muon = [torch.nn.Parameter(items[i : i + 1].view(2, 3).clone()) for i in range(5)]
for i, p in enumerate(muon):
    p.grad = (p.detach() - 10 * i).sin()
Muon([{"params": muon, "lr": 0.1}], 0.1, 0.0).step()
answers = {"spread": spread, "computed": computed, "muon": [p.tolist() for p in muon]}
answers["undisturbed"] = [run("undisturbed")]
for stop in json.loads(sys.argv[2]):
    answers[str(stop)] = [run(str(stop), tuple(stop)), run(str(stop))]
(folder / f"answers-{rank}.json").write_text(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the answers of two ranks about their trainings."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "program.py").write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, folder / "program.py", folder, json.dumps(STOPS)],
            env=os.environ | world | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said
    return [json.loads((folder / f"answers-{rank}.json").read_text()) for rank in range(2)]


STOPS = [(rank, made, read) for made in (0, 2, 4) for rank, read in ((0, 2), (1, 4), (0, 5))]


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_stopped_between_batches_of_an_evaluation_both_leave_it_and_go_on(
    answers: list[dict[str, Any]], stop: tuple[int, int, int]
) -> None:
    for answer in answers:
        (steps, stopped, evaluations, _, _), went_on = answer[str(list(stop))]
        assert (steps, stopped, evaluations) == (stop[1], True, stop[1] // 2), "the evaluation does not count"
        assert went_on[:3] == [4, False, 3]
        assert went_on[4] == answer["undisturbed"][0][4]
    assert answers[0][str(list(stop))][0][3] == [f"step-{stop[1]:08d}"], "rank 0 has saved where it was"
    assert answers[1][str(list(stop))][0][4] == answers[0][str(list(stop))][0][4]


def test_each_process_computes_some_items_and_has_all(answers: list[dict[str, Any]]) -> None:
    assert [answer["spread"] for answer in answers] == [[True] * 3] * 2
    assert [answer["computed"] for answer in answers] == [[3, 1, 1], [2, 1]], "of 5, 2 and 1"


def test_muon_is_that_of_one_process(answers: list[dict[str, Any]]) -> None:
    items = torch.arange(30.0).view(5, 2, 3)
    alone = [torch.nn.Parameter(item.clone()) for item in items]
    for i, p in enumerate(alone):
        p.grad = (p.detach() - 10 * i).sin()
    Muon([{"params": alone, "lr": 0.1}], 0.1, 0.0).step()
    for answer in answers:
        torch.testing.assert_close(torch.tensor(answer["muon"]), torch.stack(alone).detach(), rtol=1e-5, atol=1e-5)
