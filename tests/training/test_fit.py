"""`fit`: gradients, learning, early stopping, logging and guards."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm.common.errors import DivergenceError, InputError
from llm.data.batches import IGNORE_INDEX, Batch, collate_labels, collate_pairs
from llm.data.examples import Example
from llm.model.gpt import GPT
from llm.training import fit as training
from llm.training import progress
from llm.training.fit import FitResult
from llm.training.freeze import freeze
from llm.training.losses import label_loss, mean_loss, next_token_loss
from llm.training.state import load_state
from tests.helpers import GPT2_FORM, SHIPPED_FORM, randomize, runtime_params, train_params
from tests.training.tiny import (
    assert_same_bits,
    gradients_of_step,
    new_classifier,
    new_gpt,
    plain_losses,
    ragged_examples,
    random_batch,
    random_batches,
    train,
    weights,
)

# ---- exact gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_accumulated_gradients_are_those_of_one_mean_over_all_targets(parts: int) -> None:
    model, examples = randomize(new_gpt()), ragged_examples()
    assert isinstance(model, GPT)
    whole = collate_pairs(examples, range(8))
    losses = plain_losses(model(whole.idx), whole.targets)
    (sum(losses) / len(losses)).backward()

    size = 8 // parts
    micro_batches = [collate_pairs(examples, range(i, i + size)) for i in range(0, 8, size)]
    found = gradients_of_step(model, next_token_loss, micro_batches)
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(found[name], p.grad, atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_accumulated_gradients_with_class_weights(parts: int) -> None:
    classifier, examples = new_classifier(), ragged_examples()
    randomize(classifier)
    class_weights = torch.tensor([0.5, 2.0, 3.5])
    whole = collate_labels(examples, range(8))
    assert whole.lengths is not None
    w = class_weights[whole.targets].double()
    losses = torch.stack(plain_losses(classifier(whole.idx, whole.lengths), whole.targets))
    ((w * losses).sum() / w.sum()).backward()

    size = 8 // parts
    micro_batches = [collate_labels(examples, range(i, i + size)) for i in range(0, 8, size)]
    found = gradients_of_step(classifier, partial(label_loss, class_weights=class_weights), micro_batches)
    for name, gradient in found.items():
        expected = classifier.get_parameter(name).grad
        assert expected is not None
        torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=1e-4, msg=name)


def test_clipping_scales_the_whole_gradient_and_zero_means_none() -> None:
    model = randomize(new_gpt())
    free = gradients_of_step(model, next_token_loss, [random_batch(0)])
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in free.values()))
    clipped = gradients_of_step(model, next_token_loss, [random_batch(0)], grad_clip=norm / 4)
    for name, gradient in clipped.items():
        torch.testing.assert_close(gradient, free[name] / 4, atol=1e-6, rtol=1e-4)
    unclipped = gradients_of_step(model, next_token_loss, [random_batch(0)], grad_clip=norm * 4)
    assert_same_bits(unclipped, free)


# ---- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("form", [GPT2_FORM, SHIPPED_FORM], ids=["gpt2", "shipped"])
def test_one_batch_is_learned_by_heart(optimizer: str, form: dict[str, Any]) -> None:
    model, batch = new_gpt(**form), random_batch(0)
    params = train_params(max_steps=80, optimizer=optimizer, eval_interval=80, weight_decay=0.0)
    result = train(
        model,
        params,
        batches=lambda step: [batch],
        val_batches=lambda: [batch],
    )
    # Different rows may begin with the same token, so that the first target cannot be known.
    assert result.history[0]["val/loss"] > 4
    assert result.best_metrics["val/loss"] < 0.3


# ---- activation checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt", "classifier", "lora"])
def test_activation_checkpointing_computes_blocks_again_and_changes_no_bit(kind: str) -> None:
    def run(activation_checkpointing: bool) -> tuple[FitResult, dict[str, Tensor], int]:
        model: nn.Module = new_gpt() if kind != "classifier" else new_classifier()
        loss: Any = next_token_loss if kind != "classifier" else label_loss
        params = train_params(max_steps=4, eval_interval=2, trainable="lora" if kind == "lora" else "all", dropout=0.2)
        examples = ragged_examples()
        batch = random_batch(0) if kind != "classifier" else collate_labels(examples, range(8))
        freeze(model, params)
        calls = 0

        def count(*arguments: Any) -> None:
            nonlocal calls
            calls += model.training

        model.get_submodule("blocks.1" if kind != "classifier" else "gpt.blocks.1").register_forward_pre_hook(count)
        result = train(
            model,
            params,
            loss=loss,
            batches=lambda step: [batch],
            val_batches=lambda: [batch],
            runtime=runtime_params(activation_checkpointing=activation_checkpointing),
        )
        return result, weights(model), calls

    plain, plain_weights, plain_calls = run(False)
    result, found, calls = run(True)
    assert (plain_calls, calls) == (4, 8)
    assert_same_bits(found, plain_weights)
    assert result == plain


# ---- what fit does and says ------------------------------------------------------------------------------------------


def test_the_history_has_a_row_for_the_start_each_interval_and_the_end() -> None:
    model = new_gpt()
    logged: list[tuple[dict[str, float], int]] = []
    params = train_params(max_steps=11, eval_interval=4, warmup_steps=4)
    result = train(model, params, log=lambda metrics, step: logged.append((dict(metrics), step)))
    assert [row["step"] for row in result.history] == [0, 4, 8, 11]
    assert list(result.history[0]) == ["step", "val/loss", "lr"], "no training loss before the first step"
    assert all(list(row) == ["step", "train/loss", "val/loss", "lr"] for row in result.history[1:])
    losses = {step: metrics["train/loss"] for metrics, step in logged if "train/loss" in metrics}
    assert list(losses) == list(range(1, 12))
    for before, row in pairwise(result.history):
        between = [losses[step] for step in range(int(before["step"]) + 1, int(row["step"]) + 1)]
        assert row["train/loss"] == pytest.approx(sum(between) / len(between))
    assert {step: m["val/loss"] for m, step in logged if "val/loss" in m} == {
        row["step"]: row["val/loss"] for row in result.history
    }
    steps = [metrics for metrics, step in logged if "lr" in metrics]
    assert [metrics["lr"] for metrics in steps[:5]] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    assert all(set(metrics) == {"train/loss", "lr", "grad_norm", "tokens_per_s"} for metrics in steps)
    assert result.steps == result.best_step == 11


def test_log_interval_thins_the_log() -> None:
    steps: list[int] = []
    runtime = runtime_params(log_interval=3)
    log: Callable[[Mapping[str, float], int], None] = lambda m, step: steps.append(step) if "lr" in m else None  # noqa: E731
    train(new_gpt(), train_params(max_steps=10), runtime=runtime, log=log)
    assert steps == [3, 6, 9]


def test_each_part_of_the_work_happens_in_its_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[str] = []
    seen: set[tuple[str, str]] = set()

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        inside.append(name)
        yield
        inside.pop()

    def watched(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (seen.add((what, inside[-1])), function(*given))[1]

    monkeypatch.setattr(training, "save_state", watched("state", training.save_state))
    monkeypatch.setattr(training, "make_optimizers", watched("optimizers", training.make_optimizers))
    model = new_gpt()
    train(
        model,
        train_params(max_steps=3, eval_interval=2),
        loss=watched("step", next_token_loss),
        batches=watched("batches", random_batches),
        evaluate=watched("evaluation", lambda batches: {"val/loss": mean_loss(model, next_token_loss, batches)}),
        runtime=runtime_params(checkpoint_interval=1),
        state_dir=tmp_path,
        phase=phase,
    )
    assert dict(seen) == {
        "optimizers": "start-up",
        "evaluation": "evaluation",
        "batches": "data",
        "step": "training",
        "state": "saving",
    }
    assert len(seen) == 5 and not inside


def test_evaluation_is_without_dropout_and_gradient_and_shows_a_sample(capsys: pytest.CaptureFixture[str]) -> None:
    model = new_gpt()
    seen: list[tuple[bool, bool]] = []

    def evaluate(batches: object) -> dict[str, float]:
        seen.append((model.training, torch.is_grad_enabled()))
        return {"val/loss": 1.0}

    def loss(model: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
        assert model.training
        return next_token_loss(model, batch)

    train(
        model,
        train_params(max_steps=6),
        loss=loss,
        evaluate=evaluate,
        sample=lambda: ["Once", " upon"],
        title="a title",
    )
    assert seen == [(False, False)] * 3
    captured = capsys.readouterr()
    assert captured.err.count("sample: 'Once upon'") == 3
    assert "a title: step 5, train/loss" in captured.err
    assert captured.out == ""


def test_progress_without_a_terminal_is_whole_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    train(new_gpt(), train_params(max_steps=6, eval_interval=3), title="t", runtime=runtime_params(log_interval=2))
    said = capsys.readouterr().err
    assert "\r" not in said and "\x1b" not in said and "%|" not in said
    lines = said.splitlines()
    assert lines[0] == "t: begins at step 0 of 6"
    assert re.fullmatch(r"t: ended at step 6 of 6 after \d+ s", lines[-1])
    told = [
        line
        for line in lines
        if re.fullmatch(r"t: step \d of 6, loss [\d.]+(, [\d,]+ tokens/s)?, about \d+ s left", line)
    ]
    assert len(told) == 6 and "tokens/s" in told[-1] and "about 0 s left" in told[-1]
    monkeypatch.setattr(progress, "LINE_INTERVAL", 3600.0)
    train(new_gpt(), train_params(max_steps=6, eval_interval=3), title="t")
    assert "left" not in capsys.readouterr().err


def test_progress_in_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    train(new_gpt(), train_params(max_steps=6, eval_interval=3), title="t", runtime=runtime_params(log_interval=2))
    said = capsys.readouterr().err
    assert "begins" not in said and "left" not in said and re.search(r"t: 100%.*6/6 .*tokens/s", said)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    train(new_gpt(), train_params(max_steps=6, eval_interval=3), title="beside")
    assert "%|" not in capsys.readouterr().err


def test_zero_steps_evaluate_and_leave_the_weights() -> None:
    for keep in ("best", "last"):
        model = new_gpt()
        before = weights(model)
        result = train(model, train_params(max_steps=0, keep=keep))
        assert_same_bits(weights(model), before)
        assert result.steps == result.best_step == 0
        assert [row["step"] for row in result.history] == [0]
        assert result.best_metrics == {"val/loss": result.history[0]["val/loss"]}


def scripted(model: GPT, losses: list[float]) -> tuple[Callable[[object], dict[str, float]], list[dict[str, Tensor]]]:
    """Return an `evaluate` with the given losses, and the weights at each of its calls."""
    snapshots: list[dict[str, Tensor]] = []

    def evaluate(batches: object) -> dict[str, float]:
        snapshots.append(weights(model))
        return {"val/loss": losses[len(snapshots) - 1]}

    return evaluate, snapshots


def test_keep_best_or_last() -> None:
    losses = [4.0, 2.0, 3.0, 2.0]  # of two equal ones the first is the best
    for keep, kept in (("best", 1), ("last", 3)):
        model = new_gpt()
        evaluate, snapshots = scripted(model, losses)
        result = train(model, train_params(max_steps=6, eval_interval=2, keep=keep), evaluate=evaluate)
        assert (result.steps, result.best_step) == (6, 2 * kept)
        assert_same_bits(weights(model), snapshots[kept])
        assert result.best_metrics["val/loss"] == losses[kept]


def test_patience_ends_a_training_that_no_longer_improves() -> None:
    model = new_gpt()
    evaluate, snapshots = scripted(model, [4.0, 3.0, 3.1, 2.9, 2.9, 3.0, 1.0])
    params = train_params(max_steps=100, eval_interval=2, patience=2, keep="best")
    result = train(model, params, evaluate=evaluate)
    assert (result.steps, result.best_step) == (10, 6)  # 2.9 again is no improvement
    assert_same_bits(weights(model), snapshots[3])


# ---- guards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_never_reaches_the_weights(bad: str) -> None:
    model = new_gpt()
    before: dict[str, Tensor] = {}

    def loss(model: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
        value, weight = next_token_loss(model, batch)
        if 14 in batch.rows:  # the second micro-batch of step 3
            before.update(weights(model))
            if bad == "loss":
                return value * math.nan, weight
            return value + 0 * (model.tok_emb.weight - model.tok_emb.weight).norm().sqrt(), weight
        return value, weight

    def batches(step: int) -> list[Batch]:
        return [random_batch(2 * step, rows=2), random_batch(2 * step + 1, rows=2)]

    with pytest.raises(DivergenceError, match=r"^step 3, batch of rows 12, 13, 14, 15: loss .*nan.*lower lr") as error:
        train(model, train_params(), loss=loss, batches=batches)
    assert "\n" not in str(error.value)
    assert before
    assert_same_bits(weights(model), before)


@pytest.mark.parametrize("eval_interval", [3, 1000])
def test_an_exploding_loss_ends_the_training_at_the_same_step_after_a_stop(eval_interval: int, tmp_path: Path) -> None:
    scale, made = 1.0, 0

    def loss(model: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
        value, weight = next_token_loss(model, batch)
        return value * scale, weight

    def batches(step: int) -> list[Batch]:
        nonlocal scale, made
        scale, made = 100.0 if step >= 12 else 1.0, step + 1
        return random_batches(step)

    params = train_params(max_steps=200, eval_interval=eval_interval)
    arguments: dict[str, Any] = {"loss": loss, "batches": batches, "state_dir": tmp_path}
    assert train(new_gpt(), params, should_stop=lambda: made == 15, **arguments).steps == 15
    with pytest.raises(DivergenceError, match=r"^step 19, batch of rows 76, .*exploded to .*lower lr$"):
        train(new_gpt(), params, **arguments)


def test_after_a_guard_the_last_good_state_is_there(tmp_path: Path) -> None:
    def batches(step: int) -> list[Batch]:
        batch = random_batch(step)
        return [batch if step < 7 else batch._replace(targets=torch.full_like(batch.targets, IGNORE_INDEX))]

    arguments: dict[str, Any] = {"runtime": runtime_params(checkpoint_interval=2), "state_dir": tmp_path}
    with pytest.raises(
        InputError, match=r"^step 7, batch of rows 28, .*: no target in them counts; leave these rows"
    ) as error:
        train(new_gpt(), train_params(), batches=batches, **arguments)
    assert not isinstance(error.value, DivergenceError), "a lower lr would not help"
    saved = load_state(tmp_path)
    assert saved is not None and saved[1]["step"] == 6
    assert all(tensor.isfinite().all() for tensor in saved[0].values())
    assert train(new_gpt(), train_params(), **arguments).steps == 10  # with other batches it goes on from there


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_ends_the_training(loss: float) -> None:
    """The last step may be the one that breaks the weights: no training loss is computed with them."""
    losses = iter([4.0, 3.0, loss])
    with pytest.raises(DivergenceError, match=rf"^step 10, validation: loss {loss}: lower lr"):
        train(new_gpt(), train_params(), evaluate=lambda batches: {"val/loss": next(losses)})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_vocabulary_of_one_is_certain_and_breaks_nothing(optimizer: str) -> None:
    model = new_gpt(vocab_size=1)
    batches = lambda step: [random_batch(step, vocab_size=1)]  # noqa: E731
    result = train(model, train_params(optimizer=optimizer), batches=batches, val_batches=lambda: batches(0))
    assert [row["val/loss"] for row in result.history] == [0, 0, 0]
    assert all(p.isfinite().all() for p in model.parameters())


def test_messages_of_one_class_are_learned() -> None:
    """One label alone: all are weighted alike."""
    classifier = new_classifier()
    batch = collate_labels([Example([1, 2, 3], 0, 1), Example([4, 5], 0, 1)], range(2))
    params = train_params(max_steps=20)
    result = train(classifier, params, loss=label_loss, batches=lambda step: [batch], val_batches=lambda: [batch])
    assert result.best_metrics["val/loss"] < 0.2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_learning_rate_of_ten_is_noticed(optimizer: str) -> None:
    params = train_params(max_steps=200, lr=10.0, muon_lr=10.0, optimizer=optimizer, eval_interval=10)
    with pytest.raises(DivergenceError, match="lower lr"):
        train(new_gpt(), params)


def test_noisy_but_sound_losses_are_left_alone() -> None:
    def loss(model: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
        value, weight = next_token_loss(model, batch)
        return value * (5.0 if batch.rows[0] % 5 == 0 else 1.0), weight  # every fifth batch is five times as hard

    assert train(new_gpt(), train_params(max_steps=40, eval_interval=7), loss=loss).steps == 40


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_the_number_of_threads_changes_losses_by_rounding_alone() -> None:
    """Sums are cut into as many parts as there are threads; the pipeline's bits are those of one number of threads."""

    def losses() -> list[float]:
        model = new_gpt(**SHIPPED_FORM | {"emb_dim": 64, "ffn_dim": 128, "vocab_size": 500})
        logged: list[float] = []
        train(
            model,
            train_params(max_steps=3, optimizer="muon", lr=0.002),
            batches=lambda step: [random_batch(step, rows=32, vocab_size=500)],
            log=lambda metrics, step: logged.extend(v for k, v in metrics.items() if k.endswith("/loss")),
        )
        return logged

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, again = losses(), losses()
        torch.set_num_threads(2)
        two = losses()
    finally:
        torch.set_num_threads(threads)
    assert one == again
    assert two == pytest.approx(one, rel=1e-5)
