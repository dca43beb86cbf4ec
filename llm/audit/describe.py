"""Write an audit as JSON, and as Markdown with the passages side by side."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from llm.audit.duplicates import FAMILY, FEWEST_WORDS, MARGIN, NEAR
from llm.audit.leakage import MOST_REPEATS, Audit, Part
from llm.audit.overlap import CHARS_RUN, COVERED, WORDS_RUN
from llm.common.markdown import escape, table

SHOWN_CHARS = 300


def to_dict(audit: Audit, quotable: Collection[str]) -> dict[str, Any]:
    """Return counts and all findings; texts only of sets that are quotable."""
    return {
        "rules": {
            "near": NEAR,
            "fewest_words": FEWEST_WORDS,
            "template": FAMILY,
            "template_margin": MARGIN,
            "words_run": WORDS_RUN,
            "characters_run": CHARS_RUN,
            "covered": COVERED,
        },
        "corpus": {
            "documents": audit.corpus_documents,
            "bytes_searched": audit.corpus_bytes,
            "bytes": audit.corpus_total,
        },
        "train_repeats": {name: repeats._asdict() for name, repeats in audit.train_repeats.items()},
        "parts": [_part(part, quotable) for part in audit.parts],
    }


def _part(part: Part, quotable: Collection[str]) -> dict[str, Any]:
    found: list[dict[str, Any]] = [match._asdict() for match in part.matches]
    overlaps: list[dict[str, Any]] = [overlap._asdict() for overlap in part.overlaps]
    if part.name in quotable:
        for row in found:
            row |= {"text": part.test[row["test"]], "train_text": part.train[row["train"]]}
    for row in overlaps:
        if part.name in quotable:
            row["text"] = part.test[row["test"]]
        if "corpus" not in quotable:
            del row["passage"]
    return {
        "set": part.name,
        "split": part.split,
        "texts": len(part.test),
        "train_texts": len(part.train),
        "too_short_for_near": part.short,
        "too_short_for_corpus": part.short_for_corpus,
        "near_compared": min(part.most_near, len(part.test)),
        "counts": part.counts(),
        "repeats": part.repeats._asdict(),
        "matches": found,
        "in_corpus": overlaps,
    }


def to_markdown(audit: Audit, quotable: Collection[str], show: int) -> list[str]:
    """Return the lines of a report with at most `show` passages of each split."""
    return [
        *counts_table(audit),
        *limits(audit),
        *(line for part in audit.parts for line in passages(part, quotable, show)),
    ]


def counts_table(audit: Audit) -> list[str]:
    header = ["held-out texts", "number", "equal", "equal letters", "nearly equal", "in the corpus", "leaked"]
    rows = [
        [
            escape(f"{part.name}, {part.split}"),
            f"{len(part.test):,}",
            *(f"{part.counts()[kind]:,}" for kind in ("exact", "normalised", "near", "corpus", "leaked", "template")),
        ]
        for part in audit.parts
    ]
    return table([*header, "of a template"], rows)


def limits(audit: Audit) -> list[str]:
    """Say what the rules are and what was not looked at."""
    lines = [
        f"Equal: verbatim, then in letters, digits and signs. Nearly equal: {100 * NEAR:.0f} % of the words, of "
        f"{FEWEST_WORDS} or more. Of a template, and no leak: so near to {FAMILY} or more different training "
        "texts that nearness tells nothing."
    ]
    if audit.corpus_documents:
        lines.append(
            f"In the corpus: {100 * COVERED:.0f} % or more of a text lies in runs of {WORDS_RUN} words and of "
            f"{CHARS_RUN} characters of one document of its training part."
        )
    if audit.corpus_bytes < audit.corpus_total:
        lines.append(f"Searched were the first {audit.corpus_bytes:,} of {audit.corpus_total:,} bytes of the corpus.")
    for part in audit.parts:
        lacks = []
        if part.short:
            lacks.append(f"{part.short:,} are too short to be nearly equal")
        if part.short_for_corpus:
            lacks.append(f"{part.short_for_corpus:,} too short to be found in the corpus")
        if max(len(part.train), len(part.test)) > part.most_near:
            lacks.append(f"only the first {part.most_near:,} of each side were compared as nearly equal")
        if lacks:
            lines.append(f"Of {escape(f'{part.name}, {part.split}')}: {'; '.join(lacks)}.")
    repeats = [
        f"{escape(name)}: {r.exact:,} equal, {r.normalised:,} in letters, {r.near:,} nearly"
        for name, r in [
            *((f"{name}, train", repeats) for name, repeats in audit.train_repeats.items()),
            *((f"{part.name}, {part.split}", part.repeats) for part in audit.parts),
        ]
        if r.exact or r.normalised or r.near
    ]
    if repeats:
        lines.append(
            f"Texts that repeat an earlier one of the same split (nearly: among the first {MOST_REPEATS:,}): "
            f"{'; '.join(repeats)}."
        )
    return [" ".join(lines), ""]


def passages(part: Part, quotable: Collection[str], show: int) -> list[str]:
    """Return a table of leaked texts beside the training text or the passage of the corpus."""
    rows, leaked = [], part.leaked()
    for match in part.matches:
        if match.test in leaked and match.kind != "template":
            rows.append([match.kind, part.test[match.test], part.train[match.train]])
    if "corpus" in quotable:
        rows += [["corpus", part.test[found.test], found.passage] for found in part.overlaps]
    if not rows or show < 1:
        return []
    if part.name not in quotable:
        return [f"The leaked texts of {escape(part.name)} are withheld: the source is not `quotable`.", ""]
    order = sorted(rows, key=lambda row: ("corpus", "near", "normalised", "exact").index(row[0]))
    cells = [[kind, *(escape(text[:SHOWN_CHARS]) for text in texts)] for kind, *texts in order[:show]]
    more = f", {len(cells)} of {len(rows):,}" if len(cells) < len(rows) else ""
    title = f"Leaked texts of {escape(f'{part.name}, {part.split}')}{more}:"
    return [title, "", *table(["how", "held out", "in training"], cells)]
