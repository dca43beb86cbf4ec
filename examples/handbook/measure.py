"""Print what the recipe `domain` changed: text predicted in the domain and out of it, questions answered.

    python examples/handbook/measure.py .work/sample

The folder holds the sample's `base`, `instruct` and `corpus`, copied before the recipe ran.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path

import torch

import llm
from llm.data.shards import TokenShards
from llm.evaluation.metrics import exact_matches, share_interval
from llm.inference.score import score_tokens

MOST_TOKENS = 5_000  # of each held-out text


def held_out_bpb(base: Path, corpus: Path) -> float:
    """Return the bits per byte of a base model on the test split of a corpus."""
    model = llm.load(base)
    shards = TokenShards(corpus, "test")
    ids, tokenizer = shards.read(0, min(MOST_TOKENS, shards.n_tokens)), model.checkpoint.tokenizer
    text = tokenizer.decode_bytes(id for id in ids.tolist() if id != tokenizer.eot)
    return score_tokens(model.gpt, torch.from_numpy(ids)).bpb(len(text))


def answered(instruct: Path, questions: Path) -> dict[str, str]:
    """Return, for each task, how many held-out questions are answered word for word, and how many but for one word."""
    model = llm.load(instruct)
    answers: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in map(json.loads, questions.read_text(encoding="utf-8").splitlines()):
        answer = model.chat([{"role": "user", "content": row["instruction"], "input": row["input"]}])
        answers[row["task"]].append((answer, row["output"]))
    return {task: describe(found) for task, found in sorted(answers.items())}


def describe(answers: list[tuple[str, str]]) -> str:
    """Return the number of right answers with its 95 % interval, for pairs of answer and expected answer."""
    right = sum(exact_matches(*zip(*answers, strict=True)))
    share = share_interval(right, len(answers))
    nearly = sum(differs_in_a_word(answer, expected) for answer, expected in answers)
    return f"{right} of {len(answers)} ({100 * share.low:.1f}-{100 * share.high:.1f} %; {nearly} more but for one word)"


def differs_in_a_word(answer: str, expected: str) -> bool:
    """Return whether an answer has the right form and one wrong word, such as a number."""
    pairs = list(zip_longest(answer.split(), expected.split()))
    return len(pairs) > 1 and sum(one != other for one, other in pairs) == 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the models of the recipe domain against the sample's.")
    parser.add_argument("before", type=Path, help="folder with the sample's base, instruct and corpus")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder with base and instruct")
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"), help="output of the tokenize stage")
    args = parser.parse_args()
    for title, corpus in (("handbook", args.tokens / "corpus"), ("sample's stories", args.before / "corpus")):
        before, after = (held_out_bpb(folder / "base", corpus) for folder in (args.before, args.models))
        print(f"{title}, bits per byte: {before:.3f} before, {after:.3f} after")
    questions = args.tokens / "instructions" / "test.jsonl"
    before_by_task, after_by_task = (answered(folder / "instruct", questions) for folder in (args.before, args.models))
    for task in after_by_task:
        print(f"{task}, answered: {before_by_task[task]} before, {after_by_task[task]} after")


if __name__ == "__main__":
    main()
