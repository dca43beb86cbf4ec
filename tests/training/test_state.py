"""Resume: a stopped training ends with the bits of one that was never stopped."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.data.batches import Batch
from llm.inference.generate import stream
from llm.training.fit import FitResult
from llm.training.freeze import freeze
from llm.training.state import TrainingState
from tests.helpers import runtime_params, train_params
from tests.training.tiny import (
    assert_same_bits,
    new_gpt,
    random_batch,
    random_batches,
    train,
    weights,
)

RESUME_STEPS = 11


@pytest.fixture(autouse=True)
def _short_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the blocks of the curve double within these few steps."""
    monkeypatch.setattr("llm.training.state.MAX_POINTS", 4)


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


def resumable(
    folder: Path | None,
    optimizer: str,
    keep: str,
    stop_at: int | None = None,
    kill_at: int | None = None,
    trainable: str = "all",
) -> tuple[FitResult, dict[str, Tensor]]:
    """A training with dropout and accumulation that is stopped after one step, or killed in another."""
    model = new_gpt()
    params = train_params(
        max_steps=RESUME_STEPS,
        eval_interval=4,
        optimizer=optimizer,
        keep=keep,
        grad_accum_steps=2,
        lr=0.05,
        dropout=0.2,
    )
    lora = params.lora.model_copy(update={"dropout": 0.2})
    params = params.model_copy(update={"trainable": trainable, "lora": lora})
    freeze(model, params)
    made = 0

    def batches(step: int) -> list[Batch]:
        nonlocal made
        if step == kill_at:
            raise Killed
        made = step + 1
        return [random_batch(2 * step), random_batch(2 * step + 1, rows=2)]

    result = train(
        model,
        params,
        batches=batches,
        runtime=runtime_params(checkpoint_interval=3),
        state_dir=folder,
        should_stop=lambda: made == stop_at,
    )
    return result, weights(model)


@pytest.mark.parametrize("trainable", ["all", "lora"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_stopped_at_any_step_and_continued_equals_never_stopped(
    tmp_path: Path, optimizer: str, keep: str, trainable: str
) -> None:
    """One training that stops after each of its steps: a single wrong resume would show at its end."""
    expected, expected_weights = resumable(None, optimizer, keep, trainable=trainable)
    for stop_at in range(1, RESUME_STEPS + 1):
        torch.manual_seed(99)  # another process starts with another state of the generator
        stopped, _ = resumable(tmp_path, optimizer, keep, stop_at=stop_at, trainable=trainable)
        assert stopped.steps == stop_at
        assert (tmp_path / f"step-{stop_at:08d}").is_dir()  # nothing is lost
    result, found = resumable(tmp_path, optimizer, keep, trainable=trainable)
    assert_same_bits(found, expected_weights)
    assert result == expected


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_again_and_again_equals_never_killed(tmp_path: Path, optimizer: str) -> None:
    expected, expected_weights = resumable(None, optimizer, "best")
    for kill_at in (2, 4, 5, 10):  # before the first state, in the step after an evaluation, and later
        with pytest.raises(Killed):
            resumable(tmp_path, optimizer, "best", kill_at=kill_at)
    result, found = resumable(tmp_path, optimizer, "best")
    assert_same_bits(found, expected_weights)
    assert result == expected


def test_a_finished_training_continues_to_the_same_end(tmp_path: Path) -> None:
    first = resumable(tmp_path, "muon", "best")
    second = resumable(tmp_path, "muon", "best")
    assert_same_bits(second[1], first[1])
    assert second[0] == first[0]


@pytest.mark.parametrize("stop_at", [0, 4, 8])
def test_stopped_in_the_middle_of_an_evaluation_it_is_made_again(tmp_path: Path, stop_at: int) -> None:
    """Two batches are evaluated on: the stop comes after the first."""
    params = train_params(max_steps=8, eval_interval=4, dropout=0.2)
    arguments: dict[str, Any] = {"runtime": runtime_params(checkpoint_interval=100), "state_dir": tmp_path}

    def run(stop_at: int | None, **more: Any) -> tuple[FitResult, dict[str, Tensor]]:
        model, made, read = new_gpt(), 0, 0

        def batches(step: int) -> list[Batch]:
            nonlocal made
            made = step + 1
            return random_batches(step)

        def held_out() -> Iterator[Batch]:
            nonlocal read
            for number in range(2):
                read = number
                yield random_batch(1000 + number)

        stop = lambda: (made, read) == (stop_at, 1)  # noqa: E731
        return train(model, params, batches=batches, val_batches=held_out, should_stop=stop, **more), weights(model)

    expected, expected_weights = run(None)
    stopped, _ = run(stop_at, **arguments)
    assert (stopped.steps, len(stopped.history)) == (stop_at, stop_at // 4)
    result, found = run(None, **arguments)
    assert result == expected
    assert_same_bits(found, expected_weights)


def test_a_stop_between_the_tokens_of_a_sample_repeats_the_evaluation(tmp_path: Path) -> None:
    def run(stop_at: int | None) -> tuple[FitResult, dict[str, Tensor]]:
        model, tokens = new_gpt(), 0

        def sample() -> Iterator[str]:
            nonlocal tokens
            for token in stream(model, [1, 2], max_new_tokens=5):
                tokens += 1
                yield str(token)

        stop = lambda: tokens == stop_at  # noqa: E731
        params = train_params(max_steps=4, eval_interval=2, dropout=0.2)
        return train(model, params, sample=sample, state_dir=tmp_path, should_stop=stop), weights(model)

    stopped, _ = run(stop_at=8)  # in the second sample
    assert (stopped.steps, stopped.stopped, len(stopped.history)) == (2, True, 1)
    result, found = run(stop_at=None)
    shutil.rmtree(tmp_path)
    expected, expected_weights = run(stop_at=None)
    assert result == expected
    assert_same_bits(found, expected_weights)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_training_that_is_prolonged_equals_a_long_one(tmp_path: Path, optimizer: str, keep: str) -> None:
    def run(max_steps: int, decay_steps: int, stable: Path | None) -> tuple[FitResult, dict[str, Tensor], int]:
        model, first = new_gpt(), max_steps

        def batches(step: int) -> list[Batch]:
            nonlocal first
            first = min(first, step)
            return random_batches(step)

        schedule = {"schedule": "wsd", "decay_steps": decay_steps, "max_steps": max_steps, "eval_interval": 2}
        params = train_params(optimizer=optimizer, keep=keep, dropout=0.2, **schedule)
        result = train(model, params, batches=batches, stable_dir=stable)
        return result, weights(model), first

    kept = tmp_path / "stable"
    for max_steps, decay_steps, begin, states in (
        (6, 2, 0, [4]),
        (6, 2, 4, [4]),  # the same again
        (10, 3, 4, [4, 7]),
        (11, 4, 7, [4, 7]),  # another decay
        (14, 2, 7, [7, 12]),
        (9, 3, 0, [6]),  # shorter than what is kept
    ):
        expected, expected_weights, _ = run(max_steps, decay_steps, None)
        result, found, first = run(max_steps, decay_steps, kept)
        assert first == begin
        assert_same_bits(found, expected_weights)
        assert result == expected
        assert sorted(path.name for path in kept.iterdir()) == [f"step-{step:08d}" for step in states]


def test_only_wsd_keeps_the_state_before_its_decay(tmp_path: Path) -> None:
    train(new_gpt(), train_params(max_steps=12, schedule="linear"), stable_dir=tmp_path / "stable")
    assert not (tmp_path / "stable").exists()


def damage(state: Path) -> None:
    path = state / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def test_damaged_states_are_passed_over_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, expected_weights = resumable(None, "muon", "best")
    with pytest.raises(Killed):
        resumable(tmp_path, "muon", "best", kill_at=8)
    older, newest = sorted(tmp_path.iterdir())
    assert (older.name, newest.name) == ("step-00000003", "step-00000006")

    damage(newest)
    capsys.readouterr()
    with pytest.raises(Killed):
        resumable(tmp_path, "muon", "best", kill_at=7)  # wrote step 6 again
    said = capsys.readouterr().err
    assert f"{newest}: damaged training state, passed over" in said
    assert "training: continues at step 3 of 11" in said

    damage(older)
    damage(newest)
    result, found = resumable(tmp_path, "muon", "best")
    said = capsys.readouterr().err
    assert f"{newest}: damaged" in said and f"{older}: damaged" in said and "continues" not in said
    assert_same_bits(found, expected_weights)
    assert result == expected


def test_early_stopping_counts_on_across_a_stop(tmp_path: Path) -> None:
    def run(stop_at: int | None) -> FitResult:
        model = new_gpt()
        made = 0

        def batches(step: int) -> list[Batch]:
            nonlocal made
            made = step + 1
            return random_batches(step)

        worse_each_time = lambda batches: {"val/loss": float(made)}  # noqa: E731
        params = train_params(max_steps=50, eval_interval=2, patience=3)
        return train(
            model,
            params,
            batches=batches,
            evaluate=worse_each_time,
            state_dir=tmp_path,
            should_stop=lambda: made == stop_at,
        )

    assert run(stop_at=5).steps == 5
    assert run(stop_at=None).steps == 6


def test_curve_has_the_mean_of_every_step_in_a_bounded_number_of_points() -> None:
    losses = [random.Random(step).random() for step in range(11)]
    state = TrainingState(new_gpt(), [])
    for step, loss in enumerate(losses):
        state.record(loss, lr=0.1 * (step + 1))
    rows = state.curve_rows(lr=1.1)
    assert [row["step"] for row in rows] == [4, 8, 11], "blocks of four steps, and what is left"
    assert [row["lr"] for row in rows] == pytest.approx([0.4, 0.8, 1.1]), "of the last step of each block"
    parts = (losses[:4], losses[4:8], losses[8:])
    assert [row["train/loss"] for row in rows] == pytest.approx([sum(part) / len(part) for part in parts])
    assert state.step == 11 and state.losses == losses
