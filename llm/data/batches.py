"""Batches of windows, messages and instruction pairs.

Every `batches(step)` made here is a pure function of the seed and the step: a resume needs no other state of the data.
Shapes: B rows of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm.common.errors import InputError
from llm.data.examples import Example
from llm.data.shards import TokenShards

IGNORE_INDEX = -100  # a target that does not count


class Batch(NamedTuple):
    idx: Tensor  # [B, T]
    targets: Tensor  # [B, T] next tokens, or [B] labels
    rows: list[int]  # the numbers of the windows or examples, for messages
    lengths: Tensor | None = None  # [B] real tokens of each row, where rows are examples
    segments: Tensor | None = None  # [B, T] the number of each token's example, where rows have several
    cached_hidden: Tensor | None = None  # [B, T, C] output of the first `start_layer` blocks, where it is cached
    start_layer: int = 0

    def shard(self, index: int, of: int) -> Batch:
        """Return every `of`th row from `index` on, the part of one of several processes."""
        if of == 1:
            return self
        if len(self.idx) < of:
            raise InputError(f"a batch of {len(self.idx)} rows is too few for {of} processes; raise batch_size")
        return self._replace(
            idx=self.idx[index::of],
            targets=self.targets[index::of],
            rows=self.rows[index::of],
            lengths=None if self.lengths is None else self.lengths[index::of],
            segments=None if self.segments is None else self.segments[index::of],
            cached_hidden=None if self.cached_hidden is None else self.cached_hidden[index::of],
        )

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self

        def moved(tensor: Tensor) -> Tensor:
            if device.type == "cuda":
                tensor = tensor.pin_memory()  # from pageable memory a copy waits for the GPU's earlier work
            return tensor.to(device, non_blocking=True)

        return self._replace(
            idx=moved(self.idx),
            targets=moved(self.targets),
            lengths=None if self.lengths is None else moved(self.lengths),
            segments=None if self.segments is None else moved(self.segments),
            cached_hidden=None if self.cached_hidden is None else moved(self.cached_hidden),
        )


def window_batches(
    tokens: TokenShards, context_length: int, batch_size: int, grad_accum_steps: int, seed: int
) -> Callable[[int], list[Batch]]:
    """Return the training batches of a step; each epoch cuts the windows at another offset and shuffles them anew."""
    per_epoch = (tokens.n_tokens - 1) // context_length
    if per_epoch == 0:
        raise InputError(
            f"corpus: the training part has {tokens.n_tokens} tokens, one window needs {context_length + 1}; "
            "take more text or a smaller model.context_length"
        )
    per_epoch = max(1, per_epoch - 1)  # leaves room for the offset
    spare = tokens.n_tokens - 1 - per_epoch * context_length  # offsets 0 to spare fit

    @lru_cache(maxsize=2)
    def epoch(number: int) -> tuple[int, Tensor]:
        generator = torch.Generator().manual_seed(seed + 1_000_003 * number)
        offset = int(torch.randint(0, spare + 1, (), generator=generator))
        return offset, torch.randperm(per_epoch, generator=generator)

    def batches(step: int) -> list[Batch]:
        result = []
        for micro in range(step * grad_accum_steps, (step + 1) * grad_accum_steps):
            starts = []
            for i in range(micro * batch_size, (micro + 1) * batch_size):
                offset, order = epoch(i // per_epoch)
                starts.append(offset + int(order[i % per_epoch]) * context_length)
            read = np.stack([tokens.read(start, context_length + 1) for start in starts])
            windows = torch.from_numpy(read)  # [B, T+1]
            result.append(Batch(windows[:, :-1], windows[:, 1:], starts))
        return result

    return batches


def held_out_windows(tokens: TokenShards, context_length: int, batch_size: int, max_tokens: int) -> Iterator[Batch]:
    """Yield adjacent windows over the first `max_tokens` of a split; ignored targets pad the last one."""
    end = min(tokens.n_tokens, max_tokens + 1)
    starts = list(range(0, end - 1, context_length))
    for i in range(0, len(starts), batch_size):
        rows = starts[i : i + batch_size]
        idx = torch.zeros(len(rows), context_length, dtype=torch.long)  # [B, T]
        targets = torch.full_like(idx, IGNORE_INDEX)
        for b, start in enumerate(rows):
            window = torch.from_numpy(tokens.read(start, min(context_length + 1, end - start)))
            idx[b, : len(window) - 1] = window[:-1]
            targets[b, : len(window) - 1] = window[1:]
        yield Batch(idx, targets, rows)


def collate_labels(examples: Sequence[Example], rows: Sequence[int]) -> Batch:
    """Collate messages, right-padded with any token, since nothing reads it."""
    chosen = [examples[row] for row in rows]
    lengths = torch.tensor([len(example.ids) for example in chosen])
    idx = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.long)  # [B, T]
    for b, example in enumerate(chosen):
        idx[b, : len(example.ids)] = torch.tensor(example.ids)
    return Batch(idx, torch.tensor([example.label for example in chosen]), list(rows), lengths)


def collate_pairs(examples: Sequence[Example], rows: Sequence[int]) -> Batch:
    """Collate right-padded pairs; targets are the next tokens, ignored at padding, before `loss_start` and in gaps."""
    chosen = [examples[row] for row in rows]
    lengths = torch.tensor([len(example.ids) - 1 for example in chosen])
    idx = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.long)  # [B, T]
    targets = torch.full_like(idx, IGNORE_INDEX)
    for b, example in enumerate(chosen):
        length = len(example.ids) - 1
        idx[b, :length] = torch.tensor(example.ids[:-1])
        targets[b, example.loss_start : length] = torch.tensor(example.ids[example.loss_start + 1 :])
        for start, end in example.gaps:
            targets[b, start:end] = IGNORE_INDEX
    return Batch(idx, targets, list(rows), lengths, _segments(chosen, idx.shape[1]))


def _segments(examples: Sequence[Example], width: int) -> Tensor | None:
    """Return the number of each token's part in packed examples [B, T], padding being one more; None for no packed."""
    if not any(example.parts for example in examples):
        return None
    segments = torch.zeros(len(examples), width, dtype=torch.long)
    for row, example in zip(segments, examples, strict=True):
        for end in accumulate(example.parts):
            row[end:] += 1
    return segments


Collate = Callable[[Sequence[Example], Sequence[int]], Batch]


def example_batches(
    examples: Sequence[Example], collate: Collate, batch_size: int, grad_accum_steps: int, seed: int
) -> Callable[[int], list[Batch]]:
    """Return the training batches of a step, of similar lengths, composed and ordered anew each epoch.

    An epoch shuffles the examples, sorts stretches of a few batches by length and shuffles the batches. The few
    examples that do not fill a batch wait for another epoch.
    """
    if not examples:
        raise InputError("there are no examples to train on: the training split is empty; give more data to tokenize")
    batch_size = min(batch_size, len(examples))
    per_epoch = len(examples) // batch_size
    stretch = 16 * batch_size

    @lru_cache(maxsize=2)
    def epoch(number: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed + 1_000_003 * number)
        order = torch.randperm(len(examples), generator=generator).tolist()[: per_epoch * batch_size]
        rows: list[int] = []
        for i in range(0, len(order), stretch):
            rows += sorted(order[i : i + stretch], key=lambda row: len(examples[row].ids))
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        return [batches[i] for i in torch.randperm(per_epoch, generator=generator).tolist()]

    def batches(step: int) -> list[Batch]:
        numbers = range(step * grad_accum_steps, (step + 1) * grad_accum_steps)
        return [collate(examples, epoch(i // per_epoch)[i % per_epoch]) for i in numbers]

    return batches


def batches_by_length(examples: Sequence[Example], collate: Collate, batch_size: int) -> Iterator[Batch]:
    """Yield all examples once, sorted by length for little padding, for evaluation."""
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].ids))
    for i in range(0, len(order), batch_size):
        yield collate(examples, order[i : i + batch_size])
