# ruff: noqa: F401, F811  (fixtures of other modules)
"""A look at data that are elsewhere: little is fetched, nothing is fetched twice, and the proposal reads the rest."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm.cli.main import main
from llm.common.errors import InputError
from llm.config import CorpusSource, InstructionsSource, SourceFile, parse_params
from llm.download.fetching.fetch import fetch
from llm.download.look import first_records, look, named_entry
from llm.download.records.readers import write_records
from tests.conftest import ROOT
from tests.download.files import content, sha
from tests.download.test_fetch import Server, server
from tests.download.test_hub_data import COMMIT, Hub, parquet
from tests.download.test_hub_data import server as hub

LINES = [json.dumps({"instruction": f"Name number {i}.", "output": f"It is {i}, as said."}) + "\n" for i in range(5000)]
PAIRS = "".join(LINES).encode()
MOST = 100_000


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def looked(entry: SourceFile, cache: Path, scratch: Path, most: int = MOST) -> tuple[bytes, str | None]:
    seen = look(entry, cache, None, most, scratch)
    return content(seen.files[0]), seen.part


@pytest.mark.parametrize("packed", [False, True])
def test_the_first_bytes_of_a_large_file_end_with_a_whole_line(
    server: Server,
    cache: Path,
    scratch: Path,
    packed: bool,
) -> None:
    body = gzip.compress(PAIRS, mtime=0) if packed else PAIRS
    most = 10_000 if packed else MOST
    server.files["/a.jsonl"] = server.files["/a.jsonl.gz"] = body
    entry = SourceFile(url=f"{server.url}/a.jsonl{'.gz' if packed else ''}")
    start, part = looked(entry, cache, scratch, most)
    assert len(body) > most > 0 and start.endswith(b"}\n") and PAIRS.startswith(start)
    assert len(start) > most - 100
    assert part == f"the first {most:,} of {len(body):,} bytes, as far as whole lines go"


def test_a_later_download_goes_on_behind_the_first_bytes(server: Server, cache: Path, scratch: Path) -> None:
    server.files["/a.jsonl"] = PAIRS
    entry = SourceFile(url=f"{server.url}/a.jsonl")
    first, again = (looked(entry, cache, scratch) for _ in range(2))
    assert first == again
    (found,) = fetch(entry, cache)
    assert content(found) == PAIRS
    assert [wanted for _, wanted in server.asked] == [None, f"bytes={MOST}-", f"bytes={MOST}-"]


def test_a_small_file_is_fetched_whole_and_once(server: Server, cache: Path, scratch: Path) -> None:
    server.files["/a.jsonl"] = PAIRS[:MOST]
    entry = SourceFile(url=f"{server.url}/a.jsonl", sha256=sha(PAIRS[:MOST]))
    for _ in range(2):
        assert looked(entry, cache, scratch) == (PAIRS[:MOST], None)
    assert len(server.asked) == 1
    server.files["/b.jsonl"] = b"other" + PAIRS[:100]
    with pytest.raises(InputError, match="expected sha256"):
        looked(SourceFile(url=f"{server.url}/b.jsonl", sha256=sha(PAIRS)), cache, scratch)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("a.parquet", parquet(*(f"{i:x} {sha(str(i).encode())}" for i in range(2000)))),
        ("a.json", json.dumps(LINES).encode()),
        ("a.txt", ("line\n" * 30_000).encode("utf-16")),
        ("a.pdf", b"%PDF-1.7\n" + b"x" * 200_000),
    ],
)
def test_a_format_that_is_read_as_a_whole_is_refused_in_part(
    server: Server,
    cache: Path,
    scratch: Path,
    name: str,
    body: bytes,
) -> None:
    assert len(body) > MOST
    server.files[f"/{name}"] = body
    with pytest.raises(InputError, match="more than the 100,000 bytes that are fetched for a look, and this format"):
        looked(SourceFile(url=f"{server.url}/{name}"), cache, scratch)
    server.files["/b.png"] = b"\x89PNG\r\n\x1a\n" + bytes(200_000)
    with pytest.raises(InputError, match="found an image"):
        looked(SourceFile(url=f"{server.url}/b.png"), cache, scratch)


@pytest.mark.parametrize(
    ("name", "place", "member"),
    [
        ("hf:some/set", "some/set", None),
        (f"hf:some/set@{COMMIT}", f"some/set@{COMMIT}", None),
        ("hf://datasets/some/set@v1/data/a.parquet", "some/set@v1", "data/a.parquet"),
        ("hf://some/set/a.parquet", "some/set", "a.parquet"),
        ("hf:some/set@refs%2Fconvert%2Fparquet", "some/set@refs/convert/parquet", None),
    ],
)
def test_names_of_data_sets_of_the_hub(name: str, place: str, member: str | None) -> None:
    entry = named_entry(name)
    assert entry is not None and (entry.hf, entry.member) == (place, member)


def test_names_that_are_neither_a_url_nor_of_the_hub() -> None:
    assert named_entry("data/own/a.csv") is None and named_entry("C:\\data\\a.csv") is None
    with pytest.raises(InputError, match="expected hf:OWNER/NAME"):
        named_entry("hf:set")
    with pytest.raises(InputError, match="seems to hold a password or token") as caught:
        named_entry("https://me:secret@localhost/a.csv?token=secret")
    assert "secret" not in str(caught.value)


def test_of_a_data_set_of_the_hub_one_file_is_fetched(hub: Hub, cache: Path, scratch: Path) -> None:
    sizes = {"train-00000-of-00002": 50, "train-00001-of-00002": 5, "test-00000-of-00001": 1}
    hub.files |= {f"data/{name}.parquet": parquet(*(f"{name} {i}" for i in range(n))) for name, n in sizes.items()}
    entry = SourceFile(hf=f"some/set@{COMMIT}")
    [file] = look(entry, cache, None, MOST, scratch).files
    assert file.name.endswith("/data/train-00001-of-00002.parquet")
    assert sum("/resolve/" in path for path in set(hub.asked)) == 1
    with pytest.raises(InputError, match=r"train-00001-of-00002\.parquet has [\d,]+ bytes, more than the 9 that"):
        look(entry, cache, None, 9, scratch)


def test_first_records_stop_where_they_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(PAIRS + b'{"instruction": "", "output": "x"}\n' + PAIRS)

    def first(rows: int, **options: Any) -> tuple[int, int, bool]:
        section = InstructionsSource(files=[str(path)], **options)
        found = first_records(section, fetch(section.files[0], tmp_path), rows)
        return len(found.records), found.left_out.counts.total(), found.is_all

    assert first(10) == (10, 0, False)
    assert first(20_000) == (10_000, 1, True)
    assert first(10, max_rows=4) == (4, 0, True)
    assert first(10, max_rows=40) == (10, 0, False)


def test_documents_of_several_files_are_numbered(tmp_path: Path) -> None:
    names = ("a.txt", "b.txt")
    for name in names:
        (tmp_path / name).write_text(f"{name} one\n\n{name} two", encoding="utf-8")
    section = CorpusSource(files=[str(tmp_path / name) for name in names], document_separator="\n\n", max_rows=3)
    files = [file for entry in section.files for file in fetch(section.entry(entry), tmp_path)]
    found = first_records(section, files, 100)
    assert [(each["doc"], each["text"]) for each in found.records] == [
        (0, "a.txt one"),
        (1, "a.txt two"),
        (2, "b.txt one"),
    ]
    assert found.is_all


# ---- the command -----------------------------------------------------------------------------------------------------


def printed_params(out: str, kind: str) -> Any:
    """Return the section that the printed lines for params.yaml give, pasted into the shipped ones."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    proposed = yaml.safe_load(out.partition("for params.yaml:\n")[2])
    values["data"] |= proposed["data"]
    values["sources"] |= proposed["sources"]
    return getattr(parse_params(values).sources["mine"], kind)


def test_the_proposal_for_a_url_reads_it(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    server.files["/a.jsonl"] = PAIRS
    assert main(["inspect", f"{server.url}/a.jsonl", "--rows", "50"]) == 0
    out = capsys.readouterr().out
    assert "looks like: JSON Lines with 2 columns (instruction, output), UTF-8\nread as:    instructions\n" in out
    assert f'sha256: "{sha(PAIRS)}"' in out and "of the first 50 records:" in out
    section = printed_params(out, "instructions")
    written = write_records(section, fetch(section.files[0], tmp_path / ".work/downloads"), tmp_path / "out.jsonl")
    assert written.counts == [5000] and len(server.asked) == 1, "the stage finds the download"


def test_a_large_url_is_known_by_its_beginning(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    server.files["/a.jsonl"] = PAIRS * 8
    assert main(["inspect", f"{server.url}/a.jsonl", "--max-mb", "1", "--rows", "100000"]) == 0
    out = capsys.readouterr().out
    total = f"{len(PAIRS) * 8:,}"
    assert f"fetched:    the first 1,000,000 of {total} bytes, as far as whole lines go; its hash is not known" in out
    assert re.search(r"^of the first 1\d,\d{3} records:$", out, re.MULTILINE) and "sha256" not in out
    assert printed_params(out, "instructions").files[0].url == f"{server.url}/a.jsonl"


def test_the_proposal_for_a_data_set_keeps_its_splits(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.files |= {f"{name}.parquet": parquet(*(f"{name} {i}" for i in range(30))) for name in ("train", "test")}
    assert main(["inspect", "hf:some/set"]) == 0
    section = printed_params(capsys.readouterr().out, "messages")
    assert section.files[0].hf == f"some/set@{COMMIT}"
    written = write_records(section, fetch(section.files[0], tmp_path), tmp_path / "out.jsonl")
    assert sorted(written.counts) == [30, 30] and written.labels == ["ham", "spam"]


def test_a_source_of_params_with_a_large_download_is_read_in_part(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    stories = "".join(f"The story of number {i}.\n<|endoftext|>\n" for i in range(40_000)).encode()
    server.files["/stories.txt"] = stories
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["sources"]["tinystories"]["corpus"]["files"] = [{"url": f"{server.url}/stories.txt", "sha256": sha(stories)}]
    Path("params.yaml").write_text(yaml.safe_dump(values))
    assert main(["inspect", "tinystories", "--max-mb", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("source:     tinystories, corpus (licence: CDLA-Sharing-1.0)\n")
    assert f"stories.txt: the first 1,000,000 of {len(stories):,} bytes" in out
    assert '{"text": "The story of number 0.' in out and out.endswith("data:\n  corpus: tinystories\n")
