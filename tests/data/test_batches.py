"""Batches of windows and examples: the expected tokens, each as often as it should be, and padding."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from llm.common.errors import InputError
from llm.data.batches import (
    IGNORE_INDEX,
    Batch,
    batches_by_length,
    collate_labels,
    collate_pairs,
    example_batches,
    held_out_windows,
    window_batches,
)
from llm.data.examples import Example
from llm.model.gpt import GPT
from tests.datasets import write_shards
from tests.helpers import gpt_config, randomize

in_one_folder = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# ---- windows ---------------------------------------------------------------------------------------------------------


def rows_of(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in batch.rows]


@in_one_folder
@given(
    n=st.integers(2, 90),
    context_length=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    accumulate=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_each_epoch_reads_disjoint_windows_once(
    tmp_path: Path, n: int, context_length: int, batch_size: int, accumulate: int, seed: int
) -> None:
    tokens = write_shards(tmp_path, list(range(100, 100 + n)), [7, 20])
    if n <= context_length:
        with pytest.raises(InputError, match=f"has {n} tokens, one window needs {context_length + 1}"):
            window_batches(tokens, context_length, batch_size, accumulate, seed)
        return
    batches = window_batches(tokens, context_length, batch_size, accumulate, seed)
    starts: list[int] = []
    for step in range(2 * n // (batch_size * accumulate) + 2):
        micro_batches = batches(step)
        assert len(micro_batches) == accumulate
        for batch in micro_batches:
            assert batch.idx.shape == batch.targets.shape == (batch_size, context_length)
            for idx, targets, start in zip(batch.idx, batch.targets, batch.rows, strict=True):
                assert idx.tolist() == list(range(100 + start, 100 + start + context_length))
                assert targets.tolist() == list(range(101 + start, 101 + start + context_length))
        starts += rows_of(micro_batches)
    possible = (n - 1) // context_length
    per_epoch = max(1, possible - 1)
    for i in range(0, len(starts) - per_epoch + 1, per_epoch):
        epoch = sorted(starts[i : i + per_epoch])
        assert epoch == [epoch[0] + k * context_length for k in range(per_epoch)]  # side by side, each once
    assert min(starts) >= 0 and max(starts) + context_length + 1 <= n


def test_windows_depend_on_seed_and_step_only(tmp_path: Path) -> None:
    tokens = write_shards(tmp_path, list(range(200)), [])
    one, other = (window_batches(tokens, 8, 4, 2, seed=3) for _ in range(2))
    forward = [rows_of(one(step)) for step in range(20)]
    backward = [rows_of(other(step)) for step in reversed(range(20))]
    assert forward == backward[::-1]
    assert forward != [rows_of(window_batches(tokens, 8, 4, 2, seed=4)(step)) for step in range(20)]


def test_epochs_differ_in_offset_and_order_and_reach_every_token(tmp_path: Path) -> None:
    tokens = write_shards(tmp_path, list(range(100)), [])
    batches = window_batches(tokens, 8, 11, 1, seed=0)  # 11 windows are an epoch
    epochs = [rows_of(batches(step)) for step in range(200)]
    assert {min(epoch) for epoch in epochs} == set(range(12))
    assert len({tuple(start - min(epoch) for start in epoch) for epoch in epochs}) == 200
    targets = {int(target) for step in range(200) for target in batches(step)[0].targets.flatten()}
    assert targets == set(range(1, 100))


def test_accumulation_cuts_the_same_windows_differently(tmp_path: Path) -> None:
    tokens = write_shards(tmp_path, list(range(300)), [])
    whole, parts = window_batches(tokens, 8, 12, 1, seed=0), window_batches(tokens, 8, 3, 4, seed=0)
    assert [rows_of(whole(step)) for step in range(9)] == [rows_of(parts(step)) for step in range(9)]


@in_one_folder
@given(n=st.integers(0, 60), context_length=st.integers(1, 12), batch_size=st.integers(1, 5), limit=st.integers(1, 70))
def test_held_out_windows_score_each_token_once(
    tmp_path: Path, n: int, context_length: int, batch_size: int, limit: int
) -> None:
    tokens = write_shards(tmp_path, list(range(100, 100 + n)), [11])
    scored: list[tuple[int, int]] = []
    for batch in held_out_windows(tokens, context_length, batch_size, limit):
        assert batch.idx.shape == batch.targets.shape == (len(batch.rows), context_length)
        assert len(batch.rows) <= batch_size
        counted = batch.targets != IGNORE_INDEX
        scored += zip(batch.idx[counted].tolist(), batch.targets[counted].tolist(), strict=True)
    assert scored == [(100 + i, 101 + i) for i in range(min(limit, max(0, n - 1)))]


# ---- padding ---------------------------------------------------------------------------------------------------------


EXAMPLES = st.lists(
    st.lists(st.integers(0, 60), min_size=2, max_size=17).flatmap(
        lambda ids: st.builds(
            Example, st.just(ids), st.integers(0, len(ids) - 2), st.integers(0, 1), gaps=st.just(()), parts=st.just(())
        )
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40)
@given(examples=EXAMPLES)
def test_padding_changes_no_row_and_no_loss(examples: list[Example]) -> None:
    """A batch of pairs is its rows one by one: the same inputs, targets and summed loss."""
    model = randomize(GPT(gpt_config()))
    batch = collate_pairs(examples, range(len(examples)))
    total = torch.zeros(())
    for row, example in enumerate(examples):
        length = len(example.ids) - 1
        assert batch.idx[row, :length].tolist() == example.ids[:-1]
        assert batch.lengths is not None and batch.lengths[row] == length
        expected = [IGNORE_INDEX] * example.loss_start + example.ids[example.loss_start + 1 :]
        assert batch.targets[row].tolist() == expected + [IGNORE_INDEX] * (batch.idx.shape[1] - length)
        alone = collate_pairs(examples, [row])
        total += F.cross_entropy(model(alone.idx)[0], alone.targets[0], reduction="sum")
    together = F.cross_entropy(model(batch.idx).flatten(0, 1), batch.targets.flatten(), reduction="sum")
    torch.testing.assert_close(together, total, rtol=1e-4, atol=1e-4)


@given(examples=EXAMPLES)
def test_padded_messages_are_their_tokens_lengths_and_labels(examples: list[Example]) -> None:
    batch = collate_labels(examples, range(len(examples)))
    assert batch.lengths is not None
    assert [row[:length].tolist() for row, length in zip(batch.idx, batch.lengths, strict=True)] == [
        example.ids for example in examples
    ]
    assert batch.targets.tolist() == [example.label for example in examples]


# ---- batches of examples ---------------------------------------------------------------------------------------------


def examples_of(lengths: list[int]) -> list[Example]:
    return [Example([row % 200] * length, 0, 0) for row, length in enumerate(lengths)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    batch_size=st.integers(1, 9),
    accumulate=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_each_epoch_reads_an_example_at_most_once(
    lengths: list[int], batch_size: int, accumulate: int, seed: int
) -> None:
    examples = examples_of(lengths)
    batches = example_batches(examples, collate_labels, batch_size, accumulate, seed)
    size = min(batch_size, len(examples))
    per_epoch = len(examples) // size
    found = [batch.rows for step in range(3 * per_epoch) for batch in batches(step)]
    assert all(len(rows) == size for rows in found)
    for i in range(0, len(found), per_epoch):
        epoch = Counter(row for rows in found[i : i + per_epoch] for row in rows)
        assert len(epoch) == per_epoch * size and set(epoch.values()) == {1}
        assert set(epoch) <= set(range(len(examples)))


def test_example_batches_depend_on_seed_and_step_only() -> None:
    examples = examples_of([i % 17 + 1 for i in range(50)])
    one, other = (example_batches(examples, collate_labels, 4, 2, seed=1) for _ in range(2))
    forward = [rows_of(one(step)) for step in range(30)]
    backward = [rows_of(other(step)) for step in reversed(range(30))]
    assert forward == backward[::-1]
    assert forward != [rows_of(example_batches(examples, collate_labels, 4, 2, seed=2)(step)) for step in range(30)]


def test_batches_hold_similar_lengths_and_change_from_epoch_to_epoch() -> None:
    lengths = torch.randint(1, 200, (640,), generator=torch.Generator().manual_seed(0)).tolist()
    examples = examples_of(lengths)
    batches = example_batches(examples, collate_labels, 8, 1, seed=0)
    epochs = [[batches(80 * epoch + i)[0] for i in range(80)] for epoch in range(3)]
    for epoch in epochs:
        read, real = sum(batch.idx.numel() for batch in epoch), sum(lengths)
        assert real <= read < 1.1 * real  # shuffled without sorting, it would be about 1.8 times as much
        widths = [batch.idx.shape[1] for batch in epoch]
        assert 20 < sum(width < following for width, following in pairwise(widths)) < 60  # not from short to long
    compositions = [{frozenset(batch.rows) for batch in epoch} for epoch in epochs]
    assert len(compositions[0] & compositions[1]) < 8
    assert [batch.rows for batch in epochs[1]] != [batch.rows for batch in epochs[2]]


def test_examples_left_over_in_one_epoch_are_read_in_others() -> None:
    batches = example_batches(examples_of([3] * 10), collate_labels, 4, 1, seed=0)  # 2 of 10 wait each time
    assert {row for step in range(20) for row in rows_of(batches(step))} == set(range(10))


def test_no_examples_are_one_clear_line() -> None:
    with pytest.raises(InputError, match="the training split is empty"):
        example_batches([], collate_labels, 4, 1, seed=0)


@given(lengths=st.lists(st.integers(1, 30), max_size=20), batch_size=st.integers(1, 7))
def test_batches_by_length_hold_every_example_once(lengths: list[int], batch_size: int) -> None:
    batches = list(batches_by_length(examples_of(lengths), collate_labels, batch_size))
    rows = rows_of(batches)
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths)
    assert all(len(batch.rows) == batch_size for batch in batches[:-1])


def test_a_batch_on_the_cpu_stays_as_it_is() -> None:
    batch: Any = collate_labels(examples_of([2, 3]), [0, 1])
    assert batch.to(torch.device("cpu")) is batch


def test_a_batch_for_a_gpu_is_copied_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is copied to the device from pinned memory, without waiting."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 100)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: tensor * (-1 if non_blocking else 1))
    tensors = [torch.tensor(number) for number in range(1, 6)]
    batch = Batch(tensors[0], tensors[1], [0], tensors[2], tensors[3], tensors[4], start_layer=5)
    sent = batch.to(torch.device("cuda"))
    assert [sent.idx, sent.targets, sent.lengths, sent.segments, sent.cached_hidden] == [-101, -102, -103, -104, -105]
    assert sent.rows == [0] and sent.start_layer == 5


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_the_parts_of_a_batch_hold_each_row_once(of: int) -> None:
    cached = torch.arange(20).view(5, 2, 2)
    numbers = torch.arange(5)
    whole = Batch(torch.arange(10).view(5, 2), numbers, list(range(5)), numbers, numbers[:, None], cached, 7)
    parts = [whole.shard(index, of) for index in range(of)]
    assert sorted(row for part in parts for row in part.rows) == whole.rows
    for part in parts:
        assert part.lengths is not None and part.rows
        assert part.idx[:, 0].tolist() == [2 * row for row in part.rows]
        assert part.targets.tolist() == part.lengths.tolist() == part.rows
        assert part.segments is not None and part.segments[:, 0].tolist() == part.rows
        assert part.cached_hidden is not None and part.start_layer == 7
        assert part.cached_hidden[:, 0, 0].tolist() == [4 * row for row in part.rows]
    with pytest.raises(InputError, match="a batch of 5 rows is too few for 6 processes; raise batch_size"):
        whole.shard(0, 6)
