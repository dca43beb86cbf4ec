"""What the trainings read: token shards as windows, labelled messages, instruction pairs, and their batches.

Every `batches(step)` made here is a pure function of the seed and the step: a training that stops needs no other memory
of where it was in the data. Shapes: B rows of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm.config import InputError, Template, parse_json
from llm.tokenizer.bpe import END_OF_TEXT, Tokenizer

IGNORE = -100  # a target that does not count


class Batch(NamedTuple):
    idx: Tensor  # [B, T]
    targets: Tensor  # [B, T] next tokens, or [B] labels
    rows: list[int]  # which windows or examples these are, for messages
    lengths: Tensor | None = None  # [B] real tokens of each row, where rows are examples
    lower: Tensor | None = None  # [B, T, C] what the first `n_lower` blocks of a model make of idx, where it is kept
    n_lower: int = 0

    def part(self, index: int, of: int) -> Batch:
        """Every `of`th row from `index` on: what one of several processes reads."""
        if of == 1:
            return self
        if len(self.idx) < of:
            raise InputError(f"a batch of {len(self.idx)} rows is too few for {of} processes; raise batch_size")
        return self._replace(
            idx=self.idx[index::of],
            targets=self.targets[index::of],
            rows=self.rows[index::of],
            lengths=None if self.lengths is None else self.lengths[index::of],
            lower=None if self.lower is None else self.lower[index::of],
        )

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self

        def moved(tensor: Tensor) -> Tensor:
            if device.type == "cuda":
                tensor = tensor.pin_memory()  # from other memory a copy waits for the GPU's work before it
            return tensor.to(device, non_blocking=True)

        return self._replace(
            idx=moved(self.idx),
            targets=moved(self.targets),
            lengths=None if self.lengths is None else moved(self.lengths),
            lower=None if self.lower is None else moved(self.lower),
        )


# ---- raw text --------------------------------------------------------------------------------------------------------


class TokenShards:
    """The tokens of one split of the corpus, memory-mapped from its shard files."""

    def __init__(self, folder: Path, split: str) -> None:
        path = folder / "meta.json"
        try:
            meta = parse_json(path.read_text())
            info = meta["splits"][split]
            self.n_tokens: int = info["tokens"]
            self.n_bytes: int = info["bytes"]  # of the text, without separator tokens
            self.shards = [np.memmap(folder / name, dtype=meta["dtype"], mode="r") for name in info["shards"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: no readable token shards of split {split} ({error!r}); run tokenize") from None
        self.starts: np.ndarray[Any, Any] = np.cumsum([0, *(len(shard) for shard in self.shards)])
        if self.starts[-1] != self.n_tokens:
            raise InputError(
                f"{path}: {split} should hold {self.n_tokens} tokens, found {self.starts[-1]}; run tokenize"
            )

    def read(self, start: int, length: int) -> Tensor:
        """Tokens [length] from position `start`, across shards, as int64."""
        pieces = []
        while length > 0:
            i = int(np.searchsorted(self.starts, start, side="right")) - 1
            piece = self.shards[i][start - self.starts[i] : start - self.starts[i] + length]
            pieces.append(torch.from_numpy(piece.astype(np.int64)))
            start, length = start + len(piece), length - len(piece)
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.long)


def window_batches(
    tokens: TokenShards, context_length: int, batch_size: int, grad_accum_steps: int, seed: int
) -> Callable[[int], list[Batch]]:
    """Training windows: each epoch cuts the tokens at another offset and reads the windows in another order."""
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
            windows = torch.stack([tokens.read(start, context_length + 1) for start in starts])  # [B, T+1]
            result.append(Batch(windows[:, :-1], windows[:, 1:], starts))
        return result

    return batches


def held_out_windows(tokens: TokenShards, context_length: int, batch_size: int, max_tokens: int) -> Iterator[Batch]:
    """Windows side by side over the first `max_tokens` of a split; the last one may be padded with ignored targets."""
    end = min(tokens.n_tokens, max_tokens + 1)
    starts = list(range(0, end - 1, context_length))
    for i in range(0, len(starts), batch_size):
        rows = starts[i : i + batch_size]
        idx = torch.zeros(len(rows), context_length, dtype=torch.long)  # [B, T]
        targets = torch.full_like(idx, IGNORE)
        for b, start in enumerate(rows):
            window = tokens.read(start, min(context_length + 1, end - start))
            idx[b, : len(window) - 1] = window[:-1]
            targets[b, : len(window) - 1] = window[1:]
        yield Batch(idx, targets, rows)


# ---- examples --------------------------------------------------------------------------------------------------------


class Message(NamedTuple):
    text: str
    label: str


class Pair(NamedTuple):
    instruction: str
    input: str
    output: str
    task: str


def read_lines(path: Path) -> list[Any]:
    """What the tokenize stage has written, a JSON value a line."""
    try:
        with path.open(encoding="utf-8") as file:
            return [parse_json(line) for line in file]
    except FileNotFoundError:
        raise InputError(f"{path}: missing; run the tokenize stage first") from None
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); run the tokenize stage again") from None


def read_messages(path: Path) -> list[Message]:
    return [Message(**row) for row in read_lines(path)]


def read_pairs(path: Path) -> list[Pair]:
    return [Pair(**row) for row in read_lines(path)]


def read_labels(folder: Path) -> list[str]:
    """All labels, in the order of the classifier's outputs."""
    [labels] = read_lines(folder / "labels.json")
    return labels


class Example(NamedTuple):
    """Tokens of one message or pair; `counted` says from which position on the next token is a target."""

    ids: list[int]
    counted: int
    label: int


def encode_message(tokenizer: Tokenizer, text: str, max_length: int) -> list[int]:
    """A message's tokens, cut to `max_length`; never empty, since the classifier reads the last one."""
    return tokenizer.encode(text)[:max_length] or [tokenizer.eot]


def message_examples(
    messages: Sequence[Message], tokenizer: Tokenizer, labels: Sequence[str], max_length: int
) -> list[Example]:
    ids = {label: i for i, label in enumerate(labels)}
    return [Example(encode_message(tokenizer, m.text, max_length), 0, ids[m.label]) for m in messages]


def class_weights(examples: Sequence[Example], n_labels: int) -> Tensor:
    """Inverse to each label's frequency, 1 on average over the examples: [labels]."""
    counts = torch.bincount(torch.tensor([example.label for example in examples]), minlength=n_labels)
    if not counts.all():
        raise InputError(f"messages: label {int(counts.argmin())} has no training message, so no class weight")
    return len(examples) / (n_labels * counts)


# Alpaca's template (Taori et al. 2023): the instruction and the response each follow their heading.
ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_INSTRUCTION = "\n\n### Instruction:\n"
ALPACA_RESPONSE = "\n\n### Response:\n"


def encode_prompt(
    tokenizer: Tokenizer, template: Template, instruction: str, input: str = "", system: str | None = None
) -> list[int]:
    """Everything up to where the response starts. What the user wrote never becomes a special token."""
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    if template == "alpaca":
        more = f"\n\n### Input:\n{input}" if input else ""
        return bos + tokenizer.encode(f"{ALPACA_PREAMBLE}{ALPACA_INSTRUCTION}{instruction}{more}{ALPACA_RESPONSE}")
    question = f"{instruction}\n{input}" if input else instruction
    if template == "llama3":
        question = question.strip()  # as in Llama 3's own template
    turns = [("user", question)] if system is None else [("system", system), ("user", question)]
    # A marker of a chat is one token where the tokenizer has it (ours do), its characters where not (GPT-2's).
    names = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    im_start, im_end, header, header_end, eot = (tokenizer.special_tokens.get(name, name) for name in names)
    parts: list[int | str] = []
    for role, text in turns:
        if template == "llama3":
            parts += [header, role, header_end, f"\n\n{text}", eot]
        else:
            parts += [im_start, f"{role}\n{text}", im_end, "\n"]
    parts += [header, "assistant", header_end, "\n\n"] if template == "llama3" else [im_start, "assistant\n"]
    return bos + _encode_parts(tokenizer, parts)


def _encode_parts(tokenizer: Tokenizer, parts: Sequence[int | str]) -> list[int]:
    """Tokens as they are, and what text stands between them encoded as a whole."""
    ids: list[int] = []
    text = ""
    for part in parts:
        if isinstance(part, int):
            ids += [*tokenizer.encode(text), part]
            text = ""
        else:
            text += part
    return ids + tokenizer.encode(text)


def stop_token(tokenizer: Tokenizer, template: Template) -> int:
    """The token that ends a response."""
    name = {"alpaca": tokenizer.end, "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}[template]
    return tokenizer.special_tokens.get(name, tokenizer.eot)


def end_tokens(tokenizer: Tokenizer, template: Template | None) -> set[int]:
    """All tokens that a model may end its text with: the end of a text, and that of a turn in its template."""
    turns = {"chatml": ("<|im_end|>", END_OF_TEXT), "llama3": ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")}
    names = turns.get(template or "", ())
    return {tokenizer.eot, *(tokenizer.special_tokens[name] for name in names if name in tokenizer.special_tokens)}


def pair_examples(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    template: Template,
    mask_prompt: bool,
    max_length: int,
    system: str | None = None,
) -> list[Example]:
    """Prompt, response and stop token of each pair, cut to `max_length` + 1; pairs without room for a response go."""
    examples = []
    for pair in pairs:
        prompt = encode_prompt(tokenizer, template, pair.instruction, pair.input, system)
        ids = [*prompt, *tokenizer.encode(pair.output), stop_token(tokenizer, template)]
        if len(prompt) <= max_length:
            examples.append(Example(ids[: max_length + 1], len(prompt) - 1 if mask_prompt else 0, 0))
    if pairs and not examples:
        raise InputError(
            f"instructions: every one of {len(pairs)} prompts is longer than the context of {max_length} tokens; "
            "take shorter pairs or a larger model.context_length"
        )
    return examples


def collate_labels(examples: Sequence[Example], rows: Sequence[int]) -> Batch:
    """Right-padded messages; the padding is any token, since nothing reads it."""
    chosen = [examples[row] for row in rows]
    lengths = torch.tensor([len(example.ids) for example in chosen])
    idx = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.long)  # [B, T]
    for b, example in enumerate(chosen):
        idx[b, : len(example.ids)] = torch.tensor(example.ids)
    return Batch(idx, torch.tensor([example.label for example in chosen]), list(rows), lengths)


def collate_pairs(examples: Sequence[Example], rows: Sequence[int]) -> Batch:
    """Right-padded pairs; targets are the next tokens, ignored at padding and before `counted`."""
    chosen = [examples[row] for row in rows]
    lengths = torch.tensor([len(example.ids) - 1 for example in chosen])
    idx = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.long)  # [B, T]
    targets = torch.full_like(idx, IGNORE)
    for b, example in enumerate(chosen):
        length = len(example.ids) - 1
        idx[b, :length] = torch.tensor(example.ids[:-1])
        targets[b, example.counted : length] = torch.tensor(example.ids[example.counted + 1 :])
    return Batch(idx, targets, list(rows), lengths)


Collate = Callable[[Sequence[Example], Sequence[int]], Batch]


def example_batches(
    examples: Sequence[Example], collate: Collate, batch_size: int, grad_accum_steps: int, seed: int
) -> Callable[[int], list[Batch]]:
    """Training batches of similar length, in another composition and order each epoch.

    An epoch shuffles the examples, sorts stretches of a few batches by length and shuffles the batches; the few
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
    """All examples once, sorted by length so that little is padding, for evaluation."""
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].ids))
    for i in range(0, len(order), batch_size):
        yield collate(examples, order[i : i + batch_size])
