"""Choice of the trained parameters, and the activation cache of frozen blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm.common.errors import InputError
from llm.config import TrainParams
from llm.data.batches import Batch, batches_by_length, collate_labels, collate_pairs, example_batches
from llm.inference.generate import stream
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.training.fit import FitResult
from llm.training.freeze import cache_frozen_activations, freeze, frozen_blocks, trained_parameters
from llm.training.losses import label_loss, mean_loss, next_token_loss
from tests.helpers import GPT2_FORM, SHIPPED_FORM, randomize, set_bf16_units, train_params
from tests.training.tiny import (
    assert_same_bits,
    gradients_of_step,
    new_classifier,
    new_gpt,
    ragged_examples,
    random_batch,
    train,
    weights,
)

ADAPTERS = tuple(
    f"blocks.{i}.attn.{name}.{factor}" for i in range(3) for name in ("q_proj", "v_proj") for factor in "AB"
)
KINDS: list[tuple[str, int, tuple[str, ...]]] = [  # trainable, last_blocks, what of a GPT is trained
    ("head", 2, ()),
    ("last_blocks", 0, ("final_norm.",)),
    ("last_blocks", 1, ("final_norm.", "blocks.2.")),
    ("last_blocks", 3, ("final_norm.", "blocks.")),
    ("lora", 0, ADAPTERS),
    ("all", 0, ("final_norm.", "blocks.", "tok_emb.", "pos_emb.")),
]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("trainable", "last_blocks", "trained"), KINDS)
@pytest.mark.parametrize("kind", ["gpt", "classifier"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_training_changes_the_chosen_part_and_nothing_else(
    optimizer: str, trainable: str, last_blocks: int, trained: tuple[str, ...], kind: str, tied: bool
) -> None:
    examples = ragged_examples()
    if kind == "classifier":
        model: nn.Module = new_classifier(n_layers=3, tie_embeddings=tied)
        loss, batch = label_loss, collate_labels(examples, range(8))
        trained = ("head.", *(f"gpt.{name}" for name in trained))
    elif trainable == "head":
        pytest.skip("only a classifier has one")
    else:
        model = new_gpt(n_layers=3, tie_embeddings=tied)
        loss, batch = next_token_loss, collate_pairs(examples, range(8))
        trained = (*trained, "lm_head.") if trainable == "all" else trained
    randomize(model)
    params = train_params(max_steps=3, optimizer=optimizer, trainable=trainable, last_blocks=last_blocks, dropout=0.1)
    freeze(model, params)
    before = weights(model)
    train(model, params, loss=loss, batches=lambda step: [batch], val_batches=lambda: [batch])
    count = 0
    for name, p in model.named_parameters():
        assert p.requires_grad == name.startswith(trained), name
        count += p.numel() if name.startswith(trained) else 0
        if name.endswith("k_proj.bias"):
            continue  # adds the same to all scores of a query, so that softmax leaves it no gradient but rounding
        assert torch.equal(p, before[name]) != name.startswith(trained), name
    assert trained_parameters(model) == count


def test_an_impossible_choice_of_trained_parameters_is_an_error() -> None:
    with pytest.raises(InputError, match=r"^last_blocks: 3, but the model has 2 blocks$"):
        freeze(new_classifier(), train_params(trainable="last_blocks", last_blocks=3))
    with pytest.raises(InputError, match=r"^trainable: head is for a classifier, and this model is none; take"):
        freeze(new_gpt(), train_params(trainable="head"))


@pytest.mark.parametrize("trainable", ["head", "last_blocks", "lora", "all"])
def test_a_bf16_base_stays_bf16_where_nothing_is_trained(trainable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products in bf16; what is trained is fp32, learns, and everything else keeps its bits."""
    set_bf16_units(monkeypatch, "avx512_bf16")
    gpt = new_gpt(**SHIPPED_FORM).to(torch.bfloat16)
    model = GPTClassifier(gpt, 3) if trainable == "head" else gpt
    loss: Any = label_loss if trainable == "head" else next_token_loss
    examples = ragged_examples()
    batch = collate_labels(examples, range(8)) if trainable == "head" else random_batch(0)
    params = train_params(max_steps=30, eval_interval=10, trainable=trainable, optimizer="muon", precision="bf16")
    freeze(model, params)
    before = weights(model)
    result = train(
        model,
        params,
        loss=loss,
        batches=lambda step: [batch],
        val_batches=lambda: [batch],
        sample=lambda: map(str, stream(gpt, [1, 2], max_new_tokens=20)),
    )
    assert result.best_metrics["val/loss"] < result.history[0]["val/loss"] - 0.1
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
        assert p.requires_grad or torch.equal(p, before[name]), name
    assert any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters()) == (trainable == "all")


# ---- frozen blocks ---------------------------------------------------------------------------------------------------

LORA_HEAD = {"rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": ["head"]}
FROZEN: list[tuple[str, dict[str, Any], int]] = [  # what is trained of which model, and how many of 3 blocks are not
    ("classifier", {"trainable": "head"}, 3),
    ("classifier", {"trainable": "lora", "lora": LORA_HEAD}, 3),
    ("classifier", {"trainable": "last_blocks", "last_blocks": 0}, 3),
    ("classifier", {"trainable": "last_blocks", "last_blocks": 1}, 2),
    ("gpt", {"trainable": "last_blocks", "last_blocks": 1}, 2),
    ("gpt", {"trainable": "last_blocks", "last_blocks": 2}, 1),
]


def with_frozen_blocks(kind: str, form: dict[str, Any], **changes: Any) -> tuple[Any, Any, Any, TrainParams]:
    """A model of 3 blocks, its loss and collate, and the parameters of a training that leaves some blocks alone."""
    model: Any = (new_classifier if kind == "classifier" else new_gpt)(**form | {"n_layers": 3})
    params = train_params(batch_size=3, **changes)
    freeze(model, params)
    if kind == "classifier":
        return model, label_loss, collate_labels, params
    return model, next_token_loss, collate_pairs, params


def rows_read(model: nn.Module) -> dict[int, int]:
    """From now on counts the rows that each block reads."""
    counts: dict[int, int] = {}
    gpt = model.gpt if isinstance(model, GPTClassifier) else model
    assert isinstance(gpt, GPT)
    for number, block in enumerate(gpt.blocks):
        counts[number] = 0

        def count(module: nn.Module, arguments: Any, number: int = number) -> None:
            counts[number] += len(arguments[0])

        block.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize("form", [GPT2_FORM, SHIPPED_FORM], ids=["gpt2", "shipped"])
@pytest.mark.parametrize(("kind", "changes", "frozen"), FROZEN)
def test_cached_activations_change_no_loss_or_gradient(
    kind: str, changes: dict[str, Any], frozen: int, form: dict[str, Any]
) -> None:
    model, loss, collate, params = with_frozen_blocks(kind, form, **changes)
    randomize(model, std=0.15)
    examples = ragged_examples()
    counts = rows_read(model)
    cached = cache_frozen_activations(model, examples, collate, params, reads=8)
    assert frozen_blocks(model) == frozen
    assert [counts[i] for i in range(3)] == [8] * frozen + [0] * (3 - frozen), "each example once"

    for rows in ([7, 0, 3], [1], [2], list(range(8))):
        plain, ours = collate(examples, rows), cached(examples, rows)
        assert (plain.cached_hidden, plain.start_layer, ours.start_layer) == (None, 0, frozen)
        assert ours.cached_hidden is not None and ours.cached_hidden.shape == (*plain.idx.shape, 16)
        assert not ours.cached_hidden.requires_grad
        torch.manual_seed(3)  # the adapter's dropout
        expected = gradients_of_step(model, loss, [plain])
        torch.manual_seed(3)
        found = gradients_of_step(model, loss, [ours])
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=name)
        with torch.no_grad():
            model.eval()
            assert loss(model, ours)[0].item() == pytest.approx(loss(model, plain)[0].item(), rel=1e-5)
    with torch.no_grad():
        counts.update(dict.fromkeys(counts, 0))
        found_mean = mean_loss(model, loss, batches_by_length(examples, cached, 5))
        assert [counts[i] for i in range(3)] == [0] * frozen + [8] * (3 - frozen)
        assert found_mean == pytest.approx(mean_loss(model, loss, batches_by_length(examples, collate, 5)), rel=1e-5)


def finetuning(
    kind: str, changes: dict[str, Any], keep: bool, stop_at: int | None = None, stop_in: int | None = None, **more: Any
) -> tuple[FitResult, dict[str, Tensor]]:
    """A training on the ragged examples; stopped after a step, or before the second batch of an evaluation."""
    model, loss, collate, params = with_frozen_blocks(kind, SHIPPED_FORM, max_steps=8, eval_interval=4, **changes)
    examples, made, read = ragged_examples(), 0, 0
    batches = cache_frozen_activations(model, examples, collate, params, reads=24) if keep else collate

    def train_batches(step: int) -> list[Batch]:
        nonlocal made
        made = step + 1
        return example_batches(examples, batches, 3, 1, seed=0)(step)

    def held_out() -> Iterator[Batch]:
        nonlocal read
        for read, batch in enumerate(batches_by_length(examples, batches, 4)):  # noqa: B007
            yield batch
        read = 0

    result = train(
        model,
        params,
        loss=loss,
        batches=train_batches,
        val_batches=held_out,
        should_stop=lambda: made == stop_at or (made, read) == (stop_in, 1),
        **more,
    )
    return result, weights(model)


@pytest.mark.parametrize(("kind", "changes", "frozen"), FROZEN)
def test_training_on_cached_activations_equals_training_without_a_cache(
    kind: str, changes: dict[str, Any], frozen: int
) -> None:
    plain, _ = finetuning(kind, changes, keep=False)
    result, _ = finetuning(kind, changes, keep=True)
    assert len(result.history) == 3
    for row, expected in zip(result.history, plain.history, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    assert result.best_metrics["val/loss"] < result.history[0]["val/loss"]


@pytest.mark.parametrize("stopped", [{"stop_at": 3}, {"stop_at": 7}, {"stop_in": 4}])
@pytest.mark.parametrize("kind", ["gpt", "classifier"])
def test_training_on_cached_activations_resumes_with_the_same_bits(
    tmp_path: Path, kind: str, stopped: dict[str, int]
) -> None:
    changes = {"trainable": "last_blocks", "last_blocks": 1}
    expected, expected_weights = finetuning(kind, changes, keep=True)
    [step] = stopped.values()
    first, _ = finetuning(kind, changes, keep=True, state_dir=tmp_path, **stopped)
    assert (first.steps, len(first.history)) == (step, 1 + (step > 4))
    result, found = finetuning(kind, changes, keep=True, state_dir=tmp_path)
    assert result == expected
    assert_same_bits(found, expected_weights)


@pytest.mark.parametrize(
    ("changes", "reads"),
    [
        ({"trainable": "all"}, 8),
        ({"trainable": "lora"}, 8),
        ({"trainable": "last_blocks", "last_blocks": 3}, 8),
        ({"trainable": "last_blocks", "dropout": 0.1}, 8),
        ({"trainable": "last_blocks"}, 7),
    ],
)
def test_activations_that_change_or_are_read_once_are_not_cached(changes: dict[str, Any], reads: int) -> None:
    model, _, collate, params = with_frozen_blocks("classifier", GPT2_FORM, **changes)
    assert cache_frozen_activations(model, ragged_examples(), collate, params, reads) is collate


@pytest.mark.parametrize("processes", [1, 2])
def test_activations_that_exceed_the_memory_limit_are_not_cached(
    processes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _, collate, params = with_frozen_blocks("classifier", GPT2_FORM, trainable="last_blocks")
    examples = ragged_examples()
    size = sum(len(example.ids) for example in examples) * 16 * 4
    monkeypatch.setattr("llm.common.distributed.world_size", lambda: processes)
    monkeypatch.setattr("llm.training.freeze.MAX_CACHE_BYTES", processes * size)
    assert cache_frozen_activations(model, examples, collate, params, reads=8) is not collate
    assert "activations of the lower 2 of 3 blocks for 8 examples: cached, " in capsys.readouterr().err
    monkeypatch.setattr("llm.training.freeze.MAX_CACHE_BYTES", processes * size - 1)
    assert cache_frozen_activations(model, examples, collate, params, reads=8) is collate
    assert "not cached" in capsys.readouterr().err


def test_activations_of_a_bf16_base_are_cached_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """With products in bf16."""
    set_bf16_units(monkeypatch, "avx512_bf16")
    model = new_gpt(**SHIPPED_FORM | {"n_layers": 3}).to(torch.bfloat16)
    params = train_params(trainable="last_blocks", precision="bf16")
    freeze(model, params)
    examples = ragged_examples()
    cached = cache_frozen_activations(model, examples, collate_pairs, params, reads=8)
    cached_hidden = cached(examples, [0]).cached_hidden
    assert cached_hidden is not None and cached_hidden.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain, ours = (
            mean_loss(model, next_token_loss, batches_by_length(examples, collate, 8))
            for collate in (collate_pairs, cached)
        )
    assert ours == pytest.approx(plain, rel=1e-3)
