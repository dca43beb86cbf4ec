"""`fit`: exact losses and gradients, learning, stopping, going on after a stop, and the guards."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm.common.device import pick_device
from llm.common.errors import InputError
from llm.config import TrainParams
from llm.data.batches import IGNORE_INDEX, Batch, batches_by_length, collate_labels, collate_pairs, example_batches
from llm.data.examples import Example
from llm.inference.generate import generate
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT, RMSNorm
from llm.model.linear import Linear
from llm.training import fit as training
from llm.training.fit import FitResult, _Objective, _step, fit
from llm.training.freeze import cache_frozen_activations, freeze, frozen_blocks, trained_parameters
from llm.training.losses import label_loss, label_metrics, mean_loss, next_token_loss
from llm.training.optim import orthogonalize
from llm.training.precision import base_dtype, precision
from llm.training.state import load_state
from tests.helpers import GPT2_FORM, SHIPPED_FORM, gpt_config, randomize, runtime_params, train_params

CPU = torch.device("cpu")


def random_batch(step: int, rows: int = 4, vocab_size: int = 61) -> Batch:
    windows = torch.randint(0, vocab_size, (rows, 9), generator=torch.Generator().manual_seed(step))
    return Batch(windows[:, :-1], windows[:, 1:], list(range(step * rows, (step + 1) * rows)))


def random_batches(step: int) -> list[Batch]:
    return [random_batch(step)]


def new_gpt(**changes: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(gpt_config(**changes))


def new_classifier(**changes: Any) -> GPTClassifier:
    torch.manual_seed(0)
    return GPTClassifier(GPT(gpt_config(**changes)), 3)


def val_loss(model: GPT) -> dict[str, float]:
    return {"val/loss": mean_loss(model, next_token_loss, [random_batch(1000), random_batch(1001, rows=3)])}


def train(model: GPT, params: TrainParams, **arguments: Any) -> FitResult:
    arguments = {"batches": random_batches, "evaluate": lambda: val_loss(model)} | arguments
    batches, loss = arguments.pop("batches"), arguments.pop("loss", next_token_loss)
    runtime = arguments.pop("runtime", runtime_params())
    return fit(model, loss, batches, params, runtime, **arguments)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# ---- exact losses ----------------------------------------------------------------------------------------------------


def plain_losses(logits: Tensor, targets: Tensor) -> list[Tensor]:
    """-log softmax at each counted target, in float64, one position at a time."""
    logits = logits.double().flatten(0, -2)
    return [
        logits[i].logsumexp(0) - logits[i, target]
        for i, target in enumerate(targets.flatten().tolist())
        if target != IGNORE_INDEX
    ]


def ragged_examples() -> list[Example]:
    """Eight pairs with very different numbers of targets."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(3, 0), (16, 12), (5, 1), (9, 0), (16, 2), (4, 2), (12, 10), (7, 5)]
    return [
        Example(torch.randint(0, 61, (length,), generator=generator).tolist(), counted, length % 3)
        for length, counted in shapes
    ]


def test_next_token_loss_is_the_sum_over_counted_targets() -> None:
    model = randomize(new_gpt())
    assert isinstance(model, GPT)
    for batch in (random_batch(0), collate_pairs(ragged_examples(), range(8))):
        with torch.no_grad():
            loss, count = next_token_loss(model, batch)
            expected = plain_losses(model(batch.idx), batch.targets)
        assert count.item() == len(expected) == (batch.targets != IGNORE_INDEX).sum()
        assert loss.item() == pytest.approx(sum(expected).item(), rel=1e-6)


def test_label_loss_with_class_weights_is_the_weighted_mean() -> None:
    classifier = new_classifier()
    randomize(classifier)
    batch = collate_labels(ragged_examples(), range(8))
    class_weights = torch.tensor([0.5, 2.0, 3.5])
    assert batch.lengths is not None
    with torch.no_grad():
        losses = plain_losses(classifier(batch.idx, batch.lengths), batch.targets)
        loss, count = label_loss(classifier, batch)
        weighted, weight = label_loss(classifier, batch, class_weights)
    assert count.item() == 8
    assert loss.item() == pytest.approx(sum(losses).item(), rel=1e-6)
    w = class_weights[batch.targets].double()
    assert (weighted / weight).item() == pytest.approx(
        (w * torch.stack(losses)).sum().item() / w.sum().item(), rel=1e-6
    )


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_mean_loss_does_not_depend_on_how_examples_are_batched(batch_size: int) -> None:
    model, examples = randomize(new_gpt()), ragged_examples()
    assert isinstance(model, GPT)
    with torch.no_grad():
        alone = [collate_pairs(examples, [row]) for row in range(8)]
        losses = [loss for batch in alone for loss in plain_losses(model(batch.idx), batch.targets)]
        found = mean_loss(model, next_token_loss, batches_by_length(examples, collate_pairs, batch_size))
    assert found == pytest.approx(sum(losses).item() / len(losses), rel=1e-6)


def test_an_empty_validation_split_is_named() -> None:
    with pytest.raises(InputError, match="validation split is empty"):
        mean_loss(new_gpt(), next_token_loss, [])


def test_accuracy_counts_the_likeliest_labels() -> None:
    classifier, examples = new_classifier(), ragged_examples()
    randomize(classifier)
    with torch.no_grad():
        right = [
            classifier(torch.tensor([example.ids]), torch.tensor([len(example.ids)])).argmax().item() == example.label
            for example in examples
        ]
        found = label_metrics(classifier, batches_by_length(examples, collate_labels, 3))
        assert found["val/accuracy"] == sum(right) / 8
        loss = mean_loss(classifier, label_loss, batches_by_length(examples, collate_labels, 8))
        assert found["val/loss"] == pytest.approx(loss, rel=1e-6)


# ---- exact gradients -------------------------------------------------------------------------------------------------


def gradients_of_step(model: nn.Module, loss: Any, batches: list[Batch], grad_clip: float = 0.0) -> dict[str, Tensor]:
    """The gradients that a step uses; also that the loss and norm which it reports are theirs."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters())
    _, norm = _step(_Objective(model, loss), batches, [optimizer], grad_clip, CPU, contextlib.nullcontext())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    total = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
    assert total == pytest.approx(min(norm, grad_clip) if grad_clip else norm, rel=1e-5)
    return gradients


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
        evaluate=lambda: {"val/loss": mean_loss(model, next_token_loss, [batch])},
    )
    # Different rows may begin with the same token, so that the first target cannot be known.
    assert result.history[0]["val/loss"] > 4
    assert result.best_metrics["val/loss"] < 0.3


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
    evaluate = lambda: {"val/loss": mean_loss(model, loss, [batch])}  # noqa: E731
    fit(model, loss, lambda step: [batch], params, runtime_params(), evaluate=evaluate)
    count = 0
    for name, p in model.named_parameters():
        assert p.requires_grad == name.startswith(trained), name
        count += p.numel() if name.startswith(trained) else 0
        if name.endswith("k_proj.bias"):
            continue  # adds the same to all scores of a query, so that softmax leaves it no gradient but rounding
        assert torch.equal(p, before[name]) != name.startswith(trained), name
    assert trained_parameters(model) == count


def test_what_cannot_be_trained_is_named() -> None:
    with pytest.raises(InputError, match=r"^last_blocks: 3, but the model has 2 blocks$"):
        freeze(new_classifier(), train_params(trainable="last_blocks", last_blocks=3))
    with pytest.raises(InputError, match=r"^trainable: head is for a classifier, and this model is none; take"):
        freeze(new_gpt(), train_params(trainable="head"))


@pytest.mark.parametrize("trainable", ["head", "last_blocks", "lora", "all"])
def test_a_bf16_base_stays_bf16_where_nothing_is_trained(trainable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products in bf16; what is trained is fp32, learns, and everything else keeps its bits."""
    monkeypatch.setattr("llm.training.precision.has_bf16_units", lambda: True)
    gpt = new_gpt(**SHIPPED_FORM).to(torch.bfloat16)
    model = GPTClassifier(gpt, 3) if trainable == "head" else gpt
    loss: Any = label_loss if trainable == "head" else next_token_loss
    examples = ragged_examples()
    batch = collate_labels(examples, range(8)) if trainable == "head" else random_batch(0)
    params = train_params(max_steps=30, eval_interval=10, trainable=trainable, optimizer="muon")
    freeze(model, params)
    before = weights(model)
    result = fit(
        model,
        loss,
        lambda step: [batch],
        params,
        runtime_params(precision="bf16"),
        evaluate=lambda: {"val/loss": mean_loss(model, loss, [batch])},
        sample=lambda: str(generate(gpt, [[1, 2], [3]], max_new_tokens=20)),
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
def test_what_frozen_blocks_make_of_an_example_is_kept_and_changes_no_loss_or_gradient(
    kind: str, changes: dict[str, Any], frozen: int, form: dict[str, Any]
) -> None:
    model, loss, collate, params = with_frozen_blocks(kind, form, **changes)
    randomize(model, std=0.15)
    examples = ragged_examples()
    counts = rows_read(model)
    kept = cache_frozen_activations(model, examples, collate, params, runtime_params(), reads=8)
    assert frozen_blocks(model) == frozen
    assert [counts[i] for i in range(3)] == [8] * frozen + [0] * (3 - frozen), "each example once"

    for rows in ([7, 0, 3], [1], [2], list(range(8))):
        plain, ours = collate(examples, rows), kept(examples, rows)
        assert (plain.lower, plain.start_layer, ours.start_layer) == (None, 0, frozen)
        assert ours.lower is not None and ours.lower.shape == (*plain.idx.shape, 16)
        assert not ours.lower.requires_grad
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
        found_mean = mean_loss(model, loss, batches_by_length(examples, kept, 5))
        assert [counts[i] for i in range(3)] == [0] * frozen + [8] * (3 - frozen)
        assert found_mean == pytest.approx(mean_loss(model, loss, batches_by_length(examples, collate, 5)), rel=1e-5)


def finetuning(
    kind: str, changes: dict[str, Any], keep: bool, stop_at: int | None = None, stop_in: int | None = None, **more: Any
) -> tuple[FitResult, dict[str, Tensor]]:
    """A training on the ragged examples; stopped after a step, or before the second batch of an evaluation."""
    model, loss, collate, params = with_frozen_blocks(kind, SHIPPED_FORM, max_steps=8, eval_interval=4, **changes)
    examples, made, read = ragged_examples(), 0, 0
    batches = (
        cache_frozen_activations(model, examples, collate, params, runtime_params(), reads=24) if keep else collate
    )

    def train_batches(step: int) -> list[Batch]:
        nonlocal made
        made = step + 1
        return example_batches(examples, batches, 3, 1, seed=0)(step)

    def held_out() -> Iterator[Batch]:
        nonlocal read
        for read, batch in enumerate(batches_by_length(examples, batches, 4)):  # noqa: B007
            yield batch
        read = 0

    result = fit(
        model,
        loss,
        train_batches,
        params,
        runtime_params(),
        evaluate=lambda: {"val/loss": mean_loss(model, loss, held_out())},
        should_stop=lambda: made == stop_at or (made, read) == (stop_in, 1),
        **more,
    )
    return result, weights(model)


@pytest.mark.parametrize(("kind", "changes", "frozen"), FROZEN)
def test_a_training_on_what_is_kept_goes_as_one_that_computes_it_again(
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
def test_a_training_on_what_is_kept_continues_with_the_same_bits(
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
def test_nothing_is_kept_where_it_changes_or_would_not_be_read_again(changes: dict[str, Any], reads: int) -> None:
    model, _, collate, params = with_frozen_blocks("classifier", GPT2_FORM, **changes)
    assert cache_frozen_activations(model, ragged_examples(), collate, params, runtime_params(), reads) is collate


@pytest.mark.parametrize("processes", [1, 2])
def test_what_would_take_too_much_memory_is_not_kept(
    processes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _, collate, params = with_frozen_blocks("classifier", GPT2_FORM, trainable="last_blocks")
    examples = ragged_examples()
    size = sum(len(example.ids) for example in examples) * 16 * 4
    monkeypatch.setattr("llm.common.distributed.world_size", lambda: processes)
    monkeypatch.setattr("llm.training.freeze.KEPT_BYTES", processes * size)
    assert cache_frozen_activations(model, examples, collate, params, runtime_params(), reads=8) is not collate
    assert "the lower 2 of 3 blocks make of 8 examples is computed once and kept" in capsys.readouterr().err
    monkeypatch.setattr("llm.training.freeze.KEPT_BYTES", processes * size - 1)
    assert cache_frozen_activations(model, examples, collate, params, runtime_params(), reads=8) is collate
    assert "it is computed again at every step" in capsys.readouterr().err


def test_a_bf16_base_is_kept_as_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With products in bf16."""
    monkeypatch.setattr("llm.training.precision.has_bf16_units", lambda: True)
    model = new_gpt(**SHIPPED_FORM | {"n_layers": 3}).to(torch.bfloat16)
    params = train_params(trainable="last_blocks")
    freeze(model, params)
    examples = ragged_examples()
    kept = cache_frozen_activations(model, examples, collate_pairs, params, runtime_params(precision="bf16"), reads=8)
    lower = kept(examples, [0]).lower
    assert lower is not None and lower.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain, ours = (
            mean_loss(model, next_token_loss, batches_by_length(examples, collate, 8))
            for collate in (collate_pairs, kept)
        )
    assert ours == pytest.approx(plain, rel=1e-3)


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
        result = fit(
            model,
            loss,
            lambda step: [batch],
            params,
            runtime_params(activation_checkpointing=activation_checkpointing),
            evaluate=lambda: {"val/loss": mean_loss(model, loss, [batch])},
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
    assert all(list(row) == ["step", "train/loss", "val/loss", "lr"] for row in result.history)
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
    fit(
        model,
        watched("step", next_token_loss),
        watched("batches", random_batches),
        train_params(max_steps=3, eval_interval=2),
        runtime_params(checkpoint_interval=1),
        evaluate=watched("evaluation", lambda: val_loss(model)),
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

    def evaluate() -> dict[str, float]:
        seen.append((model.training, torch.is_grad_enabled()))
        return {"val/loss": 1.0}

    def loss(model: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
        assert model.training
        return next_token_loss(model, batch)

    train(model, train_params(max_steps=6), loss=loss, evaluate=evaluate, sample=lambda: "Once upon", title="a title")
    assert seen == [(False, False)] * 3
    captured = capsys.readouterr()
    assert captured.err.count("sample: 'Once upon'") == 3
    assert "a title: step 5, train/loss" in captured.err
    assert captured.out == ""


def test_zero_steps_evaluate_and_leave_the_weights() -> None:
    for keep in ("best", "last"):
        model = new_gpt()
        before = weights(model)
        result = train(model, train_params(max_steps=0, keep=keep))
        assert_same_bits(weights(model), before)
        assert result.steps == result.best_step == 0
        assert [row["step"] for row in result.history] == [0]
        assert result.best_metrics == {
            "train/loss": result.history[0]["val/loss"],
            "val/loss": result.history[0]["val/loss"],
        }


def scripted(model: GPT, losses: list[float]) -> tuple[Callable[[], dict[str, float]], list[dict[str, Tensor]]]:
    """An `evaluate` that returns the given losses, and the weights at each of its calls."""
    snapshots: list[dict[str, Tensor]] = []

    def evaluate() -> dict[str, float]:
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


# ---- going on after a stop -------------------------------------------------------------------------------------------

RESUME_STEPS = 11


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
    expected, expected_weights = resumable(None, optimizer, keep, trainable=trainable)
    for stop_at in range(1, RESUME_STEPS + 1):
        folder = tmp_path / str(stop_at)
        torch.manual_seed(99)  # another process starts with another state of the generator
        stopped, _ = resumable(folder, optimizer, keep, stop_at=stop_at, trainable=trainable)
        assert stopped.steps == stop_at
        assert (folder / f"step-{stop_at:08d}").is_dir()  # nothing is lost
        result, found = resumable(folder, optimizer, keep, trainable=trainable)
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

        evaluate = lambda: {"val/loss": mean_loss(model, next_token_loss, held_out())}  # noqa: E731
        stop = lambda: (made, read) == (stop_at, 1)  # noqa: E731
        return train(model, params, batches=batches, evaluate=evaluate, should_stop=stop, **more), weights(model)

    expected, expected_weights = run(None)
    stopped, _ = run(stop_at, **arguments)
    assert (stopped.steps, len(stopped.history)) == (stop_at, stop_at // 4)
    result, found = run(None, **arguments)
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

        schedule = {"schedule": "wsd", "decay_steps": decay_steps, "max_steps": max_steps, "eval_interval": 4}
        params = train_params(optimizer=optimizer, keep=keep, dropout=0.2, **schedule)
        result = train(model, params, batches=batches, stable_dir=stable)
        return result, weights(model), first

    kept = tmp_path / "stable"
    for max_steps, decay_steps, begin, states in (
        (12, 3, 0, [9]),
        (12, 3, 9, [9]),  # the same again
        (21, 5, 9, [9, 16]),
        (22, 6, 16, [9, 16]),  # another decay
        (30, 4, 16, [16, 26]),
        (20, 5, 0, [15]),  # shorter than what is kept
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

        worse_each_time = lambda: {"val/loss": float(made)}  # noqa: E731
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

    with pytest.raises(InputError, match=r"^step 3, batch of rows 12, 13, 14, 15: loss .*nan.*lower lr") as error:
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
    with pytest.raises(InputError, match=r"^step 19, batch of rows 76, .*exploded to .*lower lr$"):
        train(new_gpt(), params, **arguments)


def test_after_a_guard_the_last_good_state_is_there(tmp_path: Path) -> None:
    def batches(step: int) -> list[Batch]:
        batch = random_batch(step)
        return [batch if step < 7 else batch._replace(targets=torch.full_like(batch.targets, IGNORE_INDEX))]

    arguments: dict[str, Any] = {"runtime": runtime_params(checkpoint_interval=2), "state_dir": tmp_path}
    with pytest.raises(InputError, match=r"^step 7, batch of rows 28, .*: no target in them counts; leave these rows"):
        train(new_gpt(), train_params(), batches=batches, **arguments)
    saved = load_state(tmp_path, pytest.fail)
    assert saved is not None and saved[1]["step"] == 6
    assert all(tensor.isfinite().all() for tensor in saved[0].values())
    assert train(new_gpt(), train_params(), **arguments).steps == 10  # with other batches it goes on from there


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_ends_the_training(loss: float) -> None:
    """The last step may be the one that breaks the weights: no training loss is computed with them."""
    losses = iter([4.0, 3.0, loss])
    with pytest.raises(InputError, match=rf"^step 10, validation: loss {loss}: lower lr"):
        train(new_gpt(), train_params(), evaluate=lambda: {"val/loss": next(losses)})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_vocabulary_of_one_is_certain_and_breaks_nothing(optimizer: str) -> None:
    model = new_gpt(vocab_size=1)
    batches = lambda step: [random_batch(step, vocab_size=1)]  # noqa: E731
    evaluate = lambda: {"val/loss": mean_loss(model, next_token_loss, batches(0))}  # noqa: E731
    result = train(model, train_params(optimizer=optimizer), batches=batches, evaluate=evaluate)
    assert [row["val/loss"] for row in result.history] == [0, 0, 0]
    assert all(p.isfinite().all() for p in model.parameters())


def test_messages_of_one_class_are_learned() -> None:
    """Where only one label occurs, all are weighted alike."""
    classifier = new_classifier()
    batch = collate_labels([Example([1, 2, 3], 0, 1), Example([4, 5], 0, 1)], range(2))
    evaluate = lambda: {"val/loss": mean_loss(classifier, label_loss, [batch])}  # noqa: E731
    params = train_params(max_steps=20)
    result = fit(classifier, label_loss, lambda step: [batch], params, runtime_params(), evaluate=evaluate)
    assert result.best_metrics["val/loss"] < 0.2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_learning_rate_of_ten_is_noticed(optimizer: str) -> None:
    params = train_params(max_steps=200, lr=10.0, muon_lr=10.0, optimizer=optimizer, eval_interval=10)
    with pytest.raises(InputError, match="lower lr"):
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


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == CPU
    for name in ("cuda", "mps"):
        with pytest.raises(InputError, match=f"runtime.device: {name} was asked for"):
            pick_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [GPT2_FORM, SHIPPED_FORM], ids=["gpt2", "shipped"])
def test_products_in_bf16_train_as_those_in_fp32(form: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.training.precision.has_bf16_units", lambda: True)
    batches = [random_batch(seed) for seed in range(3)]
    seen: list[tuple[str, torch.dtype]] = []

    def losses(asked: str) -> list[float]:
        model = new_gpt(**form)
        for name, module in model.named_modules():
            if isinstance(module, Linear | RMSNorm):
                module.register_forward_hook(lambda m, args, out, name=name: seen.append((name, out.dtype)))
        result = fit(
            model,
            next_token_loss,
            lambda step: [batches[step % 3]],
            train_params(max_steps=20, eval_interval=5, optimizer="muon"),
            runtime_params(precision=asked),
            evaluate=lambda: {"val/loss": mean_loss(model, next_token_loss, batches)},
        )
        assert all(p.dtype == torch.float32 for p in model.parameters())
        return [row["val/loss"] for row in result.history]

    plain = losses("auto")
    assert losses("fp32") == plain
    assert {dtype for _, dtype in seen} == {torch.float32}
    seen.clear()
    mixed = losses("bf16")
    assert all(dtype == torch.bfloat16 for name, dtype in seen if name.endswith(("_proj", "q_norm", "k_norm")))
    assert mixed != plain
    assert mixed == pytest.approx(plain, rel=0.01)
    assert mixed[-1] < mixed[0] - 0.5


def test_muon_iterates_in_the_dtype_of_the_products() -> None:
    matrices = torch.randn(2, 12, 20, generator=torch.Generator().manual_seed(0))
    plain = orthogonalize(matrices)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = orthogonalize(matrices)
    assert (plain.dtype, mixed.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(mixed.float(), plain, atol=0.05, rtol=0)


@pytest.mark.parametrize(("asked", "device"), [("bf16", "cpu"), ("bf16", "mps"), ("tf32", "cpu"), ("tf32", "mps")])
def test_a_precision_is_refused_where_nothing_is_made_for_it(
    asked: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.training.precision.has_bf16_units", lambda: asked == "tf32")
    monkeypatch.setattr(
        torch, "set_float32_matmul_precision", lambda _: None
    )  # of the process: other tests would have it
    with pytest.raises(
        InputError, match=rf"^runtime.precision: {asked} was .* this {device} device has no units for it"
    ):
        precision(torch.device(device), runtime_params(precision=asked))


def test_tf32_is_used_only_where_it_is_asked_for() -> None:
    try:
        for asked, found in (("tf32", "high"), ("fp32", "highest"), ("tf32", "high"), ("auto", "highest")):
            precision(torch.device("cpu" if asked == "auto" else "cuda"), runtime_params(precision=asked))
            assert torch.get_float32_matmul_precision() == found
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("device", "asked", "mixed"),
    [
        ("cpu", "auto", False),
        ("cuda", "auto", True),
        ("mps", "auto", False),
        ("cuda", "fp32", False),
        ("cuda", "tf32", False),
        ("cpu", "bf16", True),
    ],
)
def test_where_products_are_in_bf16_a_base_keeps_its_dtype(
    device: str, asked: str, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.training.precision.has_bf16_units", lambda: True)
    found = base_dtype(torch.device(device), runtime_params(precision=asked))
    assert found == (None if mixed else torch.float32)
