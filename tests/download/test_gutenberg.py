"""Project Gutenberg's files of thirty years: each book whole, and nothing around it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from llm.common.errors import InputError
from llm.config import CorpusSource, SourceFile
from llm.download.content import archives, formats
from llm.download.content.archives import DataFile
from llm.download.records.readers import write_records

SECTION = CorpusSource(files=[SourceFile(path="unused")], strip="gutenberg")
TALE = "A TALE\n\nOnce upon a time.\n\nAnd so on.\n"
LICENCE = "*** START: FULL LICENSE ***\n\nTHE FULL PROJECT GUTENBERG LICENSE\nPLEASE READ THIS\n\nAnd on it goes.\n"
SMALL_PRINT = "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nWhy is this here? You know: lawyers.\n"
SMALL_PRINT_END = "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*"
START, END = "*** START OF THE PROJECT GUTENBERG EBOOK A TALE ***", "*** END OF THE PROJECT GUTENBERG EBOOK A TALE ***"


def modern(tale: str = TALE, start: str = START, end: str = END) -> str:
    return f"The Project Gutenberg eBook of A Tale\n\nTitle: A Tale\n\n{start}\n{tale}\n{end}\n\n{LICENCE}"


def etext(tale: str = TALE, end: str = "End of the Project Gutenberg Etext of A Tale") -> str:
    header = "**The Project Gutenberg Etext of A Tale, by Somebody**\n\nPlease take a look at the information here.\n\n"
    return f"{header}{SMALL_PRINT}{SMALL_PRINT_END}\n\n{tale}\n{end}\n"


def books(folder: Path, content: str | bytes, section: CorpusSource = SECTION) -> list[str]:
    """Return the text of each document, without the blanks around it."""
    path = folder / "downloaded"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    write_records(section, [DataFile("a.txt", path, "", 0)], folder / "out.jsonl")
    documents: dict[int, str] = {}
    for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        documents[record["doc"]] = documents.get(record["doc"], "") + record["text"]
    assert list(documents) == list(range(len(documents)))
    return [text.strip() for text in documents.values()]


def refused(folder: Path, content: str) -> str:
    with pytest.raises(InputError) as caught:
        books(folder, content)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("a.txt: ")
    return message


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("*** START OF THIS PROJECT GUTENBERG EBOOK A TALE ***", "*** END OF THIS PROJECT GUTENBERG EBOOK A TALE ***"),
        ("***START OF THE PROJECT GUTENBERG EBOOK A\nTALE***", "End of Project Gutenberg's A Tale, by Somebody"),
        ("*** START OF THE PROJECT GUTENBERG EBOOK, A TALE ***", "*** END OF THE PROJECT GUTENBERG EBOOK, A TALE ***"),
        ("*** START OF THE PROJECT GUTENBERG EBOOK 12345 ***", "*** END OF THE PROJECT GUTENBERG EBOOK 12345 ***"),
        (
            "*** START OF THE PROJECT GUTENBERG EBOOK A\nLONG\nTALE ***",
            "*** END OF THE PROJECT GUTENBERG EBOOK A\nTALE ***",
        ),
        (
            "*** START OF THE COPYRIGHTED PROJECT GUTENBERG EBOOK A ***",
            "*** END OF THE COPYRIGHTED PROJECT GUTENBERG EBOOK A ***",
        ),
        (
            "*** Start of this Project Gutenberg Etext A Tale ***",
            "End of the Project Gutenberg EBook of A Tale,\nby Somebody\n\n" + END,
        ),
        ("*** START OF THIS PROJECT GUTENBERG EBOOK A TALE", "*** END OF THIS PROJECT GUTENBERG EBOOK A TALE"),
        ("*** ANFANG DES PROJEKT GUTENBERG EBOOKS A TALE ***", "*** ENDE DES PROJEKT GUTENBERG EBOOKS A TALE ***"),
        (START, "Fin de Project Gutenberg's A Tale, by Somebody"),
        (START, "Ende dieses Project Gutenberg Etextes A Tale"),
        (START, "Einde van het Project Gutenberg EBook van A Tale"),
    ],
)
@pytest.mark.parametrize("form", ["plain", "byte order mark, carriage returns"])
def test_every_form_of_marker(tmp_path: Path, start: str, end: str, form: str) -> None:
    text = modern(start=start, end=end)
    content = text if form == "plain" else "\ufeff" + text.replace("\n", "\r\n")
    assert books(tmp_path, content) == [TALE.strip()]


@pytest.mark.parametrize(
    "small_print_end",
    [
        SMALL_PRINT_END,
        "*END THE SMALL PRINT! FOR PUBLIC DOMAIN EBOOKS*Ver.02/11/02*END*",
        "*END*THE SMALL PRINT! FOR COPYRIGHT PROTECTED ETEXTS*END*Ver.10.04.94",
    ],
)
@pytest.mark.parametrize(
    "end",
    [
        "End of the Project Gutenberg Etext of A Tale",
        "End of The Project Gutenberg Etext of A Tale, by Somebody",
        "End of Project Gutenberg's A Tale, by Somebody",
        "END OF THE PROJECT GUTENBERG ETEXT OF A TALE",
        "End of this Project Gutenberg Etext\nof A Tale",
    ],
)
def test_etexts_begin_below_the_small_print(tmp_path: Path, small_print_end: str, end: str) -> None:
    text = etext(end=end).replace(SMALL_PRINT_END, small_print_end)
    assert books(tmp_path, text) == books(tmp_path, text.replace("\n", "\r\n")) == [TALE.strip()]
    assert books(tmp_path, "\ufeff" + text[text.index("***START**") :]) == [TALE.strip()]


def test_an_etext_without_a_last_line_goes_on_to_the_end_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="llm"):
        assert books(tmp_path, etext(end="THE END")) == [f"{TALE}\nTHE END"]
    assert "a.txt: no line says 'End of Project Gutenberg'" in caplog.text


def test_a_small_print_may_precede_a_start_and_follow_an_end(tmp_path: Path) -> None:
    small_print = f"{SMALL_PRINT}{SMALL_PRINT_END}\n"
    text = f"Header\n{small_print}\nProduced by Somebody\n\n{START}\n{TALE}\n{END}\n\n{small_print}\nThat is all.\n"
    assert books(tmp_path, text) == [TALE.strip()]
    assert books(tmp_path, text + etext("Second.\n")) == [TALE.strip(), "Second."]


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_every_book_of_a_file_is_a_document(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "BLOCK", block)
    monkeypatch.setattr(formats, "BLOCK", block)
    kinds = [modern, etext, modern, etext, etext, modern]
    tales = [f"Tale {n}.\n\nIt was short.\n" for n in range(len(kinds))]
    content = "\ufeff".join(kind(tale) for kind, tale in zip(kinds, tales, strict=True))
    assert books(tmp_path, content.replace("\n", "\r\n")) == [tale.strip() for tale in tales]


def test_separators_cut_each_book(tmp_path: Path) -> None:
    section = SECTION.model_copy(update={"document_separator": "\n\n\n\n"})
    found = books(tmp_path, modern("one\n\n\n\ntwo\n") + modern("three\n\n\n\n\nfour\n"), section)
    assert found == ["one", "two", "three", "four"]


@pytest.mark.parametrize("kind", [modern, etext])
@pytest.mark.parametrize(
    "mention",
    [
        "She read *** END OF THE PROJECT GUTENBERG EBOOK A TALE *** aloud.",
        "*** END OF THE PROJECT GUTENBERG EBOOK was the line that she read next.",
        "*** START OF THIS PROJECT GUTENBERG EBOOK was the line that she read next.",
        "End of Project Gutenberg, he thought, would be a sad day.",
        "the\nEnd of the Project Gutenberg era was not near.",
        "They called it the Project Gutenberg Etext of all things.",
        "Nobody reads *END*THE SMALL PRINT! at all.",
    ],
)
def test_a_mention_in_prose_is_no_marker(tmp_path: Path, kind: type, mention: str) -> None:
    tale = f"Once.\n\n{mention}\n\nThe story went on.\n\nAnd on.\n"
    assert books(tmp_path, kind(tale) + kind()) == [tale.strip(), TALE.strip()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TALE, "a.txt: expected a line '*** START OF THIS PROJECT GUTENBERG EBOOK', found none; remove strip:"),
        (modern(end=""), "a.txt: expected a line '*** END OF"),
        (modern(start=""), "a.txt: line 12: expected a line '*** START OF"),
        (modern(end="") + modern(), "a.txt: line 24: expected a line '*** END OF THIS PROJECT GUTENBERG EBOOK' before"),
        (modern() + modern(start=""), "expected a line '*** START OF THIS PROJECT GUTENBERG EBOOK' before this"),
        (etext(end="") + etext(), "expected a line 'End of Project Gutenberg' before this small print"),
        (etext().replace(SMALL_PRINT_END, ""), "a.txt: expected a line '*END*THE SMALL PRINT', found none"),
    ],
)
def test_a_missing_marker(tmp_path: Path, content: str, message: str) -> None:
    assert message in refused(tmp_path, content)
