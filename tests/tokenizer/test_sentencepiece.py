"""SentencePiece's BPE from tokenizer.model, tokenizer.json and GGUF, against transformers, tokenizers and llama.cpp."""

from __future__ import annotations

import io
import json
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Original
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from llm.inference.generate import stream_text
from llm.tokenizer.bpe import FILE_NAME, Tokenizer
from llm.tokenizer.gguf import gguf_tokenizer_fields, tokenizer_from_gguf
from llm.tokenizer.hf import read_tokenizer_json, write_tokenizer_json
from llm.tokenizer.own_template import OwnTemplate
from tests.tokenizer.originals import NASTY, TEXTS, every_kind_of_character, ids_of, refused
from tests.tokenizer.test_gguf import LlamaCpp

LINES = [line for text in NASTY for line in text.split("\n") if len(line) < 400] + [
    "the cat and the hat and the baker of the hill town",
    "don't say  two spaces   or three, say ▁one",
    "    indented by four and the   rest",
] * 8
CONTROL, USER = ["<|im_start|>", "<|im_end|>"], ["<think>", "hyper glycemia"]
SPACES = ["", " ", "  ", " a", "  a b ", "a  b", "▁", "▁a", " ▁ a", "\n", "\n\n a\n b", "a\tb", "\u3000a", "\x00 \x7f"]
MARKED = [
    "<think> a</think>",
    "a<think>b <think><think>",
    "<s>a</s> <unk><|im_start|>user",
    "a hyper glycemia b",
    "<0x0A>",
]
EVERY = [*NASTY, *SPACES, *MARKED, *every_kind_of_character()]
SOME = [*NASTY, *SPACES, *MARKED, *every_kind_of_character()[::5]]


@lru_cache
def model_bytes(**options: Any) -> bytes:
    """A model of SentencePiece as Llama's are: BPE, byte fallback, no normalization."""
    out = io.BytesIO()
    given = {
        "vocab_size": 700, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True,
        "character_coverage": 0.98, "control_symbols": CONTROL, "user_defined_symbols": USER, "num_threads": 1,
        "minloglevel": 2, "hard_vocab_limit": False,
    }  # fmt: skip
    given |= {key: [*value] if isinstance(value, tuple) else value for key, value in options.items()}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=out, **given)
    return out.getvalue()


def save_model(folder: Path, config: dict[str, Any], **options: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model_bytes(**options))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@lru_cache
def processor(**options: Any) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model_bytes(**options))


@lru_cache
def merges_by_score() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges as transformers makes them of a tokenizer.model."""
    message = sentencepiece_model_pb2.ModelProto()
    message.ParseFromString(model_bytes())
    ids = {piece.piece: i for i, piece in enumerate(message.pieces)}
    normal = {piece.piece for piece in message.pieces if piece.type == 1}
    pairs = [
        (-piece.score, n, piece.piece[:n], piece.piece[n:])
        for piece in message.pieces if piece.type == 1
        for n in range(1, len(piece.piece))
        if {piece.piece[:n], piece.piece[n:]} <= normal
    ]  # fmt: skip
    return ids, [(left, right) for _, _, left, right in sorted(pairs)]


FORMS: dict[str, Any] = {
    "prepend": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None,
    ),
    "never": (normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")),
    "replace": (normalizers.Sequence([normalizers.Replace(" ", "▁")]), None),
    "first": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "always": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
    "metaspace never": (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False)),
    "split": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=True)),
}  # fmt: skip


@lru_cache
def original(form: str) -> Original:
    """A tokenizer.json of Llama's kind, whose spaces are marked in one of the ways that are found in models."""
    ids, merges = merges_by_score()
    tokenizer = Original(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    normalizer, pre_tokenizer = FORMS[form]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", left=1)] if form in ("prepend", "first", "always", "split") else []
    tokenizer.decoder = decoders.Sequence([*parts, *strip])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>", *CONTROL)]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in USER])
    tokenizer.add_tokens(
        [AddedToken("the baker", normalized=True), AddedToken("rr", normalized=False, single_word=True)]
    )
    return tokenizer


@lru_cache
def imported(form: str) -> Tokenizer:
    with TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=original(form), eos_token="</s>").save_pretrained(folder)
        return read_tokenizer_json(Path(folder)).tokenizer


@pytest.mark.parametrize("form", FORMS)
def test_ids_and_texts_are_the_originals(form: str, tmp_path: Path) -> None:
    tokenizer, other = imported(form), original(form)
    assert (tokenizer.eot_token, tokenizer.bos_token) == ("</s>", "<s>")
    for text in [*EVERY, "say the baker's", "a the baker rr rrr r rr."]:
        ids = tokenizer.encode(text)
        assert ids == ids_of(other, text), text[:80]
        assert tokenizer.encode_array(text).tolist() == ids
        assert tokenizer.decode(ids) == other.decode(ids, skip_special_tokens=False)
        assert tokenizer.encode(text, parse_special=True) == other.encode(text, add_special_tokens=False).ids
        assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode_bytes(ids).decode(errors="replace")
    assert tokenizer.encode("a", add_special_tokens=True) == other.encode("a").ids


@pytest.mark.parametrize("form", FORMS)
@given(text=TEXTS)
@settings(max_examples=60, deadline=None)
def test_ids_of_generated_text_are_the_originals(form: str, text: str) -> None:
    assert imported(form).encode(text) == ids_of(original(form), text)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_saved_and_goes_out_as_it_came_in(form: str, tmp_path: Path) -> None:
    tokenizer = imported(form)
    tokenizer.save(tmp_path / "ours")
    assert Tokenizer.load(tmp_path / "ours") == tokenizer
    write_tokenizer_json(tmp_path / "hf", tokenizer, None, None)
    other = AutoTokenizer.from_pretrained(tmp_path / "hf", split_special_tokens=True)
    assert len(other) == tokenizer.vocab_size
    for text in SOME:
        assert other.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert other.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert other.encode("a b") == tokenizer.encode("a b", add_special_tokens=True)
    assert (other.bos_token, other.eos_token) == ("<s>", "</s>")
    assert read_tokenizer_json(tmp_path / "hf").tokenizer == tokenizer


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
        {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": True, "legacy": False},
        {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True},
        {"tokenizer_class": "LlamaTokenizer", "legacy": None, "add_eos_token": True},
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": True, "legacy": True},
        {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
    ],
)
def test_a_tokenizer_model_gives_what_transformers_makes_of_it(config: dict[str, Any], tmp_path: Path) -> None:
    save_model(tmp_path, config)
    tokenizer, other = read_tokenizer_json(tmp_path).tokenizer, AutoTokenizer.from_pretrained(tmp_path)
    for text in SOME:
        if not any(name in text for name in ("<s>", "</s>", "<unk>", *CONTROL)):
            ids = tokenizer.encode(text, add_special_tokens=True)
            assert ids == other.encode(text), text[:80]
            assert tokenizer.decode(ids) == other.decode(ids)
    assert tokenizer.encode("<s>a<|im_end|> b", parse_special=True) == other.encode(
        "<s>a<|im_end|> b", add_special_tokens=False
    )


def test_a_tokenizer_model_alone_gives_the_ids_of_sentencepiece(tmp_path: Path) -> None:
    save_model(tmp_path, {})
    tokenizer = read_tokenizer_json(tmp_path).tokenizer
    for text in SOME:
        if not any(name in text for name in USER) and "\x00" not in text:  # behind one of them a space comes too
            assert tokenizer.encode(text) == processor().encode(text), text[:80]
            assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")
    save_model(tmp_path, {}, add_dummy_prefix=False)
    tokenizer = read_tokenizer_json(tmp_path).tokenizer
    for text in SOME:
        if "\x00" not in text and USER[1] not in text:  # it finds no symbol with a space
            assert tokenizer.encode(text) == processor(add_dummy_prefix=False).encode(text), text[:80]


def gguf_fields(**more: Any) -> dict[str, Any]:
    """The metadata that llama.cpp's converter makes of a tokenizer.model."""
    message = sentencepiece_model_pb2.ModelProto()
    message.ParseFromString(model_bytes())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece.piece for piece in message.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in message.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in message.pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **more,
    }


@pytest.mark.parametrize("space", [True, False])
def test_gguf_gives_the_ids_of_llama_cpp(space: bool, tmp_path: Path) -> None:
    fields = gguf_fields(**{"tokenizer.ggml.add_space_prefix": space, "tokenizer.ggml.add_eos_token": space})
    tokenizer = tokenizer_from_gguf(fields).tokenizer
    llama_cpp = LlamaCpp(tmp_path / "model.gguf", fields)
    texts = [text for text in SOME if text and "\x00" not in text]
    for text in texts:
        assert llama_cpp.encode(text, add_special=False) == tokenizer.encode(text), text[:80]
    assert llama_cpp.encode("Hi", add_special=True) == tokenizer.encode("Hi", add_special_tokens=True)
    assert tokenizer.encode("Hi", add_special_tokens=True)[0] == 1
    out = gguf_tokenizer_fields(tokenizer, None, None)
    assert tokenizer_from_gguf(json.loads(json.dumps(out))).tokenizer == tokenizer
    again = LlamaCpp(tmp_path / "again.gguf", out)
    for text in texts:
        assert again.encode(text, add_special=False) == tokenizer.encode(text), text[:80]


@pytest.mark.parametrize("form", ["prepend", "never"])
def test_an_export_to_gguf_keeps_the_ids(form: str, tmp_path: Path) -> None:
    ids, _ = merges_by_score()
    tokenizer = imported(form)
    refused(lambda: gguf_tokenizer_fields(tokenizer, None, None), "its token 'rr' has single_word")
    refused(lambda: gguf_tokenizer_fields(imported("split"), None, None), "single_word|each space")
    plain = tokenizer_from_gguf(gguf_fields(**{"tokenizer.ggml.add_space_prefix": form == "prepend"})).tokenizer
    assert plain.form.pieces == tokenizer.form.pieces
    assert [plain.encode(text) for text in NASTY[:13]] == [tokenizer.encode(text) for text in NASTY[:13]]
    assert len(ids) == plain.vocab_size


def test_long_texts_without_a_space() -> None:
    for form in ("prepend", "split"):
        tokenizer = imported(form)
        for unit in ("a", " ", "\n", "字", "ab", "\x04"):
            text = unit * (200_000 // len(unit))
            found = tokenizer.decode(tokenizer.encode_array(text).tolist())
            assert found == text[1:] if form == "split" and unit == " " else text


def test_pieces_with_a_space_inside_merge_across_it(tmp_path: Path) -> None:
    save_model(tmp_path, {"tokenizer_class": "LlamaTokenizer"}, split_by_whitespace=False, user_defined_symbols=())
    tokenizer, other = read_tokenizer_json(tmp_path).tokenizer, LlamaTokenizer.from_pretrained(tmp_path)
    inner = [token for token in tokenizer.ranks if token and "▁" in token.decode().lstrip("▁")]
    assert inner
    for text in [*LINES[-3:], *NASTY]:
        assert tokenizer.encode(text) == other.encode(text, split_special_tokens=True) or "<" in text
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ").removeprefix(
            " " * text.startswith(" ")
        )


# ---- chats -----------------------------------------------------------------------------------------------------------

INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + '\n' + m.content + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' + '\n' }}{% endif %}"
)
CHATS = [
    [{"role": "user", "content": "Is it  cold?"}],
    [{"role": "user", "content": " a\nb "}, {"role": "assistant", "content": "No, 'tis warm."}] * 2,
    [{"role": "user", "content": "<s>the </s> cat<|end|> \n"}],
]


@pytest.mark.parametrize("form", ["prepend", "first", "always", "never"])
@pytest.mark.parametrize("template", [INST, PHI])
def test_chats_of_its_own_template_are_those_of_transformers(form: str, template: str, tmp_path: Path) -> None:
    other = Original.from_str(original(form).to_str())
    roles = ("<|user|>", "<|assistant|>", "<|end|>")
    other.add_special_tokens([AddedToken(name, special=True, normalized=False, rstrip=True) for name in roles])
    theirs = PreTrainedTokenizerFast(tokenizer_object=other, bos_token="<s>", eos_token="</s>", chat_template=template)
    theirs.save_pretrained(tmp_path)
    tokenizer = read_tokenizer_json(tmp_path).tokenizer
    ours = OwnTemplate(tokenizer, {"default": template}, {"bos_token": "<s>", "eos_token": "</s>"})
    for messages in CHATS[:2]:
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.encode(messages) == list(expected)
    special = [tokenizer.special_tokens[name] for name in ("<s>", "</s>", "<|end|>")]
    counts = [[ours.encode(chat).count(i) for i in special] for chat in (CHATS[0], CHATS[2])]
    assert counts[0] == counts[1]  # no token of a turn comes from a message


# ---- what can be wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"model_type": "unigram"}, {}, "a UNIGRAM model of SentencePiece; only its BPE"),
        ({"byte_fallback": False}, {}, "no byte fallback: there is no token <0x00>"),
        ({"normalization_rule_name": "nmt_nfkc"}, {}, "it normalizes texts by nmt_nfkc before encoding"),
        ({"remove_extra_whitespaces": True}, {}, "it removes spaces"),
        ({}, {"eos_token": "<end>"}, "the eos_token <end> is not among its special tokens"),
    ],
)
def test_other_models_of_sentencepiece_are_refused(
    options: dict[str, Any], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_model(tmp_path, config, **options)
    refused(lambda: read_tokenizer_json(tmp_path), rf"tokenizer\.model: .*{message}")


def test_scores_that_say_nothing_are_refused() -> None:
    fields = gguf_fields()
    size = len(fields["tokenizer.ggml.tokens"])
    refused(
        lambda: tokenizer_from_gguf({**fields, "tokenizer.ggml.scores": [-1000.0] * size}), "have the same score -1000"
    )
    refused(lambda: tokenizer_from_gguf({**fields, "tokenizer.ggml.scores": [0.5]}), "expected a number for each of")


def test_a_damaged_file_of_ours_is_named(tmp_path: Path) -> None:
    imported("prepend").save(tmp_path)
    path = tmp_path / FILE_NAME
    good = json.loads(path.read_text())
    for key, value in {
        "prefix": "sometimes",
        "flags": {"<think>": ["loud"]},
        "pieces": {**good["pieces"], "byte_ids": [1]},
    }.items():
        path.write_text(json.dumps({**good, key: value}))
        refused(lambda: Tokenizer.load(tmp_path), r"bpe\.json: ")
