"""Small tokenizers of every known family, made by the tokenizers library, and nasty texts."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Original
from transformers import PreTrainedTokenizerFast

from llm.common.errors import InputError
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.hf import read_tokenizer_json

NASTY = [
    "",
    " ",
    "Hello, world! It's 12345678 o'clock; don't, DON'T, we'LL, I'VE, 'Tis, rock'n'roll, 'ſ 's",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽 🇩🇪🇫🇷 ☺️ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "日本語のテキスト、カタカナ・ー゛ か゚ 漢字かな交じり文 中文，标点。한국어 텍스트 ㄱㄴㄷ",
    "العَرَبِيَّة مرحبا ١٢٣٤٥ עִבְרִית שלום ภาษาไทย๑๒๓ हिन्दी भाषा १२३४५ தமிழ் ខ្មែរ",
    "e\u0301 é a\u0308\u0323 ạ̈ Å Å ﬁ ﬆ ǅ ß ẞ İ ı \u1e9b\u0323 한 한",
    "\x00\x01\x04\x06\x13\x14\x16\x1c\x1d\x1e\x1f\x7f\x80\x85\x9f\xa0\xad\ufeff\ufffd\uffff\U0010ffff\u2028\u2029\u200b",
    "!\x04!a\x06b  \x1d  ..\x16..\n\x13\n1\x1412\x1d3 \U000f1234 \u061c\u202e",
    "a\r\nb\rc\n\n\nd\n \n\t\n  e \t \t f\n    indented\n\tby a tab   \n\n   ",
    " " * 300 + "x" + "\n" * 200 + "\t" * 100 + " \n" * 50 + "\u3000\u2003 " * 40 + "end" + " " * 33,
    "1 12 123 1234 12345 1,234,567.89  1\t2\n3 ²³ ½ Ⅷ ۱۲۳ १२३ 𝟙𝟚𝟛 一二三 ①②",
    'def f(x: int) -> None:\n    return {\'a\': [x ** 2, !x, x<<=3]}  # comment\n\n\nfor(;;){i++;}//~^|`\\"""',
    "user@example.com https://example.com/a?b=c&d=%20#e +49-30/123 $5 €5 £5 ¥5 a_b __init__ x->y =>",
    "<|endoftext|><|im_start|>user\n<|im_end|> <|eot_id|> <s></s> [PAD] <tool_call> a<|begin_of_text|>b",
    "ĠtheĊ Ġ Ā ā",  # GPT-2's names of bytes, as text
    "a" * 500 + "ab" * 200 + "!" * 300 + "!?" * 100 + "字" * 100 + "1" * 100 + "'" * 50,
]

# Assigned when Python's tables were made: engines with newer and older tables disagree on what came later.
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn"))
TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*" \n\r\t'.!_1٣aé字ガ́ि์\u200d\x04\x06\U000f1234\u3000", "  ", "12", "'s", "'LL", "\r\n"]),
        st.text(ASSIGNED, max_size=8),
    ),
    max_size=25,
).map("".join)


@lru_cache
def every_kind_of_character() -> list[str]:
    """Assigned code points, all at first and fewer later, between letters, digits, spaces and themselves."""
    points = [*range(0x700), *range(0x700, 0x3400, 7), *range(0x3400, 0x110000, 991)]
    points = [point for point in points if unicodedata.category(chr(point)) not in ("Cn", "Cs")]
    around = [f"a{c}a 1{c}1  .{c}. {c}{c}{c} \n{c}\n '{c} {c}12字{c}字12 " for c in map(chr, points)]
    return ["".join(around[i : i + 64]) for i in range(0, len(around), 64)]


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
    " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


def byte_level(use_regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def splits(*expressions: str) -> Any:
    parts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*parts, byte_level(False)])


FAMILIES: dict[str, Callable[[], Any]] = {  # by llama.cpp's name, as the models' own tokenizer.json has it
    "gpt-2": lambda: byte_level(True),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)]),
    "llama-bpe": lambda: splits(LLAMA3),
    "qwen2": lambda: splits(QWEN2),
    "tekken": lambda: splits(TEKKEN),
    "deepseek-v3": lambda: splits(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3),
}
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@lru_cache
def original(family: str) -> Original:
    """A small tokenizer of a family, trained by the tokenizers library on the nasty texts."""
    tokenizer = Original(models.BPE(ignore_merges=family in ("llama-bpe", "tekken")))
    tokenizer.pre_tokenizer = FAMILIES[family]()
    tokenizer.decoder = decoders.ByteLevel()
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    first = CHATML if family == "smollm" else []  # SmolLM2's special tokens have the first ids, others' the last
    # As in SmolLM2's, the bytes that the training text lacks have no token.
    alphabet = [] if family == "smollm" else pre_tokenizers.ByteLevel.alphabet()
    texts = NASTY[:7] + NASTY[9:] if family == "smollm" else NASTY
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=first, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = {"llama-bpe": HEADERS, "gpt-2": ["<|endoftext|>"], "tekken": ["<s>", "</s>"]}.get(family, CHATML)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    if family == "qwen2":
        tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    if family in ("llama-bpe", "tekken"):
        begin = (special[0], tokenizer.token_to_id(special[0]))
        single, pair = f"{special[0]} $A", f"{special[0]} $A {special[0]}:1 $B:1"
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=[begin])
    return tokenizer


def end_of(family: str) -> str:
    return {"llama-bpe": "<|eot_id|>", "gpt-2": "<|endoftext|>", "tekken": "</s>"}.get(family, "<|im_end|>")


def save_original(folder: Path, family: str, chat_template: str | None = None, **config: Any) -> Any:
    """A folder as transformers writes it; returns transformers' tokenizer."""
    special = {"eos_token": end_of(family), **config}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=original(family), chat_template=chat_template, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


@lru_cache
def imported(family: str) -> Tokenizer:
    """Return our tokenizer of these files."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        save_original(Path(folder), family)
        return read_tokenizer_json(Path(folder)).tokenizer


def ids_of(tokenizer: Original, text: str) -> list[int]:
    """The ids of a text in which nothing is a special token."""
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.encode_special_tokens = False
    return ids


@lru_cache
def trained_here() -> Tokenizer:
    return Tokenizer.train(NASTY * 3, vocab_size=700)


def tokenizers_of_all_kinds() -> dict[str, Tokenizer]:
    return {"trained here": trained_here(), **{family: imported(family) for family in FAMILIES}}


QUESTIONS = ["How are you?", "Say it's 3:00!\n\n  Then stop.\n", "日本語で…", "What's <b>?", "x" * 100]


def prompt_of(other: Any, question: str, **more: Any) -> list[int]:
    return list(
        other.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False, **more
        )
    )


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
