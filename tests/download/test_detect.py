"""Files that are not what their name says: read as what they are, or refused by that name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sqlite3
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from llm.download.content import encodings
from tests.download.files import zipped
from tests.download.sources import Place

TABLE = "text,label\nhi there,ham\nWIN,spam\n"
TEXTS = ["hi there", "WIN"]


def parquet(**columns: list[str]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


# ---- other content under a name --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a", "a.tsv", "a.json"])
@pytest.mark.parametrize("packing", ["gzip", "zip", "parquet", "bz2", "xz", "zst"])
def test_packed_tables_are_read_under_any_name(place: Place, name: str, packing: str) -> None:
    content = {
        "gzip": lambda: gzip.compress(TABLE.encode()),
        "bz2": lambda: bz2.compress(TABLE.encode()),
        "xz": lambda: lzma.compress(TABLE.encode()),
        "zst": lambda: zstd.compress(TABLE.encode()),
        "zip": lambda: zipped({"inner.csv": TABLE.encode()}),
        "parquet": lambda: parquet(text=TEXTS, label=["ham", "spam"]),
    }[packing]()
    options = {"format": "csv"} if name == "a.json" and packing not in ("zip", "parquet") else {}
    assert place.texts("messages", (name, content), **options) == TEXTS


def office(member: str) -> bytes:
    return zipped({"[Content_Types].xml": b"<x/>", member: b"<x/>"})


def sqlite() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE t (a TEXT)")
    return connection.serialize()


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.xlsx", "a"])
@pytest.mark.parametrize(
    ("content", "noun"),
    [
        (office("xl/workbook.bin"), "an Excel workbook in binary form (.xlsb); save it as .xlsx"),
        (office("ppt/presentation.xml"), "a PowerPoint presentation"),
        (office("META-INF/manifest.xml"), "an OpenDocument file"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "an old Excel or Word file"),
        (sqlite(), "an SQLite database; export the table"),
        (b"{\\rtf1\\ansi hello}", "an RTF document"),
        (b"7z\xbc\xaf\x27\x1c\x00\x04", "a 7z archive"),
        (b"Rar!\x1a\x07\x01\x00", "a RAR archive"),
        (b"\x89PNG\r\n\x1a\n", "an image"),
        (b"ARROW1\x00\x00", "an Arrow file"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)
def test_what_no_reader_takes_is_named(place: Place, name: str, content: bytes, noun: str) -> None:
    for kind in ("messages", "corpus"):
        assert f"{name}: expected text or rows, found {noun}" in place.refused(kind, (name, content))


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
ANNEX = "/annex/objects/SHA256E-s123--4d7a.csv\n"


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.parquet", "a.zip", "a.txt.gz", "a.tar.gz", "a"])
@pytest.mark.parametrize(("pointer", "command"), [(LFS, "git lfs pull"), (ANNEX, "git annex get")])
def test_a_pointer_is_no_data(place: Place, name: str, pointer: str, command: str) -> None:
    for kind in ("corpus", "messages"):
        message = place.refused(kind, (name, pointer))
        assert message.startswith(f"{name}: expected the file itself, found a pointer") and command in message


def test_a_pointer_in_an_archive_is_no_data(place: Place) -> None:
    packed = zipped({"data/a.txt": LFS.encode()})  # as GitHub packs a repository
    assert "a.zip:data/a.txt: expected the file itself" in place.refused("corpus", ("a.zip", packed))
    assert "git lfs pull" in place.refused("corpus", ("a.txt.gz", gzip.compress(LFS.encode())))


def test_a_text_about_pointers_is_text(place: Place) -> None:
    text = "The file begins with:\n" + LFS
    assert place.texts("corpus", ("a.txt", text)) == [text]


# ---- names without a known ending ------------------------------------------------------------------------------------

LINES = '{"text": "hi there", "label": "ham"}\n{"text": "WIN", "label": "spam"}\n'


@pytest.mark.parametrize("name", ["a", "a.ndjson", "a.dat", "a.txt", "download"])
@pytest.mark.parametrize("content", [LINES, json.dumps([json.loads(line) for line in LINES.splitlines()], indent=1)])
def test_rows_are_read_by_content(place: Place, name: str, content: str) -> None:
    options = {"format": "json"} if name == "a.ndjson" and content.startswith("[") else {}
    assert place.texts("messages", (name, content), **options) == TEXTS
    if name != "a.txt":  # which is text for a corpus
        assert place.texts("corpus", (name, content)) == TEXTS


@pytest.mark.parametrize("name", ["a.py", "README", "a.rst", "a.tex", "a.log", "a.text", "a.c"])
@pytest.mark.parametrize(
    "content", ["import os\nprint(1)\n", "[a]\nb, c\n", '{"text" is no JSON\n', "text\nand text\n"]
)
def test_any_text_is_a_corpus(place: Place, name: str, content: str) -> None:
    assert place.texts("corpus", (name, content)) == [content]


def test_a_table_without_an_ending_is_a_table_for_a_corpus_too(place: Place) -> None:
    assert place.texts("corpus", ("a", "id;text\n1;hello\n2;you\n")) == ["hello", "you"]
    assert place.texts("corpus", ("a", "id;text\n1;hello\n"), format="text") == ["id;text\n1;hello\n"]


def test_a_format_is_stated(place: Place) -> None:
    page = "<!DOCTYPE html><html><body>Hi</body></html>"
    assert "format: text" in place.refused("corpus", ("a.txt", page))
    assert place.texts("corpus", ("a.html", page), format="text") == [page]
    files = [{"path": place.put("a.log", LINES), "format": "jsonl"}, {"path": place.put("b.log", TABLE)}]
    assert place.texts("messages", files, format="csv") == TEXTS * 2  # a file's own option comes first
    assert place.texts("corpus", ("a.json", "plain"), format="text") == ["plain"]


@pytest.mark.parametrize(("content", "seen"), [(bytes(range(256)), "no ending"), ("no table at all\n", "no ending")])
def test_what_has_no_rows_is_refused(place: Place, content: bytes | str, seen: str) -> None:
    message = place.refused("messages", ("a", content))
    assert "expected a name that ends in .jsonl .json .csv .tsv .parquet .xlsx (rows)" in message and seen in message
    assert "format:" in message


@pytest.mark.parametrize("query", ["", "?download=true", "?format=csv&x=a.b"])
def test_a_url_needs_no_ending(place: Place, query: str) -> None:
    """The query belongs to no name, and the content tells."""
    url = Path(place.put("export", TABLE)).as_uri()
    assert place.texts("messages", [{"url": url}]) == TEXTS


# ---- encodings -------------------------------------------------------------------------------------------------------

RUSSIAN = "text,label\nПривет, как дела? Сегодня я получил письмо от банка,ham\n".replace(", к", " к")
CHINESE = "text,label\n你好，我的订单还没有到，请问什么时候可以发货？谢谢。今天天气很好，我们去公园散步吧。,ham\n"
GERMAN = "text,label\nKönnten Sie mir bitte die Größe der Schuhe nennen? Übrigens sind sie zu groß für mich.,ham\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a"])
def test_unicode_is_read_as_it_comes(place: Place, encoding: str, name: str) -> None:
    english = "text,label\r\n" + "".join(f"Grüße number {i},ham\r\n" for i in range(20))
    for table in (RUSSIAN, english):
        texts = [line.rpartition(",")[0] for line in table.splitlines()[1:]]
        assert place.texts("messages", (name, table.encode(encoding))) == texts
    text = "A whole text.\nÄ second line. 😀\n"
    assert place.texts("corpus", ("b.txt", text.encode(encoding))) == [text]


@pytest.mark.parametrize(
    ("table", "encoding", "named"),
    [
        (RUSSIAN, "cp1251", "windows-1251"),
        (RUSSIAN, "koi8-r", "koi8_r"),
        (RUSSIAN, "cp866", "cp866"),
        (CHINESE, "gbk", "gb18030"),
        (CHINESE, "gb18030", "gb18030"),
        (GERMAN, "cp1252", "windows-1252"),
        (GERMAN, "latin-1", "windows-1252"),
    ],
)
def test_the_hint_leads_to_the_text(place: Place, table: str, encoding: str, named: str) -> None:
    file = ("a.csv", table.encode(encoding))
    message = place.refused("messages", file)
    assert "expected UTF-8, found byte 0x" in message and message.endswith(f"write encoding: {named}")
    expected = [table.splitlines()[1].removesuffix(",ham")]
    assert place.texts("messages", file, encoding=named) == expected
    assert place.texts("messages", [{"path": place.put(*file), "encoding": encoding}]) == expected


SENTENCES = {
    "cp1250": "Dobrý den, ještě jsem nedostal svou objednávku. Děkuji, těším se na odpověď.",
    "iso8859-2": "Proszę o szybką odpowiedź, ponieważ święta się zbliżają.",
    "cp1252": "Bonjour, je n'ai pas reçu ma commande et j'ai déjà payé. Très déçu, à bientôt.",
    "cp1253": "Καλημέρα, δεν έχω λάβει ακόμα την παραγγελία μου. Ευχαριστώ πολύ.",
    "cp1254": "Merhaba, siparişim hâlâ gelmedi. Bana yardımcı olabilir misiniz? Çok teşekkür ederim.",
    "cp1255": "שלום, עדיין לא קיבלתי את ההזמנה שלי. תודה רבה.",
    "cp1256": "مرحبا، لم أستلم طلبي حتى الآن. شكرا جزيلا لكم.",
    "iso8859-5": "Привет, как дела? Сегодня я получил письмо.",
    "big5": "您好，我的訂單還沒有到，請問什麼時候可以發貨？謝謝。",
    "shift_jis": "こんにちは、注文した商品がまだ届いていません。",
    "euc_jp": "こんにちは、注文した商品がまだ届いていません。",
    "cp949": "안녕하세요, 주문한 상품이 아직 도착하지 않았습니다. 감사합니다.",
    "mac_roman": "Très déçu, à bientôt. Où est ma commande ? Ça va être réglé.",
}


@pytest.mark.parametrize("encoding", SENTENCES)
@pytest.mark.parametrize("times", [1, 5])
def test_a_guess_is_right_or_none(encoding: str, times: int) -> None:
    text = f"{SENTENCES[encoding]}\n" * times
    guessed = encodings.guess(text.encode(encoding))
    assert guessed is None or guessed[1] == text


@pytest.mark.parametrize(
    "content", [b"only a caf\xe9 au lait", b"it\x92s fine", bytes(range(128, 256)), b"x\xff\xfe\xfdy"]
)
def test_no_hint_without_evidence(place: Place, content: bytes) -> None:
    message = place.refused("corpus", ("a.txt", content))
    assert "it may be" not in message and "write its encoding:" in message


def test_a_damaged_character_in_utf_8_is_no_other_encoding(place: Place) -> None:
    text = "Grüße aus München, und schöne Ferien. ".encode() * 3 + b"caf\xe9"
    assert "the text around is UTF-8, so correct that place" in place.refused("corpus", ("a.txt", text))


def test_a_stated_encoding_that_does_not_fit(place: Place) -> None:
    message = place.refused("corpus", ("a.txt", "Grüße".encode()), encoding="ascii")
    assert "expected ascii, found byte 0xc3 at offset 2; state another encoding:" in message


def test_zero_bytes_are_no_text(place: Place) -> None:
    assert "expected UTF-8, found zero bytes, the first at offset 0" in place.refused("corpus", ("a.txt", bytes(100)))


def test_a_head_of_ascii_does_not_hide_the_rest(place: Place) -> None:
    content = b"plain text\n" * 20_000 + RUSSIAN.encode("cp1251")
    assert "write encoding: windows-1251" in place.refused("corpus", ("a.txt", content))


# ---- splits by file --------------------------------------------------------------------------------------------------


def put_splits(place: Place, names: Mapping[str, str]) -> None:
    for name, text in names.items():
        place.put(name, parquet(text=[text], label=["ham"]) if name.endswith("t") else f"text,label\n{text},ham\n")


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("sst_train.csv", "sst_dev.csv", "sst_test.csv"),
        ("Train.csv", "Validation.csv"),
        ("train/0.csv", "test/0.csv"),
        ("a.training.csv", "a.eval.csv"),
    ],
)
def test_names_of_splits_in_one_glob_are_asked_about(place: Place, names: tuple[str, ...]) -> None:
    put_splits(place, dict.fromkeys(names, "x"))
    pattern = [f"{place.folder}/**/*.{names[0].rpartition('.')[2]}"]
    for files in (pattern, [f"{place.folder}/{name}" for name in names]):
        message = place.refused("messages", files)
        assert "found names of splits: " in message and "train: [...]" in message and "split: mixed" in message
    assert "corpus" not in message and "list those to train on" in place.refused("corpus", pattern)
    mixed = [{"path": pattern[0], "split": "mixed"}]
    assert len(place.read("messages", mixed)) == len(names) and "split" not in place.read("messages", mixed)[0]
    by_name = place.read("messages", [{"path": pattern[0], "split": "from_name"}])
    assert {record["split"] for record in by_name} > {"train"} and len({r["split"] for r in by_name}) == len(names)


def test_files_are_given_to_splits(place: Place) -> None:
    put_splits(place, {"one.csv": "1", "two.csv": "2", "three.csv": "3", "four.csv": "4"})
    path = {name: f"{place.folder}/{name}.csv" for name in ("one", "two", "three", "four")}
    files = {"train": [path["one"], {"path": path["two"]}], "validation": path["three"], "test": path["four"]}
    read = place.read("messages", files)
    assert [(row["text"], row["split"]) for row in read] == [
        ("1", "train"), ("2", "train"), ("3", "val"), ("4", "test"),
    ]  # fmt: skip
    partly = [{"path": path["one"], "split": "train"}, path["two"]]
    assert "two.csv: expected a split" in place.refused("messages", partly)
    assert "train, validation or test in its name" in place.refused(
        "messages", [{"path": path["one"], "split": "from_name"}]
    )
    assert "one split" in place.refused("messages", {"train": path["one"]}, split="label")
    assert "split anew by document" in place.refused("corpus", {"train": path["one"]})


def test_members_of_an_archive_have_names_of_splits_too(place: Place) -> None:
    packed = zipped({"train.csv": TABLE.encode(), "test.csv": TABLE.encode()})
    files = [{"path": place.put("a.zip", packed), "member": "*.csv"}]
    assert "a.zip:train.csv (train)" in place.refused("messages", files)
    assert len(place.read("messages", [{**files[0], "split": "from_name"}])) == 4


def test_words_that_contain_a_split_are_none(place: Place) -> None:
    put_splits(place, {"trainer.csv": "1", "contest.csv": "2", "testament.csv": "3"})
    assert len(place.read("messages", [f"{place.folder}/*.csv"])) == 3
    put_splits(place, {"test.csv": "4"})  # one split alone is a name
    assert len(place.read("messages", [f"{place.folder}/*.csv"])) == 4


@pytest.mark.parametrize(
    ("word", "split"),
    [
        ("Train", "train"),
        ("training", "train"),
        ("dev", "val"),
        ("VALID", "val"),
        ("validation", "val"),
        (" Test", "test"),
    ],
)
def test_a_column_names_splits_as_others_do(place: Place, word: str, split: str) -> None:
    (row,) = place.read("messages", ("a.csv", f"text,label,part\nhi,ham,{word}\n"), split="part")
    assert row["split"] == split


def test_a_zip_in_a_zip_member_is_unpacked_once(place: Place) -> None:
    packed = zipped({"a.csv.gz": gzip.compress(TABLE.encode())})
    assert place.texts("messages", ("a.zip", packed)) == TEXTS
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("b.zip", zipped({"x.csv": TABLE.encode()}))
    assert "found .zip" in place.refused("messages", ("c.zip", inner.getvalue()))
