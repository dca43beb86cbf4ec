"""Other tools' tokenizers in and out: `tokenizer.json` of Hugging Face, and the tokenizer inside a GGUF file.

Byte-level BPE only (GPT-2, SmolLM2, Llama 3, Qwen2.5, Qwen3 and their kin); SentencePiece, Unigram and WordPiece merge
by other rules and are refused. What is read gives the ids that the original gives. Two things have to agree for that:
where a text is cut before merging (`SPLITS`), and which merges come first (`_made_by_merges`).

Tokens that were added to a vocabulary never come from text here. transformers and llama.cpp find those that are not
special, such as Qwen's <think>, in any text; transformers the special ones too, unless told `split_special_tokens`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from llm.common.errors import InputError
from llm.common.files import parse_json
from llm.config import Template
from llm.tokenizer.bpe import (
    END_OF_TEXT,
    GPT2_PATTERN,
    MAX_SPACES,
    MAX_VOCAB_SIZE,
    Tokenizer,
    bytes_to_unicode,
)
from llm.tokenizer.chat_template import render, render_untrusted
from llm.tokenizer.prompts import ALPACA_INSTRUCTION, ALPACA_PREAMBLE, ALPACA_RESPONSE, stop_token

MAX_TOKEN = 1000  # bytes; known tokens have up to 256, and how long one takes to check grows with the square or worse

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # the types of tokens in a GGUF file


class ImportedTokenizer(NamedTuple):
    tokenizer: Tokenizer
    template: Template | None  # of its chats, where it is one that we know
    system: str | None  # what the template says as system when nobody says it


# ---- where a text is cut ---------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """How a family of tokenizers cuts a text before merging.

    The published `steps` are regular expressions for Oniguruma, each applied to the pieces that the one before left;
    what an expression does not match is a piece too. `pattern` is one expression for tiktoken that cuts the same way,
    possessive where that spares backtracking. `pre` are llama.cpp's names for it, ours to write first.
    """

    steps: tuple[str, ...]
    pattern: str
    pre: tuple[str, ...]
    whole_words: bool = False  # llama.cpp: a piece that is a token needs no merges
    begins: bool = False  # llama.cpp: texts begin with the bos token unless the file says otherwise
    nfc: bool = False  # the original composes characters first, which no GGUF file mentions


DIGIT = r"\p{N}"
GPT2_STEP = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_STEP = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = (  # U+017F folds to s, as it does in (?i:'s)
    r"'(?:[sSſdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s++$|\s+(?!\S)|\s"
)
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)

# Chinese characters and kana are cut out first, so every class of the other alternatives comes in two: theirs and the
# rest's. Three code points among the kana (UNASSIGNED) are no letters, and behave as any other such character.
KANA_HAN, KANA, UNASSIGNED = "一-龥぀-ヿ", "぀-ヿ", "\u3040\u3097\u3098"
LETTER = rf"[\p{{L}}\p{{M}}&&[^{KANA_HAN}]]"
LETTER_KANA_HAN = rf"[\p{{L}}\p{{M}}&&[{KANA_HAN}]]"
DEEPSEEK_PATTERN = (
    rf"\p{{N}}{{1,3}}+|[{UNASSIGNED}]?{LETTER_KANA_HAN}++|[\p{{P}}\p{{S}}&&[{KANA}]]++"
    rf"|[{UNASSIGNED}]{{1,{MAX_SPACES}}}(?!{LETTER_KANA_HAN})|[!-/:-@\[-`{{-~][A-Za-z]++"
    rf"|[^\r\n\p{{L}}\p{{P}}\p{{S}}\p{{N}}{KANA}]?{LETTER}++| ?[\p{{P}}\p{{S}}&&[^{KANA}]]++[\r\n]*+"
    rf"|\s*[\r\n]|\s++(?=[\p{{N}}{KANA_HAN}]|$)|\s+(?!\S)|\s"
    rf"|[^\s\p{{L}}\p{{M}}\p{{N}}\p{{P}}\p{{S}}{KANA}]{{1,{MAX_SPACES}}}(?!{LETTER})"
)

SPLITS = (
    Split((GPT2_STEP,), GPT2_PATTERN, ("gpt-2",)),  # a vocabulary trained here too
    Split(  # SmolLM2, StarCoder: each digit alone, and to the rest of the text it is an end
        (DIGIT, GPT2_STEP),
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N}|$)|\s+(?!\S)|\s",
        ("smollm", "starcoder", "refact"),
    ),
    Split(
        (LLAMA3_STEP,), LLAMA3_PATTERN, ("llama-bpe", "llama3", "llama-v3", "falcon3"), whole_words=True, begins=True
    ),
    Split(  # Qwen2.5, Qwen3
        (LLAMA3_STEP.replace("{1,3}", ""),),
        LLAMA3_PATTERN.replace("{1,3}+", ""),
        ("qwen2", "deepseek-r1-qwen"),
        nfc=True,
    ),
    Split(  # Mistral Nemo. llama.cpp's own expression takes capitals beyond A-Z for small letters.
        (rf"{TEKKEN_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",),
        rf"{TEKKEN_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n/]*+|\s*[\r\n]|\s++$|\s+(?!\S)|\s",
        ("tekken",),
        whole_words=True,
        begins=True,
    ),
    Split(  # DeepSeek V3
        (
            r"\p{N}{1,3}",
            "[一-龥぀-ゟ゠-ヿ]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
            "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
        ),
        DEEPSEEK_PATTERN,
        ("deepseek-v3",),
    ),
    Split(  # what llama.cpp falls back to
        (r"[\p{P}\$\+<=>\^~\|]+", GPT2_STEP.removesuffix(r"|\s+"), r"\p{N}+", "[0-9][0-9][0-9]"),
        r"[\p{P}$+<=>^~|]++| ?\p{L}++|[0-9]{3}|(?:(?![0-9]{3})\p{N})++| ?[^\s\p{L}\p{N}\p{P}$+<=>^~|]++"
        r"|\s++(?=[\p{P}$+<=>^~|]|$)|\s+(?!\S)|\s",
        ("default",),
    ),
)


# ---- tokenizer.json in -----------------------------------------------------------------------------------------------


def read_tokenizer_json(folder: Path) -> ImportedTokenizer:
    """The tokenizer of a Hugging Face model folder; a vocab.json with a merges.txt, and nothing else, is GPT-2's form.

    The chat template is asked for a prompt of one question: where ours can say the same, `system` is what it has put
    before the question (Llama 3.1's date lines too, with the date that the template has for when it is not told one);
    where not, the markers in it decide and there is no system.
    """
    path = folder / "tokenizer.json"
    config = _read_json(folder / "tokenizer_config.json")
    content = _read_json(path) if path.is_file() else _gpt2_form(folder, config)
    try:
        model = content["model"]
        if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
            kind = "BPE of SentencePiece" if model.get("byte_fallback") else model["type"]
            raise InputError(f"{path}: a {kind} tokenizer; only byte-level BPE can be imported exactly")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise InputError(f"{path}: model.{option} {model[option]!r} has no place in byte-level BPE")
        vocab = {str(name): int(number) for name, number in model["vocab"].items()}
        added = {str(token["content"]): token for token in content.get("added_tokens") or []}
        for number, token in (config.get("added_tokens_decoder") or {}).items():
            added.setdefault(str(token["content"]), {**token, "id": number})
        special = {name: int(token["id"]) for name, token in added.items()}
        names = _named_tokens(folder, config, {number: name for name, number in (vocab | special).items()})
        adds_begin = config.get("add_bos_token")
        begin = _post_processor_begin(content.get("post_processor")) if adds_begin is None else None
        if adds_begin:
            begin = names.get("bos_token")
        end = names.get("eos_token", END_OF_TEXT)
        for name in (end, begin):  # GPT-2's files do not say that it is no ordinary token
            if name is not None and name in vocab:
                special.setdefault(name, vocab[name])
        tokenizer = _build(
            str(path),
            vocab,
            [_pair(merge) for merge in model["merges"]],
            special,
            _split(path, content.get("pre_tokenizer")),
            whole_words=bool(model.get("ignore_merges")),
            nfc=_is_nfc(path, content.get("normalizer")),
            end=end,
            begin=begin,
            user_defined=[name for name, token in added.items() if not token.get("special", True)],
        )
        if tokenizer.missing_bytes and model.get("unk_token"):
            raise InputError(f"{path}: bytes without a token and an unk_token for them; only the one or the other")
        template = _chat_template_of(folder, config)
    except InputError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: not a tokenizer ({error!r}); fetch it again") from None
    return ImportedTokenizer(tokenizer, *_recognise(template, tokenizer, names))


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a file that may be absent: then nothing."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a JSON file ({str(error).splitlines()[0]}); fetch it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}; fetch it again")
    return content


def _gpt2_form(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a tokenizer.json would say that holds GPT-2's two files."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocab.is_file() and merges.is_file()):
        more = "; its SentencePiece tokenizer.model cannot be imported" if (folder / "tokenizer.model").exists() else ""
        raise InputError(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt{more}")
    if str(config.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast") != "GPT2Tokenizer":
        raise InputError(
            f"{folder}: a {config['tokenizer_class']} needs its tokenizer.json; save one with transformers"
        )
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{merges}: cannot be read ({error}); fetch it again") from None
    lines = [line for line in lines if line and not line.startswith("#version")]
    pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": config.get("add_prefix_space", False)}
    return {"model": {"vocab": _read_json(vocab), "merges": lines}, "pre_tokenizer": pre_tokenizer}


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _named_tokens(folder: Path, config: Mapping[str, Any], by_id: Mapping[int, str]) -> dict[str, str]:
    """Which tokens are the `eos_token` and the `bos_token`, from the first file that says it."""
    names = {}
    for key in ("eos_token", "bos_token"):
        for source in (config, _read_json(folder / "special_tokens_map.json")):
            token = source.get(key)
            if token and key not in names:
                names[key] = str(token["content"] if isinstance(token, dict) else token)
        for file in ("generation_config.json", "config.json"):
            numbers = _read_json(folder / file).get(f"{key}_id")
            for number in numbers if isinstance(numbers, list) else [numbers]:
                if isinstance(number, int) and number in by_id:
                    names.setdefault(key, by_id[number])
    return names


def _post_processor_begin(node: Mapping[str, Any] | None) -> str | None:
    """The token that a post_processor puts before every text."""
    if node is None:
        return None
    if node["type"] == "Sequence":
        return next((name for part in node["processors"] if (name := _post_processor_begin(part))), None)
    if node["type"] == "TemplateProcessing" and "SpecialToken" in node["single"][0]:
        token = node["special_tokens"][node["single"][0]["SpecialToken"]["id"]]
        return str(token["tokens"][0])
    return None


def _split(path: Path, node: Mapping[str, Any] | None) -> Split:
    steps = tuple(_steps(path, node or {"type": "none"}))
    for split in SPLITS:
        if steps == (*split.steps, ""):
            return split
    if not steps or steps[-1] != "" or "" in steps[:-1]:
        raise InputError(f"{path}: not byte-level: its pre_tokenizer does not end in ByteLevel")
    raise InputError(f"{path}: its pre_tokenizer cuts a text in a way that is not known here: {_short(steps[:-1])}")


def _steps(path: Path, node: Mapping[str, Any]) -> Iterable[str]:
    """The expressions of a pre_tokenizer in their order, and an empty one for the step from characters to bytes."""
    kind = node["type"]
    if kind == "Sequence":
        for part in node["pretokenizers"]:
            yield from _steps(path, part)
    elif kind == "ByteLevel" and not node.get("add_prefix_space"):
        yield from (GPT2_STEP, "") if node.get("use_regex", True) else ("",)
    elif kind == "Digits":
        yield DIGIT if node["individual_digits"] else rf"{DIGIT}+"
    elif kind == "Split" and node["behavior"] == "Isolated" and not node["invert"] and "Regex" in node["pattern"]:
        yield str(node["pattern"]["Regex"])
    else:
        raise InputError(f"{path}: no byte-level BPE that can be imported: its pre_tokenizer has {_short(node)}")


def _is_nfc(path: Path, node: Mapping[str, Any] | None) -> bool:
    if node is None:
        return False
    if node["type"] == "Sequence":
        return True in {_is_nfc(path, part) for part in node["normalizers"]}  # each is looked at
    if node["type"] != "NFC":
        raise InputError(f"{path}: the normalizer {_short(node)} is not known here; only NFC is")
    return True


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:120]}..."


# ---- the vocabulary --------------------------------------------------------------------------------------------------


def _build(
    where: str,
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    special: dict[str, int],
    split: Split,
    *,
    whole_words: bool,
    nfc: bool,
    end: str,
    begin: str | None,
    user_defined: Sequence[str],
) -> Tokenizer:
    """A tokenizer from names in GPT-2's byte characters; `vocab` may name the special tokens too."""
    named: dict[int, str] = {}
    for name, number in [*special.items(), *vocab.items()]:
        if not 0 <= number < MAX_VOCAB_SIZE:
            raise InputError(f"{where}: token {name!r} has the id {number}; fetch the file again")
        if named.setdefault(number, name) != name:
            raise InputError(f"{where}: {named[number]!r} and {name!r} have the same id {number}; fetch the file again")
        if special.get(name, number) != number:
            raise InputError(f"{where}: {name!r} has the ids {special[name]} and {number}; fetch the file again")
    for key, one in (("eos_token", end), ("bos_token", begin)):
        if one is not None and one not in special:
            raise InputError(f"{where}: the {key} {one} is not among its special tokens; name one that is")

    byte_of = bytes_to_unicode()
    tokens: dict[int, bytes] = {}
    for name, number in sorted(vocab.items(), key=lambda item: item[1]):
        if name not in special:
            if not name or not set(name) <= byte_of.keys():
                raise InputError(f"{where}: token {number} {name!r} is not byte-level BPE; only that is known")
            if len(name) > MAX_TOKEN:
                raise InputError(f"{where}: token {number} has {len(name):,} bytes; damaged: fetch the file again")
            tokens[number] = bytes(byte_of[character] for character in name)
    pairs: dict[int, set[tuple[bytes, ...]]] = {}
    last = -1
    for i, (left, right) in enumerate(merges):
        numbers = [vocab.get(name, -1) for name in (left, right, left + right)]
        if not all(number in tokens for number in numbers):
            raise InputError(f"{where}: merge {i} {left} {right} is of tokens that it has not; fetch it again")
        a, b, number = tokens[numbers[0]], tokens[numbers[1]], numbers[2]
        if number < last:
            raise InputError(f"{where}: merge {i} {left} {right} has a lower id than one before it; that is not known")
        last = number
        pairs.setdefault(number, set()).add((a, b))
    made = _made_by_merges(tokens)
    ranks: list[bytes | None] = [None] * (max(tokens, default=-1) + 1)
    for number, token in tokens.items():
        parts = made[token]
        known = parts in pairs.get(number, ()) if len(parts) == 2 else len(token) == 1 or whole_words
        if not known:
            raise InputError(f"{where}: no merge makes token {number} {token!r}; such a vocabulary is not known here")
        ranks[number] = token
    return Tokenizer(ranks, split.pattern, special, end, begin, nfc, user_defined)


def _made_by_merges(tokens: Mapping[int, bytes]) -> dict[bytes, tuple[bytes, ...]]:
    """What the tokens of lower ids make of each token, ids ascending.

    tiktoken merges the neighbours that make the token of the lowest id, whichever two they are. Other tools go through
    a list of pairs. Between two places that no merge has crossed, a text is merged as if it stood alone; so a token of
    which the lower ones leave two parts can only ever be made of these two, and one of which they leave more is never
    made. If the list has each token's two parts, in the order of the ids, both ways give the same.
    """
    made: dict[bytes, tuple[bytes, ...]] = {}
    ranks: dict[bytes, int] = {}
    for number, token in sorted(tokens.items()):
        parts = made[token] = _merge(token, ranks)
        if len(parts) == 2:
            ranks[token] = number
    return made


def _merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, ...]:
    """Byte-pair encoding (Sennrich et al. 2016): the two neighbours of the lowest rank merge, until none have one."""
    parts = [token[i : i + 1] for i in range(len(token))]
    found = [ranks.get(left + right, MAX_VOCAB_SIZE) for left, right in pairwise(parts)]  # by the left neighbour
    while len(parts) > 2 and (rank := min(found)) < MAX_VOCAB_SIZE:
        i = found.index(rank)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del found[i]
        for left in (i - 1, i):
            if 0 <= left < len(found):
                found[left] = ranks.get(parts[left] + parts[left + 1], MAX_VOCAB_SIZE)
    return tuple(parts)


# ---- GGUF in ---------------------------------------------------------------------------------------------------------


def tokenizer_from_gguf(fields: Mapping[str, Any]) -> ImportedTokenizer:
    """The tokenizer from a GGUF file's metadata, `tokenizer.*` keys with plain Python values."""

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = fields.get(key, default)
        if value is not default and not isinstance(value, kind):
            raise InputError(f"{key}: expected {kind.__name__}, found {_short(value)}")
        if value is None:
            raise InputError(f"{key}: missing, so the file holds no tokenizer that can be read")
        return value

    kind = get("tokenizer.ggml.model", str)
    if kind != "gpt2":
        what = " (SentencePiece)" if kind == "llama" else ""
        raise InputError(f"tokenizer.ggml.model: {kind}{what}; only byte-level BPE, gpt2, can be imported exactly")
    pre = get("tokenizer.ggml.pre", str, "default")
    split = next((split for split in SPLITS if pre in split.pre), None)
    if split is None:
        known = ", ".join(name for split in SPLITS for name in split.pre)
        raise InputError(f"tokenizer.ggml.pre: {pre} is not known here; known are {known}")
    tokens: list[Any] = get("tokenizer.ggml.tokens", list)
    types: list[Any] = get("tokenizer.ggml.token_type", list, [NORMAL] * len(tokens))
    merges: list[Any] = get("tokenizer.ggml.merges", list)
    if not all(isinstance(token, str) for token in tokens) or not all(isinstance(type_, int) for type_ in types):
        raise InputError("tokenizer.ggml.tokens, tokenizer.ggml.token_type: expected strings and integers")
    if len(types) != len(tokens):
        raise InputError(f"tokenizer.ggml.token_type: {len(types)} types for {len(tokens)} tokens")
    names = {}
    for name in ("eos", "bos"):
        if f"tokenizer.ggml.{name}_token_id" in fields:
            number = get(f"tokenizer.ggml.{name}_token_id", int)
            if not 0 <= number < len(tokens):
                raise InputError(f"tokenizer.ggml.{name}_token_id: {number} is none of {len(tokens)} tokens")
            names[f"{name}_token"] = tokens[number]
    end = names.get("eos_token", END_OF_TEXT)
    vocab: dict[str, int] = {}
    special: dict[str, int] = {}
    for number, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if type_ == UNUSED:
            continue
        if token in vocab:
            raise InputError(f"tokenizer.ggml.tokens: {vocab[token]} and {number} are both {token!r}")
        vocab[token] = number
        if type_ != NORMAL or token == end:
            special[token] = number
    begin = names.get("bos_token") if get("tokenizer.ggml.add_bos_token", bool, split.begins) else None
    try:
        pairs = [_pair(merge) for merge in merges]
    except (ValueError, AttributeError, TypeError):
        raise InputError("tokenizer.ggml.merges: expected pairs of tokens with a space between them") from None
    user_defined = [name for name, number in special.items() if types[number] == USER_DEFINED]
    tokenizer = _build(
        "tokenizer.ggml", vocab, pairs, special, split, whole_words=split.whole_words, nfc=split.nfc,
        end=end, begin=begin, user_defined=user_defined,
    )  # fmt: skip
    template = get("tokenizer.chat_template", str, "") or None
    return ImportedTokenizer(tokenizer, *_recognise(template, tokenizer, names))


# ---- chat templates --------------------------------------------------------------------------------------------------


def _chat_template_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {one["name"]: one["template"] for one in template}.get("default")
    if not isinstance(template, str | None):
        raise InputError(f"{folder / 'tokenizer_config.json'}: chat_template: expected text, found {_short(template)}")
    return template


def _recognise(
    source: str | None, tokenizer: Tokenizer, names: Mapping[str, str]
) -> tuple[Template | None, str | None]:
    """Which of our templates a chat template is, and the system that it has put in."""
    if source is None:
        return None, None
    question, here = "How are you?", "\0"
    found = render_untrusted(source, question, names) or ""
    chats: tuple[Template, ...] = ("chatml", "llama3", "alpaca")
    for template in chats:
        if found == render(_chat_template(tokenizer, template, None), question, names):
            return template, None
        if template != "alpaca":
            head, tail = render(_chat_template(tokenizer, template, here), question, names).split(here)
            system = found.removeprefix(head).removesuffix(tail)
            if found == head + system + tail and not any(name in system for name in tokenizer.special_tokens):
                return template, system
    markers: dict[str, Template] = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3"}
    markers["### Instruction"] = "alpaca"
    return next((template for marker, template in markers.items() if marker in source), None), None


def _chat_template(tokenizer: Tokenizer, template: Template, system: str | None) -> str:
    """`llm.tokenizer.prompts.encode_prompt` as a Jinja template, for chats of any length."""

    def text(value: str) -> str:
        return json.dumps(value, ensure_ascii=False)

    begin = "" if tokenizer.begin is None else f"{{{{ {text(tokenizer.begin)} }}}}"
    user = "message['content']"
    if template == "alpaca":
        first = text(ALPACA_PREAMBLE)
        return (
            f"{begin}{{{{ messages[0]['content'] if messages[0]['role'] == 'system' else {first} }}}}"
            "{% for message in messages %}{% if message['role'] == 'user' %}"
            f"{{{{ {text(ALPACA_INSTRUCTION)} + {user} }}}}"
            "{% elif message['role'] == 'assistant' %}"
            f"{{{{ {text(ALPACA_RESPONSE)} + {user} + {text(tokenizer.end)} }}}}"
            f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {text(ALPACA_RESPONSE)} }}}}{{% endif %}}"
        )
    if template == "chatml":
        head, middle, tail = "<|im_start|>", "\n", "<|im_end|>\n"
    else:
        head, middle, tail = "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"
        user += " | trim"
    given = ""
    if system is not None:
        turn = text(f"{head}system{middle}{system}{tail}")
        given = f"{{% if messages[0]['role'] != 'system' %}}{{{{ {turn} }}}}{{% endif %}}"
    return (
        f"{begin}{given}{{% for message in messages %}}"
        f"{{{{ {text(head)} + message['role'] + {text(middle)} + ({user}) + {text(tail)} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {text(f'{head}assistant{middle}')} }}}}{{% endif %}}"
    )


# ---- out -------------------------------------------------------------------------------------------------------------


def write_tokenizer_json(folder: Path, tokenizer: Tokenizer, template: Template | None, system: str | None) -> None:
    """The files that transformers' `AutoTokenizer` opens: the same ids, and the same prompts by its chat template."""
    split = _split_of(tokenizer)
    names = _names(tokenizer)
    merges, whole_words = _merges(tokenizer)
    added = [
        {"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": name not in tokenizer.user_defined}
        for name, number in tokenizer.special_tokens.items()
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    begin = tokenizer.begin
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": _pre_tokenizer(split, byte_level),
        "post_processor": None if begin is None else _begins_with(begin, tokenizer.special_tokens[begin]),
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": whole_words,
            "vocab": {name: number for number, name in enumerate(names) if name is not None},
            "merges": merges,
        },
    }
    # eos_token stands between texts, as in training; where a turn ends otherwise, generation_config.json says so.
    special = {"bos_token": begin or tokenizer.end, "eos_token": tokenizer.end, "pad_token": tokenizer.end}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": begin is not None,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if template is not None:
        config["chat_template"] = _chat_template(tokenizer, template, system)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"tokenizer.json": content, "tokenizer_config.json": config, "special_tokens_map.json": special}
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _pre_tokenizer(split: Split, byte_level: dict[str, Any]) -> dict[str, Any]:
    *first, last = split.steps
    parts: list[dict[str, Any]] = []
    for step in split.steps:
        if step == DIGIT:
            parts.append({"type": "Digits", "individual_digits": True})
        elif step != GPT2_STEP:
            parts.append({"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False})
    parts.append({**byte_level, "use_regex": last == GPT2_STEP})
    return {"type": "Sequence", "pretokenizers": parts} if first or last != GPT2_STEP else parts[0]


def _begins_with(name: str, number: int) -> dict[str, Any]:
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    texts = [{"Sequence": {"id": which, "type_id": i}} for i, which in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [begin, texts[0]],
        "pair": [begin, texts[0], begin, texts[1]],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }


def gguf_tokenizer_fields(tokenizer: Tokenizer, template: Template | None, system: str | None) -> dict[str, Any]:
    """The metadata with which llama.cpp encodes as we do; it knows `tokenizer.vocab_size` tokens.

    Two differences are llama.cpp's own: characters newer than Unicode 15 are cut as unknown ones, and NFC is left out.
    """
    split = _split_of(tokenizer)
    merges, whole_words = _merges(tokenizer)
    if whole_words and not split.whole_words:
        raise InputError("tokenizer: it has tokens that no merges make, which llama.cpp cannot use; export to hf")
    names = _names(tokenizer)
    shown = tokenizer.user_defined
    types = {i: USER_DEFINED if name in shown else CONTROL for name, i in tokenizer.special_tokens.items()}
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split.pre[0],
        "tokenizer.ggml.tokens": [f"[PAD{i}]" if name is None else name for i, name in enumerate(names)],
        "tokenizer.ggml.token_type": [UNUSED if name is None else types.get(i, NORMAL) for i, name in enumerate(names)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokenizer.eot if tokenizer.bos is None else tokenizer.bos,
        "tokenizer.ggml.eos_token_id": tokenizer.eot,
        "tokenizer.ggml.padding_token_id": tokenizer.eot,
        "tokenizer.ggml.add_bos_token": tokenizer.bos is not None,
    }
    if template is not None:
        fields["tokenizer.ggml.eot_token_id"] = stop_token(tokenizer, template)
        fields["tokenizer.chat_template"] = _chat_template(tokenizer, template, system)
    return fields


def _split_of(tokenizer: Tokenizer) -> Split:
    for split in SPLITS:
        if split.pattern == tokenizer.pattern:
            return split
    raise InputError("tokenizer: its pattern is of another version of this program; train or import it again")


def _names(tokenizer: Tokenizer) -> list[str | None]:
    """What each id is called in other tools' files, bytes as GPT-2's characters: [vocab_size]."""
    character_of = {byte: character for character, byte in bytes_to_unicode().items()}
    names: list[str | None] = [None] * tokenizer.vocab_size
    for number, token in enumerate(tokenizer.ranks):
        if token is not None:
            names[number] = "".join(character_of[byte] for byte in token)
    for name, number in tokenizer.special_tokens.items():
        names[number] = name
    return names


def _merges(tokenizer: Tokenizer) -> tuple[list[str], bool]:
    """The pair that makes each token, ids ascending, and whether there are tokens that no pair makes."""
    character_of = {byte: character for character, byte in bytes_to_unicode().items()}
    made = _made_by_merges({number: token for number, token in enumerate(tokenizer.ranks) if token is not None})
    pairs = [parts for parts in made.values() if len(parts) == 2]
    merges = [" ".join("".join(character_of[byte] for byte in part) for part in parts) for parts in pairs]
    return merges, any(len(parts) > 2 for parts in made.values())
