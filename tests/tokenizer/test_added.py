"""Added tokens, the tokens around a text and the space before it, against transformers, tokenizers and llama.cpp."""

from __future__ import annotations

import doctest
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, pre_tokenizers, processors
from tokenizers import Tokenizer as Original
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import llm.tokenizer.added
from llm.tokenizer.bpe import Tokenizer, bytes_to_unicode
from llm.tokenizer.gguf import gguf_tokenizer_fields, tokenizer_from_gguf
from llm.tokenizer.hf import read_tokenizer_json, write_tokenizer_json
from llm.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from tests.tokenizer.originals import NASTY, ids_of, imported, original, refused
from tests.tokenizer.test_gguf import LlamaCpp

PLAIN = ["hyperglycemia", "<think>", "</think>", "  ", "    ", "\n\n", "e\u0301", "字", "don't"]
FLAGGED = {
    "<l>": {"lstrip": True},
    "<r>": {"rstrip": True},
    "<b>": {"lstrip": True, "rstrip": True},
    "one": {"single_word": True},
    "é": {"normalized": True},
    "two words": {"normalized": True, "single_word": True},
}
TEXTS = [
    "The patient has hyperglycemia.", "Hyperglycemia, hyperglycemias hyperglycemia", "<think>a</think><think></think>",
    "a  b   c    d      e\n\n\nf\n\n  g", "x <l> y<l>z  <l>", "x<r> y <r>\n z<r>", "a <b> b <b> <b>c \n<b>",
    "one one1 1one _one-one one. onë one\u0301", "e\u0301 é é\u0301 aé", "two words, two wordss", "", " ",
    "<|endoftext|> <think>", "<|endoftext|", "<|im_start|>one<|im_end|>", "<think", "  <l>\u3000<l>\x1c<l>\x85<l>",
    "字字 don't don'ts",
]  # fmt: skip
MIXED = st.lists(
    st.sampled_from(
        [*PLAIN, *FLAGGED, *" \n\tabé1._", "<|endoftext|>", "<|im_end|>", "\u0301", "\u3000", "on", "hyper"]
    ),
    max_size=20,
).map("".join)


def with_tokens(family: str) -> Original:
    tokenizer = Original.from_str(original(family).to_str())
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in PLAIN])
    tokenizer.add_tokens([AddedToken(name, **({"normalized": False} | flags)) for name, flags in FLAGGED.items()])
    return tokenizer


@pytest.fixture(scope="module", params=["gpt-2", "qwen2", "smollm"])
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Original]:
    """A tokenizer with added tokens of every kind: ours, and the original."""
    folder = tmp_path_factory.mktemp("added")
    other = with_tokens(request.param)
    PreTrainedTokenizerFast(tokenizer_object=other, eos_token="<|endoftext|>").save_pretrained(folder)
    return read_tokenizer_json(folder).tokenizer, other


def test_examples() -> None:
    assert doctest.testmod(llm.tokenizer.added).failed == 0


def test_added_tokens_are_found_as_the_original_finds_them(pair: tuple[Tokenizer, Original]) -> None:
    tokenizer, other = pair
    for text in [*TEXTS, *NASTY]:
        assert tokenizer.encode(text) == ids_of(other, text), text
        assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)
        assert tokenizer.encode(text, parse_special=True) == other.encode(text, add_special_tokens=False).ids
        if "é" not in text and "\u0301" not in text and "字" not in text:  # it takes an added é for the name of a byte
            assert tokenizer.decode(tokenizer.encode(text)) == other.decode(
                ids_of(other, text), skip_special_tokens=False
            )
    word = tokenizer.special_tokens["hyperglycemia"]
    assert tokenizer.encode("has hyperglycemia.")[-2:-1] == [word]


@settings(max_examples=80, deadline=None)
@given(text=MIXED)
def test_added_tokens_of_generated_text(pair: tuple[Tokenizer, Original], text: str) -> None:
    assert pair[0].encode(text) == ids_of(pair[1], text)
    assert pair[0].encode(text, parse_special=True) == pair[1].encode(text, add_special_tokens=False).ids


def test_added_tokens_survive_our_files_and_transformers(pair: tuple[Tokenizer, Original], tmp_path: Path) -> None:
    tokenizer = pair[0]
    tokenizer.save(tmp_path / "ours")
    assert Tokenizer.load(tmp_path / "ours") == tokenizer
    write_tokenizer_json(tmp_path / "hf", tokenizer, None, None)
    assert read_tokenizer_json(tmp_path / "hf").tokenizer == tokenizer
    other = AutoTokenizer.from_pretrained(tmp_path / "hf", split_special_tokens=True)
    for text in TEXTS:
        assert other.encode(text) == tokenizer.encode(text), text
    refused(
        lambda: gguf_tokenizer_fields(tokenizer, None, None), "token '(<l>|<r>|<b>|one)' has .*, which GGUF cannot say"
    )


def test_added_tokens_of_gguf_files_are_found_as_llama_cpp_does(tmp_path: Path) -> None:
    base = imported("gpt-2")
    names = ["hyperglycemia", "<think>", "  ", "    ", "\n\n"]
    tokens = base.special_tokens | {name: base.vocab_size + i for i, name in enumerate(names)}
    tokenizer = Tokenizer(base.ranks, base.pattern, tokens, base.eot_token, user_defined=names)
    fields = gguf_tokenizer_fields(tokenizer, None, None)
    assert tokenizer_from_gguf(fields).tokenizer == tokenizer
    llama_cpp = LlamaCpp(tmp_path / "model.gguf", fields)
    for text in [text for text in [*TEXTS, *NASTY] if text]:
        assert llama_cpp.encode(text, add_special=False) == tokenizer.encode(text), text


# ---- folders of slow tokenizers --------------------------------------------------------------------------------------

CLASSES = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2", "GPTNeoXTokenizer": "gpt-2"}
ADDED = {"<think>": True, "</think>": True, "hyperglycemia": False}  # whether a file names it among the special ones


def slow_folder(folder: Path, name: str, config: dict[str, Any]) -> int:
    """A folder with vocab.json and merges.txt; returns the number of tokens in them."""
    original(CLASSES[name]).model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab.setdefault("<|endoftext|>", len(vocab))
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name} | config))
    return len(vocab)


def decoder_of(size: int) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {
        str(size + i): {"content": name, **flags, "special": special} for i, (name, special) in enumerate(ADDED.items())
    }


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("files", ["added_tokens.json", "special_tokens_map.json", "added_tokens_decoder", "all"])
def test_added_tokens_beside_vocab_and_merges(name: str, files: str, tmp_path: Path) -> None:
    size = slow_folder(tmp_path, name, {})
    if files in ("added_tokens_decoder", "all"):
        slow_folder(tmp_path, name, {"added_tokens_decoder": decoder_of(size)})
    if files != "added_tokens_decoder":
        added = {token: size + i for i, token in enumerate(ADDED)}
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    if files in ("special_tokens_map.json", "all"):
        content = {"additional_special_tokens": [token for token, special in ADDED.items() if special]}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(content))
    tokenizer, other = read_tokenizer_json(tmp_path).tokenizer, AutoTokenizer.from_pretrained(tmp_path)
    assert {token: tokenizer.special_tokens[token] for token in ADDED} == {
        token: size + i for i, token in enumerate(ADDED)
    }
    for text in [*TEXTS, *NASTY, "a<think>b hyperglycemia</think> hyperglycemias"]:
        assert tokenizer.encode(text, parse_special=True) == other.encode(text, add_special_tokens=False), text
    if files == "special_tokens_map.json":  # transformers forgets, in some classes, that the file calls them special
        assert all(tokenizer.special_tokens[token] not in tokenizer.encode("a<think>b</think>") for token in ADDED)
        return
    other = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    for text in [*TEXTS, *NASTY, "a<think>b hyperglycemia</think>"]:
        assert tokenizer.encode(text) == other.encode(text, add_special_tokens=False), text


# ---- around a text ---------------------------------------------------------------------------------------------------

END = ("<|endoftext|>", "<|im_end|>")


def processor(first: bool, last: bool, ids: dict[str, int], kind: str = "template") -> Any:
    if kind == "roberta":
        return processors.RobertaProcessing((END[1], ids[END[1]]), (END[0], ids[END[0]]))
    names = [*([END[0]] if first else []), "$A", *([END[1]] if last else [])]
    special = [(name, ids[name]) for name in END]
    template = processors.TemplateProcessing(" ".join(names), " ".join([*names, "$B"]), special)
    if kind == "sequence":
        return processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return template


PROCESSORS = {
    "none": None,
    "bytes": (False, False, "bytes"),
    **{f"{kind}, {first:d}{last:d}": (first, last, kind)
       for kind in ("template", "sequence") for first in (False, True) for last in (False, True)},
    "roberta": (True, True, "roberta"),
}  # fmt: skip
FLAGS = [*itertools.product((None, False, True), repeat=2)]
NAMES = ["TokenizersBackend", "PreTrainedTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer",
         "GPTNeoXTokenizer", "LlamaTokenizer", "LlamaTokenizerFast", None]  # fmt: skip


def flags_of(add_bos: bool | None, add_eos: bool | None) -> dict[str, bool]:
    found = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    return {key: value for key, value in found.items() if value is not None}


@pytest.mark.parametrize("how", PROCESSORS)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_around_a_text_with_a_tokenizer_json(how: str, name: str | None, tmp_path: Path) -> None:
    tokenizer = Original.from_str(original("qwen2" if name == "Qwen2Tokenizer" else "gpt-2").to_str())
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in END])
    ids = {token: tokenizer.token_to_id(token) for token in END}
    if spec := PROCESSORS[how]:
        first, last, kind = spec
        tokenizer.post_processor = (
            processors.ByteLevel(trim_offsets=True) if kind == "bytes" else processor(first, last, ids, kind)
        )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for flags in [(None, None), (True, True)]:  # of no effect
        config = {"bos_token": END[0], "eos_token": END[1], **flags_of(*flags)}
        config |= {} if name is None else {"tokenizer_class": name}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        check_around(tmp_path, export=name == NAMES[0])


def check_around(folder: Path, export: bool = True) -> None:
    found, other = read_tokenizer_json(folder).tokenizer, AutoTokenizer.from_pretrained(folder)
    for text in ("a b", ""):
        assert found.encode(text, add_special_tokens=True) == other.encode(text)
    assert found.eot == other.eos_token_id
    if not export:
        return
    write_tokenizer_json(folder / "out", found, None, None)
    assert AutoTokenizer.from_pretrained(folder / "out").encode("a b") == other.encode("a b")
    assert read_tokenizer_json(folder / "out").tokenizer == found


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("flags", FLAGS)
def test_tokens_around_a_text_without_a_tokenizer_json(name: str, flags: Any, tmp_path: Path) -> None:
    for names in (
        {},
        {"bos_token": "<|endoftext|>"},
        {"eos_token": {"__type": "AddedToken", "content": "<|endoftext|>"}},
    ):
        slow_folder(tmp_path, name, {**names, **flags_of(*flags)})
        check_around(tmp_path)


def test_several_tokens_around_a_text_are_refused(tmp_path: Path) -> None:
    tokenizer = Original.from_str(original("qwen2").to_str())
    special = [(name, tokenizer.token_to_id(name)) for name in END]
    path = tmp_path / "tokenizer.json"
    tokenizer.post_processor = processors.TemplateProcessing(" ".join([*END, "$A"]), None, special)
    tokenizer.save(str(path))
    refused(lambda: read_tokenizer_json(tmp_path), "puts several tokens before or behind a text")
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {END[1]}", None, special)
    tokenizer.save(str(path))
    refused(lambda: read_tokenizer_json(tmp_path), "texts end with <|im_end|>, which is not the eos_token")


def test_gguf_says_which_tokens_are_around_a_text() -> None:
    fields = gguf_tokenizer_fields(imported("qwen2"), None, None)
    fields["tokenizer.ggml.bos_token_id"] = imported("qwen2").special_tokens["<|im_start|>"]
    for bos, eos in FLAGS:
        given = {f"tokenizer.ggml.{key}": value for key, value in flags_of(bos, eos).items()}
        found = tokenizer_from_gguf({key: fields[key] for key in fields if "add_" not in key} | given).tokenizer
        around = [
            [fields[f"tokenizer.ggml.{key}_token_id"]] if flag else [] for key, flag in (("bos", bos), ("eos", eos))
        ]
        assert found.encode("a b", add_special_tokens=True) == [*around[0], *found.encode("a b"), *around[1]]
        assert tokenizer_from_gguf(gguf_tokenizer_fields(found, None, None)).tokenizer == found


# ---- the space before a text -----------------------------------------------------------------------------------------


def test_a_space_before_a_text(tmp_path: Path) -> None:
    tokenizer = with_tokens("gpt-2")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(tmp_path)
    found = read_tokenizer_json(tmp_path).tokenizer
    plain = imported("gpt-2")
    assert found.encode("hello") == plain.encode(" hello") != plain.encode("hello")
    for text in [*TEXTS, *NASTY]:
        assert found.encode(text) == ids_of(tokenizer, text), text
    assert found.decode(found.encode("hello")) == " hello"  # as the original does
    found.save(tmp_path / "ours")
    assert Tokenizer.load(tmp_path / "ours") == found
    write_tokenizer_json(tmp_path / "out", found, None, None)
    other = AutoTokenizer.from_pretrained(tmp_path / "out", split_special_tokens=True)
    assert [other.encode(text) for text in TEXTS] == [found.encode(text) for text in TEXTS]
    slow_folder(tmp_path / "ours", "GPT2Tokenizer", {"add_prefix_space": True})
    (tmp_path / "ours" / "bpe.json").unlink()
    slow = read_tokenizer_json(tmp_path / "ours").tokenizer
    assert (
        slow.encode("hello")
        == AutoTokenizer.from_pretrained(tmp_path / "ours").encode("hello")
        == found.encode("hello")
    )
    refused(lambda: gguf_tokenizer_fields(slow, None, None), "add_prefix_space.* export to hf")


def test_a_space_before_each_piece_is_refused(tmp_path: Path) -> None:
    content = json.loads(original("qwen2").to_str())
    content["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    refused(lambda: read_tokenizer_json(tmp_path), "add_prefix_space, and the text is cut before it")


# ---- GGUF without the name of a pre-tokenizer ------------------------------------------------------------------------


def test_a_gguf_file_without_pre_is_recognised_by_its_vocabulary_or_refused() -> None:
    fields = {family: gguf_tokenizer_fields(imported(family), None, None) for family in ("smollm", "gpt-2")}
    for content in fields.values():
        del content["tokenizer.ggml.pre"]
    assert tokenizer_from_gguf(fields["smollm"]).tokenizer == imported("smollm")  # special tokens with the first ids
    refused(lambda: tokenizer_from_gguf(fields["gpt-2"]), "tokenizer.ggml.pre: missing, and the vocabulary")


KNOWN = [known for known in PRE_TOKENIZERS if known.vocabulary_signs]


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.gguf_names[0])
def test_signs_of_a_vocabulary(known: Any) -> None:
    for token, number in known.vocabulary_signs:
        tokens = ["[PAD]"] * max(number + 1, 300)
        characters = iter(bytes_to_unicode())
        for i in range(len(tokens)):
            tokens[i] = token if i == number else next(characters, f"[PAD{i}]")
        fields = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3 if name == token else 5 if name[1:] else 1 for name in tokens],
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.eos_token_id": number,
            "tokenizer.ggml.add_bos_token": False,
        }
        found = tokenizer_from_gguf(fields).tokenizer
        assert (found.pattern, found.nfc) == (known.pattern, known.nfc)
