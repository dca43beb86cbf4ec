"""Added tokens: names that stand for one token each wherever a text holds them.

The rules are those of Hugging Face's tokenizers. Of the names that begin at one place the longest wins. The text
between two of them is encoded by itself. A name that is not `normalized` is looked for in the text as it is given.
Special tokens are only found by who asks for them (`parse_special`): a user's text never holds one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import regex

FLAGS = ("lstrip", "rstrip", "single_word", "normalized")  # as tokenizer.json calls them

# Rust's classes of characters; Python's lack combining marks in \w and have four separators more in \s.
WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]", regex.VERSION1)
SPACE = regex.compile(r"\p{White_Space}", regex.VERSION1)


class AddedToken(NamedTuple):
    """The id of an added token and how it is found in a text."""

    id: int
    special: bool
    flags: frozenset[str] = frozenset()


class AddedTokens:
    """The added tokens of a tokenizer, ready to be found.

    >>> tokens = AddedTokens({"<s>": 0, "<think>": 1}, ["<think>"])
    >>> [*tokens.split("a<s><think> b")]
    ['a<s>', 1, ' b']
    >>> [*tokens.split("a<s>", parse_special=True)]
    ['a', 0]
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        user_defined: Collection[str],
        flags: Mapping[str, Collection[str]] | None = None,
        normalize: Callable[[str, bool], str] = lambda text, start: text,
    ) -> None:
        """Make the tokens of `ids`; those of `user_defined` are not special.

        `normalize` is the tokenizer's own; it is told whether a text starts there or goes on.
        """
        self._normalize, flags = normalize, flags or {}
        self._any_in_text = bool(user_defined)
        self._raw: dict[str, AddedToken] = {}
        self._normalized: dict[str, AddedToken] = {}
        self._tokens = {
            name: AddedToken(number, name not in user_defined, frozenset(flags.get(name, ())))
            for name, number in ids.items()
        }
        for name, token in self._tokens.items():
            if "normalized" in token.flags:
                self._normalized[normalize(name, True)] = token
            else:
                self._raw[name] = token
        self._patterns: tuple[re.Pattern[str] | None, re.Pattern[str] | None] | None = None

    def split(self, text: str, *, start: bool = True, parse_special: bool = False) -> Iterator[int | str]:
        """Yield the ids of the added tokens in a text and the normalized text between them."""
        if not parse_special and not self._any_in_text:
            if text:
                yield self._normalize(text, start)
            return
        if self._patterns is None:
            self._patterns = _any_of(self._raw), _any_of(self._normalized)
        raw, normalized = self._patterns
        for part in _matches(raw, self._raw, text, parse_special):
            if isinstance(part, int):
                yield part
            else:
                yield from _matches(normalized, self._normalized, self._normalize(part, start), parse_special)
            start = True


def _matches(
    pattern: re.Pattern[str] | None, tokens: Mapping[str, AddedToken], text: str, parse_special: bool
) -> Iterator[int | str]:
    """Yield the ids of the tokens in a text, and the text between them."""
    at = 0
    for match in () if pattern is None else pattern.finditer(text):
        start, end = match.span()
        token = tokens[match[0]]
        if token.special and not parse_special:
            continue
        if "single_word" in token.flags and any(
            WORD.fullmatch(c) for c in (text[start - 1 : start], text[end : end + 1])
        ):
            continue
        if "lstrip" in token.flags:
            while start > at and SPACE.fullmatch(text[start - 1]):
                start -= 1
        if "rstrip" in token.flags:
            while end < len(text) and SPACE.fullmatch(text[end]):
                end += 1
        if at < start:
            yield text[at:start]
        yield token.id
        at = end
    if at < len(text):
        yield text[at:]


def _any_of(names: Collection[str]) -> re.Pattern[str] | None:
    """Return an expression for the longest of the names at a place; a tree, so that thousands of names stay fast."""
    return re.compile(_tree(sorted({name for name in names if name}))) if any(names) else None


def _tree(names: Sequence[str]) -> str:
    """Return the expression of sorted names: what they begin with in common, then the branches behind it."""
    first, last = names[0], names[-1]
    n = 0
    while n < min(len(first), len(last)) and first[n] == last[n]:
        n += 1
    branches: dict[str, list[str]] = {}
    for name in names:
        if len(name) > n:
            branches.setdefault(name[n], []).append(name[n:])
    inner = "|".join(_tree(branch) for branch in branches.values())
    optional = "?" if len(first) == n else ""  # sorted, so a name that is the whole of it comes first
    return re.escape(first[:n]) + (f"(?:{inner}){optional}" if inner else "")
