"""The audit of sets: its parts, what it shows, and the book's split of the SMS messages."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from llm.audit.describe import to_dict, to_markdown
from llm.audit.leakage import Audit, audit_sets
from tests.audit.planted import stories

STORY = "Anna rode to the mill with two sacks of corn before the rain came down over the hills"


@pytest.fixture(scope="module")
def audit() -> Audit:
    texts = stories()
    sets = {
        "messages": {
            "train": [STORY, "a <b> c", "a <b> c"],
            "val": ["short", STORY.replace("Anna", "Berta")],
            "test": ["A <B> C", STORY, texts[0]],
        }
    }
    return audit_sets(sets, texts[:3], most_near=10, corpus_total=10_000_000)


def test_parts_have_their_own_numbers(audit: Audit) -> None:
    val, test = audit.parts
    assert [(m.kind, m.test, m.train) for m in val.matches] == [("near", 1, 0)]
    assert [(m.kind, m.test, m.train) for m in test.matches] == [("normalised", 0, 1), ("exact", 1, 0)]
    assert [found.test for found in test.overlaps] == [2] and not val.overlaps
    assert (val.leaked(), test.leaked()) == ({1}, {0, 1, 2})
    assert test.counts() == {"exact": 1, "normalised": 1, "near": 0, "template": 0, "corpus": 1, "leaked": 3}
    assert (val.short, test.short, val.short_for_corpus) == (1, 1, 1)
    assert audit.part("messages", "test") is test and audit.part("messages", "none") is None
    assert audit.train_repeats["messages"].exact == 1


def test_passages_stand_side_by_side_and_markup_stays_text(audit: Audit) -> None:
    text = "\n".join(to_markdown(audit, {"messages", "corpus"}, 10))
    assert "| messages, test | 3 | 1 | 1 | 0 | 1 | 3 | 0 |" in text
    assert r"| normalised | A \<B\> C | a \<b\> c |" in text
    assert f"| near | {STORY.replace('Anna', 'Berta')} | {STORY} |" in text
    assert "Searched were the first" in text and "10,000,000 bytes" in text
    assert "1 are too short to be nearly equal" in text
    assert "Texts that repeat an earlier one" in text
    assert "1 of 3" in "\n".join(to_markdown(audit, {"messages", "corpus"}, 1))


def test_texts_that_may_not_be_quoted_are_in_no_form_of_the_audit(audit: Audit) -> None:
    withheld = "\n".join(to_markdown(audit, set(), 10)) + str(to_dict(audit, set()))
    assert "withheld" in withheld and "Anna" not in withheld and "<b>" not in withheld
    assert stories()[0][:30].lower() not in withheld.lower()
    assert to_dict(audit, set())["parts"][1]["counts"]["leaked"] == 3
    assert to_dict(audit, {"messages"})["parts"][1]["matches"][0]["train_text"] == "a <b> c"


def test_the_leaks_of_the_book_s_split_are_found() -> None:
    """The book reads the file with quotes on, which joins a few lines, and then splits it."""
    mirror = os.environ.get("LLM_TEST_MIRROR")
    path = Path(mirror or "", "sms+spam+collection.zip")
    if mirror is None or not path.is_file():
        pytest.skip("LLM_TEST_MIRROR names no folder with the SMS Spam Collection")
    content = zipfile.ZipFile(path).read("SMSSpamCollection")
    table = pd.read_csv(io.BytesIO(content), sep="\t", header=None, names=["Label", "Text"])
    spam = table[table.Label == "spam"]
    ham = table[table.Label == "ham"].sample(len(spam), random_state=123)
    texts = pd.concat([ham, spam]).sample(frac=1, random_state=123).Text.tolist()
    sets = {"sms": {"train": texts[:1045], "val": texts[1045:1194], "test": texts[1194:]}}
    counts = {part.split: part.counts() for part in audit_sets(sets, most_near=10_000).parts}
    assert (counts["test"]["exact"], counts["val"]["exact"]) == (37, 13)
    assert (counts["test"]["normalised"], counts["val"]["normalised"]) == (5, 3)
