"""Extract the text of documents, PDF, HTML, EPUB and DOCX, and the rows of Excel sheets.

The extractors are other projects' (extra `documents`). They hold a document whole, so its size is limited, and so is
what it unpacks to.
"""

from __future__ import annotations

import logging
import posixpath
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime, time, timedelta
from importlib.util import find_spec
from typing import IO, Any
from urllib.parse import unquote
from xml.etree import ElementTree

from llm.common.errors import InputError
from llm.common.sanitize import error_text
from llm.config import ReadOptions, SourceFile
from llm.download.content.archives import DataFile, check_ratio, document_of, open_zip, seekable
from llm.download.content.encodings import decode_text, find_encoding
from llm.download.content.formats import Row, Wanted
from llm.download.content.signatures import DOCUMENTS, HTML, HTML_SUFFIXES, archive_of

MAX_SIZE = 1 << 28  # bytes of a document, and characters of its text
PACKAGES = {"pdf": "pypdf", "html": "resiliparse", "epub": "resiliparse", "docx": "mammoth", "xlsx": "openpyxl"}
CHARSET = re.compile(
    rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{1,40})|^<\?xml[^>]*?encoding=[\"']([\w.:-]{1,40})", re.I
)
NO_CONTENT = ["nav", "footer", "aside"]  # elements of a page that repeat on others

log = logging.getLogger("llm")


def document_kind(file: DataFile, head: bytes, stated: str | None) -> str | None:
    """Return `pdf`, `html`, `epub`, `docx` or `xlsx` for a document, by its content; None for any other file."""
    if stated is not None and stated not in DOCUMENTS:
        return None
    found = None
    if head.startswith(b"%PDF-"):
        found = "pdf"
    elif archive_of(head) == ".zip":
        with seekable(file) as stream, _document_errors(file, "zip"):
            found = document_of(stream)
    elif stated == "html" or (file.suffix in HTML_SUFFIXES and HTML.match(head)):
        found = "html"
    if stated in DOCUMENTS and found != stated:
        raise InputError(f"{file}: expected {DOCUMENTS[stated]}, found other content; correct format:")
    return found


def extract_text(file: DataFile, kind: str, options: ReadOptions) -> Iterator[str]:
    """Yield the text of a document part by part: a page, a chapter or the whole."""
    if file.size > MAX_SIZE:
        raise InputError(f"{file}: expected at most {MAX_SIZE:,} bytes of a document, found {file.size:,}; divide it")
    _check_package(file, kind)
    size = 0
    with _document_errors(file, kind):
        for text in _EXTRACTORS[kind](file, options):
            size += len(text)
            check_ratio(str(file), size, file.size)
            if size > MAX_SIZE:
                raise InputError(f"{file}: expected at most {MAX_SIZE:,} characters of text, found more; divide it")
            yield text.replace("\r\n", "\n") + "\n\n"


def _check_package(file: DataFile, kind: str) -> None:
    if find_spec(PACKAGES[kind]) is None:
        raise InputError(f"{file}: reading {DOCUMENTS[kind]} needs {PACKAGES[kind]}; pip install 'textmill[documents]'")


@contextmanager
def _document_errors(file: DataFile, kind: str) -> Iterator[None]:
    """Turn an extractor's errors, which may be of any type, into one `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        noun = DOCUMENTS.get(kind, "an archive")
        problem = error_text(error) or type(error).__name__
        raise InputError(
            f"{file}: expected {noun}, found an error ({problem}); save it again or leave it out"
        ) from None


def _pdf(file: DataFile, options: ReadOptions) -> Iterator[str]:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of every small flaw
    with seekable(file) as stream:
        reader = pypdf.PdfReader(stream)
        if reader.is_encrypted and not reader.decrypt(""):
            raise InputError(f"{file}: expected an open PDF, found one with a password; save it without")
        pages, blank = len(reader.pages), 0
        for number in range(pages):
            text = reader.pages[number].extract_text().encode(errors="replace").decode()
            blank += not text.strip()
            yield text
        if blank == pages:
            problem = f"found {pages} pages of pictures alone, scanned perhaps"
            raise InputError(f"{file}: expected text, {problem}; recognize its text first, for example by ocrmypdf")
        if blank:
            log.warning("%s: %d of %d pages have no text (pictures?)", file, blank, pages)


def _html(file: DataFile, options: ReadOptions) -> Iterator[str]:
    encoding, head = options.encoding, file.head()
    if encoding is None and find_encoding(head) == "utf-8" and (found := CHARSET.search(head[:4096])):
        encoding = (found[1] or found[2]).decode()
    try:
        "".encode(encoding or "utf-8")
    except LookupError:
        raise InputError(f"{file}: states an encoding that is not known, {encoding!r}; state encoding:") from None
    yield html_text("".join(decode_text(file, encoding)))


def html_text(page: str) -> str:
    """Return the text of a page without navigation, footers and asides, a blank line between paragraphs."""
    from resiliparse.extract.html2text import extract_plain_text

    text: str = extract_plain_text(page, preserve_formatting=True, alt_texts=False, skip_elements=NO_CONTENT)
    return text


def _docx(file: DataFile, options: ReadOptions) -> Iterator[str]:
    import mammoth

    with seekable(file) as stream, _checked_zip(file, stream):
        no_image = mammoth.images.img_element(lambda image: {"src": ""})
        yield html_text(mammoth.convert_to_html(stream, convert_image=no_image).value)


def _epub(file: DataFile, options: ReadOptions) -> Iterator[str]:
    """Yield the chapters of a book in their order (EPUB 3.3: container, package document, spine)."""
    with seekable(file) as stream, _checked_zip(file, stream) as archive:
        names = set(archive.namelist())
        if "META-INF/rights.xml" in names or b"http://www.w3.org/2001/04/xmlenc#aes" in (
            archive.read("META-INF/encryption.xml") if "META-INF/encryption.xml" in names else b""
        ):
            raise InputError(f"{file}: expected an open book, found an encrypted one (DRM); leave it out")
        container = ElementTree.fromstring(archive.read("META-INF/container.xml"))
        root = next(each.attrib["full-path"] for each in container.iter() if each.tag.endswith("}rootfile"))
        package = ElementTree.fromstring(archive.read(root))
        items = {each.attrib["id"]: each.attrib for each in package.iter() if each.tag.endswith("}item")}
        order = [items[each.attrib["idref"]] for each in package.iter() if each.tag.endswith("}itemref")]
        for item in order:
            if "nav" not in item.get("properties", "").split() and "html" in item.get("media-type", ""):
                path = posixpath.normpath(posixpath.join(posixpath.dirname(root), unquote(item["href"])))
                yield html_text(archive.read(path).decode("utf-8-sig"))


_EXTRACTORS = {"pdf": _pdf, "html": _html, "docx": _docx, "epub": _epub}


@contextmanager
def _checked_zip(file: DataFile, stream: IO[bytes]) -> Iterator[zipfile.ZipFile]:
    """Open a document that is a zip archive, unless it unpacks to much more than its size."""
    with open_zip(stream) as archive:
        check_ratio(str(file), sum(info.file_size for info in archive.infolist()), file.size)
        yield archive


# ---- sheets ----------------------------------------------------------------------------------------------------------


def sheet_rows(file: DataFile, wanted: Wanted, options: ReadOptions) -> Iterator[Row]:
    """Yield the rows of an Excel sheet: of the only one with content, or of the one that `member:` names."""
    import openpyxl

    _check_package(file, "xlsx")
    with _document_errors(file, "xlsx"), seekable(file) as stream:
        with _checked_zip(file, stream):
            pass
        book = openpyxl.load_workbook(stream, read_only=True, data_only=True)
        sheet = _choose_sheet(file, book, options)
        rows = ([_cell(value) for value in row] for row in sheet.iter_rows(values_only=True))
        filled = ((number, cells) for number, cells in enumerate(rows, 1) if any(cell is not None for cell in cells))
        where = f"{file}, sheet {sheet.title}"
        names = _sheet_columns(where, filled, options)
        for number, cells in filled:
            extra = [cell for cell in cells[len(names) :] if cell is not None]
            if extra:
                problem = f"expected {len(names)} columns ({', '.join(names)}), found a cell beyond them"
                yield f"{where}, row {number}", InputError(f"{where}, row {number}: {problem}; correct the row")
                continue
            padded = [*cells, *[None] * (len(names) - len(cells))]
            yield f"{where}, row {number}", dict(zip(names, padded, strict=False))


def _choose_sheet(file: DataFile, book: Any, options: ReadOptions) -> Any:
    wanted = options.member if isinstance(options, SourceFile) and file.member is None else None
    if wanted is not None:
        if wanted not in book.sheetnames:
            raise InputError(
                f"{file}: expected a sheet {wanted!r}, found {', '.join(book.sheetnames)}; correct member:"
            )
        return book[wanted]
    filled = [
        sheet
        for sheet in book.worksheets
        if any(cell is not None for row in sheet.iter_rows(values_only=True, max_row=50) for cell in row)
    ]
    if len(filled) != 1:
        names = ", ".join(sheet.title for sheet in filled) or "none"
        raise InputError(
            f"{file}: expected one sheet with content, found {len(filled)}: {names}; say which with member:"
        )
    return filled[0]


def _sheet_columns(where: str, rows: Iterator[tuple[int, Sequence[Any]]], options: ReadOptions) -> list[str]:
    """Return the names of the columns: as stated, or of the first row, which is taken from `rows`."""
    if isinstance(options.header, list):
        return options.header
    number, first = next(rows, (1, []))
    if options.header is False:
        raise InputError(f"{where}: a sheet without header needs the names of its columns; write header: [text, ...]")
    while first and first[-1] is None:
        first = first[:-1]
    names = [f"column{i}" if cell is None else str(cell).strip() for i, cell in enumerate(first, 1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{where}, row {number}: expected each column once, found {twice[0]!r} twice; rename one")
    return names


def _cell(value: Any) -> Any:
    """Return a cell as a row of JSON would have it: dates as text, blank text as nothing."""
    if isinstance(value, datetime) and value.time() == time():
        value = value.date()
    if isinstance(value, date | time | timedelta):
        return str(value)
    return None if isinstance(value, str) and not value.strip() else value
