from __future__ import annotations

import pytest

from llm.tokenizer.bpe import Tokenizer
from tests.datasets import document


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([document(seed) for seed in range(30)], 400)
