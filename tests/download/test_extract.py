"""Documents become text, Excel sheets rows; what has no text or is a bomb is refused in one line."""

from __future__ import annotations

import datetime
import gzip
import io
import logging
import zipfile
from typing import Any

import openpyxl
import pypdf
import pytest

from tests.download.files import zipped
from tests.download.sources import Place

W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
HEAD_OF_PAGE = "<!doctype html><html><head><title>T</title><style>p {}</style></head><body>"
CP1252, LATIN = (HEAD_OF_PAGE.replace("<head>", f'<head><meta charset="{name}">') for name in ("cp1252", "iso-8859-1"))
PAGE = f"{HEAD_OF_PAGE}<nav>Home</nav><h1>Lamps</h1><p>They <b>shine</b> &auml;ll night.</p><footer>c</footer>"


def pdf(*pages: str, password: str = "") -> bytes:
    """A PDF with one line of text a page; none for a page of pictures."""
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"", b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"]
    kids = []
    for page in pages:
        stream = f"BT /F1 12 Tf 20 100 Td ({page}) Tj ET".encode() if page else b"0 0 9 9 re f"
        objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream))
        fonts = "/Resources<</Font<</F1 3 0 R>>>>"
        objects.append(f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]{fonts}/Contents {len(objects)} 0 R>>".encode())
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<</Type/Pages/Kids[{' '.join(kids)}]/Count {len(kids)}>>".encode()
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    tail = b"xref\n0 %d\n0000000000 65535 f \n%strailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF"
    out += tail % (len(objects) + 1, table, len(objects) + 1, len(out))
    if password:
        writer = pypdf.PdfWriter(clone_from=io.BytesIO(out))
        writer.encrypt(password, algorithm="RC4-128")
        buffer = io.BytesIO()
        writer.write(buffer)
        out = buffer.getvalue()
    return out


def docx(*paragraphs: str) -> bytes:
    body = "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs)
    kind = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    relations = f'<Relationship Id="r" Type="{kind}" Target="word/document.xml"/>'
    package = "http://schemas.openxmlformats.org/package/2006"
    return zipped(
        {
            "[Content_Types].xml": f'<Types xmlns="{package}/content-types"/>'.encode(),
            "_rels/.rels": f'<Relationships xmlns="{package}/relationships">{relations}</Relationships>'.encode(),
            "word/document.xml": f'<w:document xmlns:w="{W}"><w:body>{body}</w:body></w:document>'.encode(),
        }
    )


def epub(chapters: dict[str, str], more: dict[str, bytes] | None = None) -> bytes:
    """A book whose chapters are read in the order of the spine, which is not that of their names."""
    items = "".join(
        f'<item id="{i}" href="text/{n}" media-type="application/xhtml+xml"/>' for i, n in enumerate(chapters)
    )
    spine = "".join(f'<itemref idref="{i}"/>' for i in range(len(chapters)))
    opf = f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{spine}</spine></package>'
    container = (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="OEBPS/book.opf"/></rootfiles></container>'
    )
    members = {"mimetype": b"application/epub+zip", "META-INF/container.xml": container.encode()}
    members |= {"OEBPS/book.opf": opf.encode()} | (more or {})
    return zipped(members | {f"OEBPS/text/{name}": text.encode() for name, text in chapters.items()})


def xlsx(**sheets: list[list[Any]]) -> bytes:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()


BOOK = epub({"z.xhtml": "<p>First.</p>", "a.xhtml": "<h2>Then</h2><p>Second.</p>"})
MAILS = [["text", "label", "sent", "n"], ["Hi.", "ham", datetime.datetime(2026, 5, 3), 1], ["Buy!", "spam", None, 2]]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.pdf", pdf("One lamp.", "Two lamps."), "One lamp.\n\nTwo lamps."),
        ("named.txt", pdf("One lamp."), "One lamp."),
        ("a.pdf.gz", gzip.compress(pdf("One lamp.")), "One lamp."),
        ("a.html", PAGE, "Lamps\n\nThey shine äll night."),
        ("a.htm", (CP1252 + "<p>Grün – €</p>").encode("cp1252"), "Grün – €"),
        ("a.html", HEAD_OF_PAGE + "<p>Grün</p>", "Grün"),
        ("a.html", (LATIN + "<p>Grün</p>").encode("latin-1"), "Grün"),
        ("a.docx", docx("Dear team,", "it broke."), "Dear team,\n\nit broke."),
        ("a.epub", BOOK, "First.\n\nThen\n\nSecond."),
    ],
)  # fmt: skip
def test_documents_become_text(place: Place, name: str, content: str | bytes, expected: str) -> None:
    [text] = place.texts("corpus", (name, content))
    assert text.strip() == expected


def test_documents_inside_an_archive_become_text(place: Place) -> None:
    packed = zipped({"letters/a.docx": docx("One."), "letters/b.pdf": pdf("Two."), "c.png": b"\x89PNG\r\n"})
    entry = {"path": place.put("all.zip", packed), "member": "letters/*"}
    assert [text.strip() for text in place.texts("corpus", [entry])] == ["One.", "Two."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", pdf("Secret.", password="x"), "expected an open PDF, found one with a password"),
        ("a.pdf", pdf("", ""), "expected text, found 2 pages of pictures alone, scanned perhaps; recognize"),
        ("a.pdf", pdf("One.")[:120], "expected a PDF, found an error ("),
        ("a.docx", docx("One.")[:-60], "cannot be unpacked"),
        ("a.docx", zipped({"word/document.xml": b"<w:document"}), "expected a Word document, found an error ("),
        ("a.epub", epub({"a.xhtml": "x"}, {"META-INF/rights.xml": b"<r/>"}), "expected an open book, found an enc"),
        ("a.epub", zipped({"META-INF/container.xml": b"<c/>"}), "expected an EPUB book, found an error ("),
        ("a.html", HEAD_OF_PAGE + '<meta charset="klingon">', "states an encoding that is not known, 'klingon'"),
        ("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "or a new one with a password; save it"),
    ],
)  # fmt: skip
def test_documents_without_text_are_refused(place: Place, name: str, content: str | bytes, message: str) -> None:
    assert message in place.refused("corpus", (name, content))


def test_entities_that_multiply_are_refused(place: Place) -> None:
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    bomb = f'<!DOCTYPE d [<!ENTITY l0 "lol">{laughs}]><w:document xmlns:w="{W}"><w:body>&l9;</w:body></w:document>'
    with zipfile.ZipFile(io.BytesIO(docx("x"))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    packed = zipped(members | {"word/document.xml": bomb.encode()})
    assert "expected a Word document, found an error (" in place.refused("corpus", ("a.docx", packed))


@pytest.mark.parametrize("name", ["a.docx", "a.xlsx", "a.epub"])
def test_documents_that_unpack_to_very_much_are_refused(
    place: Place, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.download.content.archives.FREE_SIZE", 1000)
    member = {"a.docx": "word/document.xml", "a.xlsx": "xl/workbook.xml", "a.epub": "META-INF/container.xml"}[name]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, bytes(1_000_000))
    assert "unpacks to more than 200 times" in place.refused("corpus", (name, buffer.getvalue()))


def test_a_stated_format_must_fit(place: Place) -> None:
    assert "expected a PDF, found other content" in place.refused("corpus", ("a.pdf", "text"), format="pdf")
    assert place.texts("corpus", ("page", PAGE), format="html")[0].startswith("Lamps")
    assert place.texts("corpus", ("a.html", PAGE), format="text") == [PAGE]
    assert "expected data, found an HTML page" in place.refused("corpus", ("a.txt", PAGE))


def test_a_page_without_text_among_others_is_told(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "llm"):
        place.read("corpus", ("a.pdf", pdf("One.", "")))
    assert "1 of 2 pages have no text" in caplog.text


def test_rows_are_no_document(place: Place) -> None:
    assert "expected rows, found a PDF" in place.refused("messages", ("a.pdf", pdf("One.")))
    assert "expected rows, found a Word document" in place.refused("instructions", ("a.docx", docx("One.")))


def test_size_of_a_document_and_of_its_text_is_limited(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.download.content.extract.MAX_SIZE", 500)
    assert "at most 500 bytes of a document" in place.refused("corpus", ("a.html", PAGE + "x" * 500))
    monkeypatch.setattr("llm.download.content.extract.html_text", lambda page: "x" * 501)
    assert "at most 500 characters of text" in place.refused("corpus", ("b.html", PAGE))


def test_sheets_become_rows(place: Place) -> None:
    assert place.read("messages", ("a.xlsx", xlsx(Mails=MAILS, Empty=[]))) == [
        {"text": "Hi.", "label": "ham"},
        {"text": "Buy!", "label": "spam"},
    ]
    assert place.texts("corpus", ("a.xlsx", xlsx(Mails=MAILS)), text="sent") == ["2026-05-03"]
    assert place.texts("corpus", ("a.xlsx", xlsx(Mails=[[None], ["x"], [1.5]])), header=["text"]) == ["x", "1.5"]


def test_a_sheet_is_named_where_there_are_several(place: Place) -> None:
    content = xlsx(Mails=MAILS, Notes=[["note"], ["x"]])
    assert "expected one sheet with content, found 2: Mails, Notes" in place.refused("messages", ("a.xlsx", content))
    entry = {"path": place.put("b.xlsx", content), "member": "Mails"}
    assert len(place.read("messages", [entry])) == 2
    entry["member"] = "Mail"
    assert "expected a sheet 'Mail', found Mails, Notes" in place.refused("messages", [entry])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["body", "label"], ["Hi.", "ham"]], "sheet S, row 2: expected 'text', found only body, label"),
        ([["text", "text"], ["Hi.", "ham"]], "sheet S, row 1: expected each column once, found 'text' twice"),
        ([["text", "label"], ["Hi.", "ham", "more"]], "sheet S, row 2: expected 2 columns (text, label), found a cell"),
        ([["text", "label"], ["Hi.", None]], "sheet S, row 2: expected text in 'label', found none"),
    ],
)
def test_sheets_that_are_wrong_name_the_row(place: Place, rows: list[list[Any]], message: str) -> None:
    assert message in place.refused("messages", ("a.xlsx", xlsx(S=rows)))


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_without_what_is_no_text_of_its_own(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    kept = {"src/a.py": "print(1)\n", "src/deep/b.rs": "fn b() {}\n", "Makefile": "all:\n", "notes.md": "# N\n",
            "page.html": PAGE, "letter.docx": docx("Dear team,")}  # fmt: skip
    left_out = {".git/config.txt": "x", "src/.hidden.py": "x", "node_modules/lib/a.js": "x", "vendor/v.c": "x",
                "app.min.js": "x", "logo.png": b"\x89PNG\r\n", "src/__init__.py": "", "video.ts": bytes(9000),
                "package-lock.json": "{}"}  # fmt: skip
    for name, content in {**kept, **left_out}.items():
        place.put(name, content)
    (place.folder / "link.py").symlink_to(place.folder / "src/a.py")
    with caplog.at_level(logging.INFO, "llm"):
        texts = place.texts("corpus", [str(place.folder)])
    assert sorted(text.split("\n")[0] for text in texts) == sorted(
        ["print(1)", "fn b() {}", "all:", "# N", "Lamps", "Dear team,"]
    )
    assert "takes 6 files, leaves out: 3 hidden or vendored folders" in caplog.text


def test_a_folder_without_texts_is_refused(place: Place) -> None:
    place.put("rows/a.csv", "text,label\n")
    message = place.refused("messages", [str(place.folder / "rows")])
    assert "expected texts, documents or code in the folder, found none (*.csv); for files of rows write" in message
