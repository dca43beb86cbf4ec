"""Tokenizers: round trips, determinism, GPT-2's ids against an independent implementation, bad files."""

from __future__ import annotations

import doctest
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import llm.tokenizer.bpe
from llm.common.errors import InputError
from llm.tokenizer.bpe import END_OF_TEXT, FILE_NAME, GPT2_PATTERN, MIN_VOCAB_SIZE, Tokenizer

STORY = "one morning the baker of the hill town met a young potter who sold 12 blue bowls and didn't smile"


def story(seed: int, n_words: int = 400) -> str:
    chooser, words = random.Random(seed), STORY.split()
    return " ".join(chooser.choice(words) for _ in range(n_words)) + ".\n\n"


TEXTS = [story(seed) for seed in range(20)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=320)


HARD_TEXTS = [
    "",
    " ",
    "\n\n\n  \t x",
    "naïve café, e\u0301 combining",
    "हिन्दी भाषा — ภาษาไทย — 漢字かな — العربية",
    "👩‍👩‍👧‍👦🏳️‍🌈 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "\x00\x01\x7f\ufeff\u2028\uffff",
    "\U0010ffff",
    "it's IT'S 'tis 1234567 3.14159 a_b--c",
]


def test_examples() -> None:
    assert doctest.testmod(llm.tokenizer.bpe).failed == 0


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.encode_array(text).tolist() == ids
    assert all(0 <= number < tokenizer.vocab_size for number in ids)


# Any text, and what cuts, merges and special tokens may trip over.
PARTS = [
    END_OF_TEXT,
    "<|im_start|>",
    "<|",
    "one morning",
    "didn't",
    "1234567",
    " " * 20,
    "\r\n",
    "\n\n\n",
    "e\u0301",
    "\u2028",
]
ANY_TEXT = st.lists(st.text(max_size=20) | st.sampled_from(PARTS), max_size=12).map("".join)


@settings(max_examples=150)
@given(text=ANY_TEXT)
def test_every_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_array(text).tolist() == ids
    assert all(0 <= number < tokenizer.vocab_size for number in ids)
    assert not set(ids) & set(tokenizer.special_tokens.values())


@settings(max_examples=60)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=4), vocab_size=st.integers(MIN_VOCAB_SIZE, 280), text=ANY_TEXT)
def test_every_vocabulary_brings_every_text_back(texts: list[str], vocab_size: int, text: str) -> None:
    try:
        tokenizer = Tokenizer.train(texts, vocab_size)
    except InputError as error:
        assert "the training text is too small" in str(error)
        return
    assert tokenizer.vocab_size == vocab_size
    assert [tokenizer.decode(tokenizer.encode(each)) for each in [*texts, text]] == [*texts, text]


@settings(max_examples=100)
@given(ids=st.lists(st.integers(0, 319), max_size=30), at=st.integers(0, 30))
def test_any_ids_are_bytes_that_add_up(tokenizer: Tokenizer, ids: list[int], at: int) -> None:
    assert tokenizer.decode_bytes(ids) == tokenizer.decode_bytes(ids[:at]) + tokenizer.decode_bytes(ids[at:])
    assert tokenizer.decode(ids) == tokenizer.decode_bytes(ids).decode(errors="replace")


def test_half_a_character_decodes_to_a_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("漢")
    assert tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.decode_bytes(ids[:1]) == "漢".encode()[:1]


def test_training_compresses_and_fills_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 320
    assert list(tokenizer.special_tokens.values()) == [317, 318, 319]
    assert tokenizer.eot == 317
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert tokenizer.encode(" morning") == tokenizer.encode(" morning the")[: len(tokenizer.encode(" morning"))]


@pytest.mark.parametrize("special", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
def test_special_tokens_in_a_text_stay_text(tokenizer: Tokenizer, special: str) -> None:
    ids = tokenizer.encode(f"a {special} b")
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.encode_array(f"a {special} b").tolist() == ids
    assert tokenizer.decode(ids) == f"a {special} b"
    assert tokenizer.decode([tokenizer.special_tokens[special]]) == special


def test_training_is_the_same_with_any_number_of_threads(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from llm.tokenizer.bpe import Tokenizer;"
        "from tests.tokenizer.test_bpe import TEXTS;"
        "Tokenizer.train(TEXTS, 330).save(Path(sys.argv[1]))"
    )
    files = set()
    for threads in ("1", "4"):
        folder = tmp_path / threads
        environment = {**os.environ, "RAYON_NUM_THREADS": threads}
        root = Path(__file__).parents[2]
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=root, env=environment)
        files.add((folder / FILE_NAME).read_bytes())
    assert len(files) == 1


def test_too_little_text_names_the_largest_vocabulary() -> None:
    with pytest.raises(InputError, match="at most 262") as caught:
        Tokenizer.train(["abc abc"], vocab_size=500)
    assert "\n" not in str(caught.value)
    fitting = Tokenizer.train(["abc abc"], vocab_size=500, exact=False)
    assert fitting == Tokenizer.train(["abc abc"], vocab_size=262)
    assert Tokenizer.train([], vocab_size=500, exact=False).encode("a") == [97]


def test_no_text_and_too_small_a_vocabulary() -> None:
    with pytest.raises(InputError, match="at most 259"):
        Tokenizer.train([], vocab_size=300)
    with pytest.raises(InputError, match=f"at least {MIN_VOCAB_SIZE}"):
        Tokenizer.train(TEXTS, vocab_size=MIN_VOCAB_SIZE - 1)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "\t ", "1", "!", "字", "the"])
def test_a_million_characters_without_a_break(tokenizer: Tokenizer, unit: str) -> None:
    text = unit * (1_000_000 // len(unit)) + "x"
    assert tokenizer.decode(tokenizer.encode_array(text).tolist()) == text


def test_training_on_a_million_spaces() -> None:
    assert Tokenizer.train([" " * 1_000_000 + "x", *TEXTS], vocab_size=300).vocab_size == 300


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    loaded = Tokenizer.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a" / FILE_NAME).read_bytes() == (tmp_path / "b" / FILE_NAME).read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == [FILE_NAME]
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.special_tokens == tokenizer.special_tokens
    assert loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_load_says_what_is_wrong(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"bpe\.json: missing; it is written by"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    path = tmp_path / FILE_NAME
    good = json.loads(path.read_text())
    no_end = {token: number for token, number in good["special_tokens"].items() if token != END_OF_TEXT}
    for bad in (
        "<html>",
        "[]",
        json.dumps({**good, "ranks": good["ranks"][1:]}),
        json.dumps({**good, "ranks": [*good["ranks"], good["ranks"][0]]}),
        json.dumps({**good, "ranks": ["not base64!"]}),
        json.dumps({**good, "special_tokens": {END_OF_TEXT: 5}}),
        json.dumps({**good, "special_tokens": no_end}),
    ):
        path.write_text(bad)
        with pytest.raises(InputError, match=r"bpe\.json: ") as caught:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value)


# ---- GPT-2 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2_files() -> tuple[Path, Path]:
    folder = Path(os.environ.get("LLM_TEST_MIRROR", "nowhere"))
    files = folder / "encoder.json", folder / "vocab.bpe"
    if not all(path.exists() for path in files):
        pytest.skip("GPT-2's encoder.json and vocab.bpe are not here: set LLM_DATA_MIRROR to a folder that holds them")
    return files


@pytest.fixture(scope="module")
def gpt2(gpt2_files: tuple[Path, Path]) -> Tokenizer:
    return Tokenizer.gpt2(*gpt2_files)


def test_gpt2_known_ids(gpt2: Tokenizer) -> None:
    assert (gpt2.vocab_size, gpt2.eot, gpt2.special_tokens) == (50257, 50256, {END_OF_TEXT: 50256})
    assert gpt2.encode("Hello, I am") == [15496, 11, 314, 716]
    assert gpt2.encode("Every effort moves you") == [6109, 3626, 6100, 345]


def test_gpt2_agrees_with_transformers(gpt2: Tokenizer, gpt2_files: tuple[Path, Path]) -> None:
    transformers = pytest.importorskip("transformers", reason="the independent tokenizer is in transformers")
    other = transformers.GPT2Tokenizer(vocab=str(gpt2_files[0]), merges=str(gpt2_files[1]))
    chooser = random.Random(1)
    mixed = ["".join(chooser.choices(" \n\t'aeéß1293.,!?-—字🙂the ", k=300)) for _ in range(50)]
    for text in [*HARD_TEXTS, *TEXTS, *mixed]:
        assert gpt2.encode(text) == other(text)["input_ids"]


def test_gpt2_save_and_load(gpt2: Tokenizer, tmp_path: Path) -> None:
    gpt2.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode(TEXTS[0]) == gpt2.encode(TEXTS[0])


def tiny_gpt2_files(folder: Path) -> tuple[Path, Path]:
    """Files in GPT-2's format with two merges: Ġ (the space) with t, then that with h."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    tokens = [*characters, "Ġt", "Ġth", END_OF_TEXT]
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\nĠ t\nĠt h\n", encoding="utf-8")
    return folder / "encoder.json", folder / "vocab.bpe"


def test_gpt2_format(tmp_path: Path) -> None:
    tokenizer = Tokenizer.gpt2(*tiny_gpt2_files(tmp_path))
    assert tokenizer.vocab_size == 259
    assert tokenizer.eot == 258
    assert tokenizer.encode(" the") == [257, ord("e") - 33]
    assert tokenizer.decode(range(256)).startswith("!")
    assert sorted(tokenizer.decode_bytes(range(256))) == list(range(256))


def test_gpt2_files_that_are_wrong(tmp_path: Path) -> None:
    encoder, merges = tiny_gpt2_files(tmp_path)
    merges.write_text("#version: 0.2\nĠ t\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"encoder\.json: does not go with"):
        Tokenizer.gpt2(encoder, merges)
    encoder.write_text("<html>")
    with pytest.raises(InputError, match=r"encoder\.json"):
        Tokenizer.gpt2(encoder, merges)
    merges.unlink()
    encoder.write_text("{}")
    with pytest.raises(InputError, match=r"vocab\.bpe: missing; the download stage fetches it"):
        Tokenizer.gpt2(encoder, merges)


def test_gpt2_pattern_is_tiktokens() -> None:
    """Pieces as in the published pattern, also where it is written with possessive quantifiers here."""
    published = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    ranks = {bytes([byte]): byte for byte in range(256)}
    # Merging every pair of bytes makes the ids show where the pieces end.
    ranks |= {bytes([a, b]): 256 + 256 * a + b for a in range(256) for b in range(256)}
    ours = tiktoken.Encoding("ours", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    theirs = tiktoken.Encoding("theirs", pat_str=published, mergeable_ranks=ranks, special_tokens={})
    chooser = random.Random(2)
    for _ in range(300):
        text = "".join(chooser.choices(" \n\t'sdlte1.,é字", k=60))
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)
