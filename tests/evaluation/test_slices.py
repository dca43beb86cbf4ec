"""Bits per byte by kind of text and by position, with losses that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llm.evaluation.base.slices import (
    BLOCK_TOKENS,
    FEWEST_BLOCKS,
    KINDS,
    block_numbers,
    bpb_interval,
    position_nats,
    position_ranges,
    slice_text,
    text_kinds,
)
from llm.evaluation.metrics import Interval
from llm.inference.score import token_nats
from llm.tokenizer.bpe import Tokenizer
from tests.evaluation.models import TEXTS, make_gpt


def by_kind(text: str) -> dict[str, str]:
    """Return the characters of each kind that the text has."""
    kinds = text_kinds(text)
    found = {name: "".join(c for c, k in zip(text, kinds, strict=True) if KINDS[k] == name) for name in KINDS}
    return {name: characters for name, characters in found.items() if characters}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Edgar drew a cherry. He left.", {"prose": "Edgar drew a cherry. He left."}),
        ("Ida wrote: pig, fox, old cow.", {"prose": "Ida wrote:  cow.", "list": "pig, fox, old"}),
        ("On it lay a plum, a clock and the hat.", {"prose": "On it lay .", "list": "a plum, a clock and the hat"}),
        ("In the end, he said, they went home.", {"prose": "In the end, he said, they went home."}),
        ('"Is it calm?" asked Ida. "No."', {"prose": " asked Ida. ", "speech": '"""No."', "question": "Is it calm?"}),
        ("„Wohin?“ Er ging. «Ici.»", {"prose": " Er ging. ", "speech": "„“«Ici.»", "question": "Wohin?"}),
        ("THE WHALE\n\nCall me Ahab,\nhe said.", {"prose": "\n\nCall me Ahab,\nhe said.", "title": "THE WHALE"}),
        ('He said "what\nis that" twice.', {"prose": "He said  twice.", "speech": '"what\nis that"'}),
        ('One " mark.\n\nNot "spoken', {"prose": 'One " mark.\n\n', "title": 'Not "spoken'}),
        ("Wares:\n- old nails\n1. rope\n", {"prose": "Wares:\n\n\n", "list": "- old nails1. rope"}),
        ("Sum.\n12 + 30 = 42\nEnd.", {"prose": "Sum.\n\nEnd.", "numbers_and_signs": "12 + 30 = 42"}),
        ("", {}),
    ],
)
def test_kinds_are_told_by_form(text: str, expected: dict[str, str]) -> None:
    assert by_kind(text) == expected


def test_kinds_share_out_all_bits_and_bytes(tokenizer: Tokenizer) -> None:
    texts = ['"Is the cat here?" The dog sat on the mat, the cat, a rat.', "", "café 😀 \n\n", "12 34 = 5"] * 5
    ids = np.array([i for text in texts for i in [*tokenizer.encode(text), tokenizer.eot]])
    ids = np.append(ids, tokenizer.encode("é")[:1])  # half a character
    nats = np.random.default_rng(0).uniform(0, 3, len(ids) - 1)
    found = slice_text(make_gpt(tokenizer), tokenizer, ids, {"gpt": nats})
    n_bytes = len(tokenizer.decode_bytes(i for i in ids.tolist() if i != tokenizer.eot))
    assert sum(each.n_bytes for each in found.kinds) == found.whole.n_bytes == n_bytes
    assert {"prose", "question", "list", "numbers_and_signs"} <= {each.name for each in found.kinds}
    bits = sum(value(each.bpb["gpt"]) * each.n_bytes for each in found.kinds)
    assert bits == pytest.approx(nats.sum() / math.log(2))
    assert value(found.whole.bpb["gpt"]) == pytest.approx(bits / n_bytes)
    assert isinstance(found.whole.bpb["gpt"], Interval)


def test_losses_go_to_the_kind_they_stand_in(tokenizer: Tokenizer) -> None:
    """Only questions cost something."""
    text = 'The dog sat. "Is the cat here?" The mat is red.'
    ids = np.array([*tokenizer.encode(text), tokenizer.eot] * 20)
    ends = np.cumsum([len(tokenizer.decode_bytes([i])) for i in tokenizer.encode(text)])
    asked = [bool(text.index("Is") < end <= text.index("?") + 1) for end in ends]
    cost = np.array([*asked, False] * 20, dtype=np.float64)[1:]
    found = slice_text(make_gpt(tokenizer), tokenizer, ids, {"gpt": cost})
    costs = {each.name: value(each.bpb["gpt"]) for each in found.kinds}
    assert costs["question"] > 0 and costs["prose"] == costs["speech"] == 0


def test_positions_hold_the_models_losses_in_windows_side_by_side(tokenizer: Tokenizer) -> None:
    model = make_gpt(tokenizer)
    ids = np.array([i for text in TEXTS * 6 for i in [*tokenizer.encode(text), tokenizer.eot]])[:600]
    positions, nats = position_nats(model, ids)
    assert positions.tolist() == [*range(256), *range(256), *range(88)]
    assert nats[[0, 256, 512]].tolist() == [0, 0, 0]
    assert nats[257:512] == pytest.approx(token_nats(model, torch.from_numpy(ids[256:512])))
    found = slice_text(model, tokenizer, ids, {"gpt": np.zeros(599), "ngram": np.ones(599)})
    first = next(each for each in found.positions if each.name == "1-15")
    inside = (positions >= 1) & (positions < 16)
    assert value(first.bpb["gpt"]) == pytest.approx(nats[inside].sum() / math.log(2) / first.n_bytes)
    assert value(first.bpb["ngram"]) == pytest.approx(inside.sum() / math.log(2) / first.n_bytes)


def test_ranges_of_positions_leave_out_the_first_token_alone() -> None:
    ranges = position_ranges(np.arange(600))
    assert list(ranges) == ["1-15", "16-63", "64-127", "128-255", "256-511", "512-1023"]
    assert sum(int(inside.sum()) for inside in ranges.values()) == 599


def test_long_documents_are_resampled_in_blocks() -> None:
    ends = np.zeros(2 * BLOCK_TOKENS + 10, dtype=bool)
    ends[4] = True
    blocks = block_numbers(ends)
    assert blocks[4] == 0 and blocks[5] == 1 and blocks[4 + BLOCK_TOKENS] == 1 and blocks[5 + BLOCK_TOKENS] == 2
    assert np.bincount(blocks).tolist() == [5, BLOCK_TOKENS, BLOCK_TOKENS, 5]


def test_the_interval_covers_the_documents_it_was_not_drawn_from() -> None:
    """Losses of one document are alike: an interval over tokens would be far too narrow."""
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        nats = np.repeat(random.gamma(4.0, 0.25, 60), 50) + random.normal(0, 0.05, 3000)
        found = bpb_interval(nats, np.full(3000, 4), np.repeat(np.arange(60), 50))
        assert isinstance(found, Interval)
        covered += found.low <= 1 / math.log(2) / 4 <= found.high
    assert covered >= 88


def test_few_documents_have_no_interval() -> None:
    n = FEWEST_BLOCKS - 1
    assert bpb_interval(np.ones(n), np.full(n, 2), np.arange(n)) == pytest.approx(1 / math.log(2) / 2)


def value(figure: Interval | float) -> float:
    return figure.value if isinstance(figure, Interval) else figure
