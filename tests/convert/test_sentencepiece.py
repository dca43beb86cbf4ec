"""A model with a vocabulary of SentencePiece: saved, exported to transformers and GGUF, read again, and used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llm.api import Model
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, load_checkpoint, save_checkpoint
from llm.convert.gguf import export_gguf, read_gguf
from llm.convert.hf import export_hf, read_hf
from llm.data.examples import encode_message
from llm.evaluation.base.base_model import text_bytes
from llm.model.gpt import GPT
from llm.preprocess.data_card import describe_tokenizer
from llm.tokenizer.gguf import tokenizer_from_gguf
from tests.helpers import LLAMA_FORM, gpt_config, randomize
from tests.tokenizer.test_sentencepiece import SOME, gguf_fields

np = pytest.importorskip("numpy")
SPARE = 3  # rows of the embedding


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    tokenizer = tokenizer_from_gguf(gguf_fields()).tokenizer
    config = gpt_config(**LLAMA_FORM, vocab_size=tokenizer.vocab_size + SPARE)
    return Checkpoint(randomize(GPT(config)), tokenizer, CheckpointConfig(kind="base", gpt=config))


def test_it_goes_out_and_comes_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    save_checkpoint(tmp_path / "ours", checkpoint)
    assert load_checkpoint(tmp_path / "ours", "cpu").tokenizer == checkpoint.tokenizer
    export_gguf(checkpoint, tmp_path / "model.gguf", "f32")
    assert read_gguf(tmp_path / "model.gguf", None).tokenizer == checkpoint.tokenizer
    export_hf(checkpoint, tmp_path / "hf")
    assert read_hf(tmp_path / "hf", None).tokenizer == checkpoint.tokenizer
    other = AutoTokenizer.from_pretrained(tmp_path / "hf", split_special_tokens=True)
    for text in SOME:
        assert other.encode(text) == checkpoint.tokenizer.encode(text, add_special_tokens=True)
    ids = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert (ids["bos_token_id"], ids["eos_token_id"]) == (1, 2)


def test_it_generates_scores_and_describes(checkpoint: Checkpoint) -> None:
    model, tokenizer = Model(checkpoint), checkpoint.tokenizer
    text = model.generate("the cat", max_new_tokens=12)
    assert "".join(model.stream("the cat", max_new_tokens=12)) == text
    assert model.generate_batch(["the cat", "a hat"], max_new_tokens=12)[0] == text
    assert model.score("the cat and the hat").tokens == len(tokenizer.encode("the cat and the hat")) - 1
    assert encode_message(tokenizer, "the cat", 99) == tokenizer.encode("the cat")
    documents = ["the cat", " two  spaces", "字 e\u0301"]
    ids = [number for document in documents for number in (*tokenizer.encode(document), tokenizer.eot)]
    assert text_bytes(tokenizer, np.array(ids))[:3] == [document.encode() for document in documents]
    used = np.ones(tokenizer.vocab_size)
    assert describe_tokenizer("x", tokenizer, used)["vocab_size"] == tokenizer.vocab_size


def test_a_text_cut_in_two_is_encoded_as_one(checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer
    whole = tokenizer.encode("the cat\nthe hat")
    first, second = tokenizer.encode_array("the cat\n"), tokenizer.encode_array("the hat", start=False)
    assert [*first, *second] == whole
    assert tokenizer.encode("the hat") != second.tolist()
