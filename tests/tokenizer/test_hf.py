"""Tokenizers of Hugging Face in and out, against transformers and tokenizers, and files that are wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer as Original
from transformers import AutoTokenizer

from llm.common.errors import InputError
from llm.tokenizer.bpe import FILE_NAME, Tokenizer
from llm.tokenizer.hf import read_tokenizer_json, write_tokenizer_json
from llm.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from tests.helpers import tiny_tokenizer
from tests.tokenizer.originals import (
    FAMILIES,
    NASTY,
    TEXTS,
    end_of,
    every_kind_of_character,
    ids_of,
    imported,
    original,
    refused,
    save_original,
    tokenizers_of_all_kinds,
    trained_here,
)

# ---- in --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_originals(family: str) -> None:
    tokenizer, other = imported(family), original(family)
    assert tokenizer.vocab_size == other.get_vocab_size()
    for text in [*NASTY, *every_kind_of_character()]:
        if family == "qwen2":  # its <tool_call> is not special, and the original finds it in any text
            text = text.replace("<tool_call>", "")
        ids = tokenizer.encode(text)
        assert ids == ids_of(other, text), text[:80]
        assert tokenizer.encode_array(text).tolist() == ids
        assert tokenizer.decode(ids) == other.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=TEXTS)
@settings(max_examples=60, deadline=None)
def test_ids_of_generated_text_are_the_originals(family: str, text: str) -> None:
    assert imported(family).encode(text) == ids_of(original(family), text)


def test_special_tokens_have_their_ids_and_never_come_from_text() -> None:
    for family in FAMILIES:
        tokenizer, added = imported(family), original(family).get_added_tokens_decoder()
        assert tokenizer.special_tokens == {token.content: number for number, token in added.items()}
        assert tokenizer.eot_token == end_of(family)
        for name, number in tokenizer.special_tokens.items():
            found = tokenizer.encode(f"a{name} {name}").count(number)
            assert found == (2 if name == "<tool_call>" else 0)  # the one that is not special
            assert tokenizer.encode(f"a{name} {name}", parse_special=True).count(number) == 2
            assert tokenizer.decode([number]) == name
    assert imported("qwen2").user_defined == ["<tool_call>"]


def test_the_token_before_each_text() -> None:
    assert imported("llama-bpe").bos_token == "<|begin_of_text|>"
    assert imported("tekken").bos_token == "<s>"
    assert {imported(family).bos_token for family in FAMILIES if family not in ("llama-bpe", "tekken")} == {None}


@pytest.mark.parametrize("known", PRE_TOKENIZERS, ids=lambda known: known.gguf_names[0])
def test_a_million_characters_without_a_break(known: Any) -> None:
    tokenizer = Tokenizer([bytes([byte]) for byte in range(256)], known.pattern, {"<|endoftext|>": 256})
    for unit in ("a", " ", "\x00", "\u3040"):
        text = unit * 1_000_000 + "x"
        assert tokenizer.encode_array(text).astype("u1").tobytes() == text.encode(), "a token is a byte"


def test_texts_are_composed_where_the_original_does() -> None:
    tokenizer = imported("qwen2")
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "é"
    other = imported("llama-bpe")
    assert other.decode(other.encode("e\u0301")) == "e\u0301"


def test_bytes_without_a_token_are_left_out_before_merging(tmp_path: Path) -> None:
    tokenizer, other = imported("smollm"), original("smollm")
    assert b"\x04" in tokenizer.missing_bytes and b"\xf1" in tokenizer.missing_bytes
    joined = "!\x04!\x04!\x04!"
    assert tokenizer.encode(joined) == tokenizer.encode("!!!!") == ids_of(other, joined)
    assert len(tokenizer.encode(joined)) < 4
    assert tokenizer.encode("a\x04a") == ids_of(other, "a\x04a")  # two words, not one
    assert tokenizer.encode("\x04\x06") == tokenizer.encode_array("\x04\x06").tolist() == []
    assert tokenizer.decode(tokenizer.encode("!\x04?")) == "!?"
    assert len(tokenizer.encode("\x04!" * 100_000)) == len(tokenizer.encode("!" * 100_000))
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode(joined) == tokenizer.encode(joined)
    content = json.loads((tmp_path / FILE_NAME).read_text())
    (tmp_path / FILE_NAME).write_text(json.dumps({**content, "missing_bytes": [4]}))
    with pytest.raises(InputError, match="must hold each byte"):
        Tokenizer.load(tmp_path)


def test_a_model_folder_keeps_it_all(tmp_path: Path) -> None:
    for family in FAMILIES:
        imported(family).save(tmp_path)
        assert Tokenizer.load(tmp_path) == imported(family)
    imported("qwen2").save(tmp_path)
    assert Tokenizer.load(tmp_path).encode("e\u0301") == imported("qwen2").encode("é")


def test_a_piece_that_is_a_token_needs_no_merges(tmp_path: Path) -> None:
    """Llama 3's file lists every pair that makes a token, and tokens that none does; a word that is one stays whole."""
    save_original(tmp_path, "llama-bpe")
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    size, added = len(vocab), content["added_tokens"]
    vocab |= {"zx": size, "xq": size + 1, "zxq": size + 2, "qzxqz": size + 3}  # nothing leaves zxq with the last z
    content["model"]["merges"] += [["z", "x"], ["x", "q"], ["z", "xq"], ["zx", "q"]]
    content["added_tokens"] = [{**token, "id": size + 4 + i} for i, token in enumerate(added)]
    content["post_processor"]["special_tokens"]["<|begin_of_text|>"]["ids"] = [size + 4]
    path.write_text(json.dumps(content))
    tokenizer, other = read_tokenizer_json(tmp_path).tokenizer, Original.from_file(str(path))
    for text in ["qzxqz", " qzxqz", "qzxqzx", "zxqzxq", "qzx", "zxqzx xqzx"]:
        assert tokenizer.encode(text) == ids_of(other, text)
    assert tokenizer.encode("qzxqz") == [size + 3]
    write_tokenizer_json(tmp_path / "out", tokenizer, None, None)
    again = Original.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert ids_of(again, "qzxqz") == [size + 3]
    with pytest.raises(InputError, match="no merge makes token"):
        path.write_text(json.dumps({**content, "model": {**content["model"], "ignore_merges": False}}))
        read_tokenizer_json(tmp_path)


def test_gpt2s_two_files(tmp_path: Path) -> None:
    original("gpt-2").model.save(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    vocab["<|endoftext|>"] = len(vocab)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = read_tokenizer_json(tmp_path).tokenizer
    assert tokenizer.special_tokens == {"<|endoftext|>": len(vocab) - 1}
    for text in NASTY:
        assert tokenizer.encode(text) == ids_of(original("gpt-2"), text)


def test_the_end_token_is_taken_from_where_it_is_named(tmp_path: Path) -> None:
    save_original(tmp_path, "smollm")
    names = {"tokenizer_config.json": {"eos_token": {"content": "<|im_start|>"}}}
    names |= {"special_tokens_map.json": {"eos_token": "<|im_end|>"}}
    ids = imported("smollm").special_tokens
    names |= {"generation_config.json": {"eos_token_id": [ids["<|im_start|>"], ids["<|im_end|>"]]}}
    names |= {"config.json": {"eos_token_id": ids["<|im_end|>"]}}
    for name, content in names.items():
        for old in names:
            (tmp_path / old).unlink(missing_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
        expected = "<|im_end|>" if name in ("special_tokens_map.json", "config.json") else "<|im_start|>"
        assert read_tokenizer_json(tmp_path).tokenizer.eot_token == expected
    (tmp_path / "config.json").unlink()
    assert read_tokenizer_json(tmp_path).tokenizer.eot_token == "<|endoftext|>"


# ---- out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tokenizers_of_all_kinds())
def test_autotokenizer_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizers_of_all_kinds()[name]
    write_tokenizer_json(tmp_path, tokenizer, None, None)
    other = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    assert len(other) == tokenizer.vocab_size
    for text in [*NASTY, *every_kind_of_character()[::5]]:
        text = text.replace("<tool_call>", "") if name == "qwen2" else text
        assert other.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    for text in NASTY:
        assert other.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert other("a b")["input_ids"] == [*([] if tokenizer.bos is None else [tokenizer.bos]), *tokenizer.encode("a b")]
    pad = tokenizer.special_tokens.get("<|endoftext|>", tokenizer.eot)
    assert (other.eos_token, other.eos_token_id, other.pad_token_id) == (tokenizer.eot_token, tokenizer.eot, pad)
    assert other.bos_token == tokenizer.bos_token or tokenizer.bos_token is None
    whole = AutoTokenizer.from_pretrained(tmp_path)
    for special, number in tokenizer.special_tokens.items():
        assert whole.encode(special, add_special_tokens=False) == [number]
        assert whole.decode([number], skip_special_tokens=True) == (special if special == "<tool_call>" else "")


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_a_model_beside_it_does_not_change_the_ids(model_type: str, tmp_path: Path) -> None:
    # Beside a model of type qwen2, transformers 5 cuts a text as Qwen does, whatever tokenizer.json says.
    tokenizer = imported("qwen2") if model_type == "qwen2" else trained_here()
    write_tokenizer_json(tmp_path, tokenizer, "chatml", None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    other = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    for text in NASTY:
        assert other.encode(text.replace("<tool_call>", "")) == tokenizer.encode(text.replace("<tool_call>", ""))


@pytest.mark.parametrize("name", tokenizers_of_all_kinds())
def test_writing_and_reading_gives_the_same_tokenizer(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizers_of_all_kinds()[name]
    write_tokenizer_json(tmp_path / "hf", tokenizer, "chatml", 'Answer with "{{ x }}" \\n and 🙂.\n')
    found = read_tokenizer_json(tmp_path / "hf")
    assert found[1:] == ("chatml", 'Answer with "{{ x }}" \\n and 🙂.\n')
    tokenizer.save(tmp_path / "a")
    found.tokenizer.save(tmp_path / "b")
    assert (tmp_path / "a" / FILE_NAME).read_bytes() == (tmp_path / "b" / FILE_NAME).read_bytes()


# ---- what can be wrong -----------------------------------------------------------------------------------------------


def change(content: Any, keys: tuple[Any, ...], value: Any) -> Any:
    content = copy.deepcopy(content)
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return content


SENTENCEPIECE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("model", "type"), "Unigram", "a Unigram tokenizer; only byte-level BPE"),
        (("model", "type"), "WordPiece", "a WordPiece tokenizer"),
        (("model", "byte_fallback"), True, "SentencePiece's BPE with a normalizer or pre_tokenizer that is not known"),
        (("model", "end_of_word_suffix"), "</w>", "end_of_word_suffix '</w>' has no place"),
        (("model", "dropout"), 0.1, "model.dropout 0.1"),
        (("model", "merges"), None, "not a tokenizer"),
        (("model", "merges"), [["a", "b", "c"]], "not a tokenizer"),
        (("model", "merges"), [["a", "ƀƀ"]], "merge 0 a ƀƀ is of tokens that it has not"),
        (("model", "merges"), [], "no merge makes token"),
        (("model", "vocab", "▁the"), 5000, "token 5000 '▁the' is not byte-level"),
        (("model", "vocab", ""), 5000, "token 5000 '' is not byte-level"),
        (("model", "vocab", "the!"), 5, "have the same id 5"),
        (("model", "vocab", "the!"), -1, "has the id -1"),
        (("model", "vocab", "the!"), 10**12, "has the id 1000000000000"),
        (("model", "vocab", "<|endoftext|>"), 5000, "has the ids"),
        (("model", "vocab"), ["a"], "not a tokenizer"),
        (("model",), None, "not a tokenizer"),
        (("added_tokens",), [{"content": "x"}], "not a tokenizer"),
        (("added_tokens",), [], "the eos_token <|endoftext|> is not among its special tokens"),
        (("post_processor",), {"type": "TemplateProcessing", "single": []}, "not a tokenizer"),
        (("normalizer",), {"type": "Lowercase"}, 'the normalizer {"type": "Lowercase"} is not known'),
        (("normalizer",), {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}, "NFKC"),
        (("pre_tokenizer",), None, "not byte-level|pre_tokenizer has"),
        (("pre_tokenizer",), SENTENCEPIECE, "pre_tokenizer has .*Metaspace"),
        (("pre_tokenizer",), {"type": "Digits", "individual_digits": True}, "does not end in ByteLevel"),
    ],
)
def test_a_wrong_tokenizer_json_is_one_line(keys: tuple[Any, ...], value: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    content = json.loads(original("gpt-2").to_str())
    path.write_text(json.dumps(change(content, keys, value)))
    refused(lambda: read_tokenizer_json(tmp_path), rf"tokenizer\.json: .*({message})")


def test_files_that_are_damaged_or_absent(tmp_path: Path) -> None:
    refused(lambda: read_tokenizer_json(tmp_path), "no tokenizer.json, and no vocab.json")
    (tmp_path / "tokenizer.model").write_bytes(b"\0text")
    refused(lambda: read_tokenizer_json(tmp_path), r"tokenizer\.model: no model of SentencePiece")
    (tmp_path / "tokenizer.model").unlink()
    save_original(tmp_path, "gpt-2")
    path = tmp_path / "tokenizer.json"
    good = path.read_bytes()
    for bad in (good[: len(good) // 2], b"\xff\xfe", b"[]", b""):
        path.write_bytes(bad)
        refused(lambda: read_tokenizer_json(tmp_path), r"tokenizer\.json: ")
    path.write_bytes(good)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 5}')
    refused(lambda: read_tokenizer_json(tmp_path), "chat_template: expected text, found 5")
    (tmp_path / "tokenizer_config.json").write_text("{")
    refused(lambda: read_tokenizer_json(tmp_path), r"tokenizer_config\.json: not valid JSON")


def test_other_cuts_and_orders_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    save_original(tmp_path, "qwen2")
    content = json.loads(path.read_text())
    path.write_text(path.read_text().replace("'s|'t|", "'s|'T|"))
    refused(lambda: read_tokenizer_json(tmp_path), "splits a text in a way that is not known here")
    split = content["pre_tokenizer"]["pretokenizers"][0]
    for key, value in {"behavior": "Removed", "invert": True, "pattern": {"String": " "}}.items():
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [{**split, key: value}]}
        path.write_text(json.dumps({**content, "pre_tokenizer": pre_tokenizer}))
        refused(lambda: read_tokenizer_json(tmp_path), "its pre_tokenizer has")
    merges = content["model"]["merges"]
    path.write_text(json.dumps(change(content, ("model", "merges"), [merges[1], merges[0], *merges[2:]])))
    refused(lambda: read_tokenizer_json(tmp_path), "has a lower id than one before it")


def test_an_unknown_token_and_missing_bytes_do_not_go_together(tmp_path: Path) -> None:
    content = json.loads(original("smollm").to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(change(content, ("model", "unk_token"), "<|endoftext|>")))
    refused(lambda: read_tokenizer_json(tmp_path), "unk_token")


def test_a_pattern_of_another_version_is_named(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny_tokenizer().ranks, r"\s+|\S+", tiny_tokenizer().special_tokens)
    refused(lambda: write_tokenizer_json(tmp_path, tokenizer, None, None), "its pattern is of another version")
