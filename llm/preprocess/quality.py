"""Judge the quality of texts by published rules: Gopher's (Rae et al. 2021) and C4's (Raffel et al. 2020)."""

from __future__ import annotations

import re
from collections.abc import Callable

STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
BULLETS = ("•", "‣", "◦", "*", "-", "–")
SENTENCE_END = re.compile(r"[.!?…。！？]['\"”’)]*(?=\s|$)")
LINE_END = re.compile(r"[.!?…。！？:]['\"”’)]*\s*$")


def gopher(text: str, english: bool) -> str | None:
    """Return a text that passes Gopher's rules of quality, else None; the rule of stop words is for English alone."""
    words = text.split()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not 50 <= len(words) <= 100_000 or not 3 <= sum(map(len, words)) / len(words) <= 10:
        return None
    if max(text.count("#"), text.count("…") + text.count("...")) / len(words) > 0.1:
        return None
    if sum(line.startswith(BULLETS) for line in lines) / len(lines) > 0.9:
        return None
    if sum(line.endswith(("…", "...")) for line in lines) / len(lines) > 0.3:
        return None
    if sum(any(map(str.isalpha, word)) for word in words) / len(words) < 0.8:
        return None
    if len(lines) > 1 and 1 - len(set(lines)) / len(lines) > 0.3:
        return None
    if english and len(STOP_WORDS & {word.casefold().strip('.,;:!?"') for word in words}) < 2:
        return None
    return text


def c4(text: str, english: bool) -> str | None:
    """Return the lines of a text that pass C4's rules; None for a page that does not, or has fewer than 3 sentences.

    A line ends like a sentence, has three words and no mention of JavaScript. The list of bad words is left out.
    """
    if "{" in text or "lorem ipsum" in text.casefold():
        return None
    lines = [line for line in text.splitlines() if not line.strip() or _is_sentence_line(line)]
    kept = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
    if len(SENTENCE_END.findall(kept)) < 3:
        return None
    return text if kept == text.strip("\n") else kept


def _is_sentence_line(line: str) -> bool:
    return bool(LINE_END.search(line)) and len(line.split()) >= 3 and "javascript" not in line.casefold()


RULES: dict[str, Callable[[str, bool], str | None]] = {"gopher": gopher, "c4": c4}
