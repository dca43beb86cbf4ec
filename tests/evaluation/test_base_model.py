"""The base model, the n-gram model and xz on one held-out text."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from llm.common.errors import InputError
from llm.evaluation.base.base_model import evaluate_base, text_bytes
from llm.reporting import report
from llm.tokenizer.bpe import Tokenizer
from tests.evaluation.models import TEXTS, make_folder, params, write_corpus


def test_base_is_scored_on_the_bytes_without_separators(tmp_path: Path, tokenizer: Tokenizer) -> None:
    test = ["the dog ran to the mat", "café"]
    write_corpus(tmp_path / "corpus", tokenizer, {"train": TEXTS, "val": ["the cat"], "test": test})
    result = evaluate_base(make_folder(tokenizer), tmp_path / "corpus", params(), seed=1)
    assert result.split == "test"
    assert result.n_bytes == sum(len(text.encode()) for text in test)
    assert result.baseline_bytes == result.train_bytes == sum(map(len, TEXTS))
    n_tokens = sum(len(tokenizer.encode(text)) + 1 for text in test)  # separators are predicted
    assert result.gpt.tokens == result.ngram.tokens == n_tokens - 1
    assert result.gpt.loss == pytest.approx(math.log(tokenizer.vocab_size), rel=0.05)  # an untrained model guesses
    assert result.ngram.loss < 0.9 * result.gpt.loss
    assert [c.prompt for c in result.completions] == ["the cat", ""]
    assert result.ppm_bytes is not None and 0 < result.bpb()["ppm"] == 8 * result.ppm_bytes / result.n_bytes
    assert result.bpb()["xz"] == pytest.approx(8 * result.xz_bytes / result.n_bytes)


def test_base_takes_val_without_a_test_part_and_limits_what_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_corpus(tmp_path / "corpus", tokenizer, {"train": TEXTS, "val": ["the cat sat on the mat"], "test": []})
    result = evaluate_base(
        make_folder(tokenizer), tmp_path / "corpus", params(test_tokens=4, baseline_bytes=100, prompts=[]), seed=1
    )
    assert result.split == "val"
    assert result.gpt.tokens == 3
    assert 50 < result.baseline_bytes < 200
    assert "no test part" in report.part(result.split)


def test_nothing_held_out_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_corpus(tmp_path / "corpus", tokenizer, {"train": TEXTS, "val": [], "test": []})
    with pytest.raises(InputError, match="neither test nor val"):
        evaluate_base(make_folder(tokenizer), tmp_path / "corpus", params(), seed=1)


def test_text_bytes_cuts_at_separators_only(tokenizer: Tokenizer) -> None:
    written = "the <|endoftext|> cat"  # somebody's text, no separator
    ids = np.array([*tokenizer.encode(written), tokenizer.eot, *tokenizer.encode("a dog")])
    assert text_bytes(tokenizer, ids) == [written.encode(), b"a dog"]
