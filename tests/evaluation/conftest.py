from __future__ import annotations

import pytest

from llm.tokenizer.bpe import Tokenizer
from tests.evaluation.models import TEXTS


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 280)
