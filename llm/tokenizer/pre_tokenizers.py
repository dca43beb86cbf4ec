"""Pre-tokenizers of the families of byte-level BPE: where a text is split before merging."""

from __future__ import annotations

from typing import NamedTuple

from llm.common.errors import InputError
from llm.tokenizer.bpe import END_OF_TEXT, GPT2_PATTERN, Tokenizer
from llm.tokenizer.codecs import MAX_SPACES


class PreTokenizer(NamedTuple):
    """The rules by which a family of tokenizers splits a text before merging.

    The published `steps` are regular expressions for Oniguruma, each applied to the pieces that the one before left;
    what an expression does not match is a piece too. `pattern` is one expression for tiktoken that splits the same way,
    possessive where that spares backtracking. `gguf_names` are llama.cpp's, ours to write first.
    """

    steps: tuple[str, ...]
    pattern: str
    gguf_names: tuple[str, ...]
    ignore_merges: bool = False  # llama.cpp: a piece that is a token needs no merges
    add_bos: bool = False  # llama.cpp: texts begin with the bos token unless the file says otherwise
    nfc: bool = False  # the original composes characters first, which no GGUF file mentions
    vocabulary_signs: tuple[tuple[str, int], ...] = ()  # tokens with ids that only vocabularies of this family have


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

# Chinese characters and kana are split off first, so every class of the other alternatives comes in two: theirs and the
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

PRE_TOKENIZERS = (
    PreTokenizer(  # a vocabulary trained here too
        (GPT2_STEP,), GPT2_PATTERN, ("gpt-2",), vocabulary_signs=((END_OF_TEXT, 50256),)
    ),
    PreTokenizer(  # SmolLM2, StarCoder: each digit alone, and to the rest of the text it is an end
        (DIGIT, GPT2_STEP),
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N}|$)|\s+(?!\S)|\s",
        ("smollm", "starcoder", "refact"),
        vocabulary_signs=(("<|im_start|>", 1), ("<fim_prefix>", 1)),
    ),
    PreTokenizer(
        (LLAMA3_STEP,),
        LLAMA3_PATTERN,
        ("llama-bpe", "llama3", "llama-v3", "falcon3"),
        ignore_merges=True,
        add_bos=True,
        vocabulary_signs=(("<|begin_of_text|>", 128000),),
    ),
    PreTokenizer(  # Qwen2.5, Qwen3
        (LLAMA3_STEP.replace("{1,3}", ""),),
        LLAMA3_PATTERN.replace("{1,3}+", ""),
        ("qwen2", "deepseek-r1-qwen"),
        nfc=True,
        vocabulary_signs=(("<|endoftext|>", 151643), ("<｜end▁of▁sentence｜>", 151643)),
    ),
    PreTokenizer(  # Mistral Nemo. llama.cpp's own expression takes capitals beyond A-Z for small letters.
        (rf"{TEKKEN_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",),
        rf"{TEKKEN_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n/]*+|\s*[\r\n]|\s++$|\s+(?!\S)|\s",
        ("tekken",),
        ignore_merges=True,
        add_bos=True,
        vocabulary_signs=(("[TOOL_CALLS]", 9),),
    ),
    PreTokenizer(  # DeepSeek V3
        (
            r"\p{N}{1,3}",
            "[一-龥぀-ゟ゠-ヿ]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
            "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
        ),
        DEEPSEEK_PATTERN,
        ("deepseek-v3",),
        vocabulary_signs=(("<｜end▁of▁sentence｜>", 1),),
    ),
    PreTokenizer(  # what llama.cpp falls back to
        (r"[\p{P}\$\+<=>\^~\|]+", GPT2_STEP.removesuffix(r"|\s+"), r"\p{N}+", "[0-9][0-9][0-9]"),
        r"[\p{P}$+<=>^~|]++| ?\p{L}++|[0-9]{3}|(?:(?![0-9]{3})\p{N})++| ?[^\s\p{L}\p{N}\p{P}$+<=>^~|]++"
        r"|\s++(?=[\p{P}$+<=>^~|]|$)|\s+(?!\S)|\s",
        ("default",),
    ),
)


def pre_tokenizer_of(tokenizer: Tokenizer) -> PreTokenizer:
    """Return the pre-tokenizer with a tokenizer's pattern; raise `InputError` for a pattern of another version."""
    for known in PRE_TOKENIZERS:
        if known.pattern == tokenizer.pattern:
            return known
    raise InputError("tokenizer: its pattern is of another version of this program; train or import it again")
