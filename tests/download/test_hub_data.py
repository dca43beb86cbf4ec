"""Data sets of the hub, from a server that speaks its paths."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from llm.common.errors import InputError
from llm.config import parse_params
from llm.preprocess.supervised import read_instructions
from tests.conftest import ROOT
from tests.download.sources import Place

constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def parquet(*texts: str) -> bytes:
    buffer = io.BytesIO()
    rows = [{"text": text, "label": "ham" if i % 2 else "spam"} for i, text in enumerate(texts)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


class Hub:
    """A data set, and the requests for it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"README.md": b"# A data set\n"}
        self.name, self.commit = "some/set", COMMIT
        self.wrong_hash = False
        self.asked: list[str] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        name = self.name.split("/")
        if parts[:4] == ["api", "datasets", *name] and parts[4:] in (
            [],
            ["revision", "main"],
            ["revision", self.commit],
        ):
            siblings = [self.entry(name) for name in self.files]
            return 200, {}, json.dumps({"id": self.name, "sha": self.commit, "siblings": siblings}).encode()
        if parts[:5] == ["datasets", *name, "resolve", self.commit] and "/".join(parts[5:]) in self.files:
            content = self.files["/".join(parts[5:])]
            digest = hashlib.sha256(content).hexdigest()
            return (
                200,
                {"X-Repo-Commit": self.commit, "ETag": f'"{digest}"', "X-Linked-Size": str(len(content))},
                content,
            )
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def entry(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        digest = hashlib.sha256(content + b"!" * self.wrong_hash).hexdigest()
        lfs = {"lfs": {"sha256": digest, "size": len(content), "pointerSize": 1}} if name.endswith("parquet") else {}
        return {"rfilename": name, "size": len(content), "blobId": "0" * 40} | lfs


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with one data set; the client's cache is a folder of this test."""
    data = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data.asked.append(self.path)
            status, headers, content = data.answer(self.path)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{http.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # conftest has set it
        yield data
        http.shutdown()


def test_a_corpus_takes_the_files_of_one_split(server: Hub, place: Place) -> None:
    server.files |= {f"data/{name}-00000-of-00001.parquet": parquet(name, f"{name} more") for name in ("train", "test")}
    server.files["data/train.csv"] = b"text\nthe same rows again\n"
    entry = {"hf": f"some/set@{COMMIT}", "split": "train"}
    assert place.texts("corpus", [entry]) == ["train", "train more"]
    assert place.written is not None and place.written.counts == [2]
    assert not [path for path in server.asked if "test-0" in path], "no other file is fetched"


def test_messages_keep_the_splits_of_the_data_set(server: Hub, place: Place) -> None:
    server.files |= {f"{name}.parquet": parquet(f"{name} a", f"{name} b") for name in ("train", "validation", "test")}
    records = place.read("messages", [{"hf": f"some/set@{COMMIT}", "split": "from_name"}])
    assert [(r["text"], r["split"]) for r in records] == [
        (f"{name} {letter}", name.removesuffix("idation"))
        for name in ("test", "train", "validation")
        for letter in "ab"
    ]
    files = {"train": [{"hf": f"some/set@{COMMIT}"}], "test": [{"hf": f"some/set@{COMMIT}"}]}
    assert {(r["text"], r["split"]) for r in place.read("messages", files)} == {
        (f"{name} {letter}", name) for name in ("train", "test") for letter in "ab"
    }
    assert "found names of splits" in place_refused(place, "messages", f"some/set@{COMMIT}")


def place_refused(place: Place, kind: str, name: str, **entry: str) -> str:
    """Return the line that refuses a data set."""
    with pytest.raises(InputError) as caught:
        place.read(kind, [{"hf": name} | entry])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_revision_that_may_move_is_told_and_named(
    server: Hub, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    server.files["train.parquet"] = parquet("a", "b")
    assert place.texts("corpus", [{"hf": "some/set"}]) == ["a", "b"]
    assert f"not pinned, so it may change unnoticed; write hf: some/set@{COMMIT}" in caplog.text
    caplog.clear()
    place.texts("corpus", [{"hf": f"some/set@{COMMIT}"}])
    assert "not pinned" not in caplog.text


def test_a_file_with_another_hash_than_the_hub_states_is_refused(server: Hub, place: Place) -> None:
    server.files["train.parquet"] = parquet("a", "b")
    server.wrong_hash = True
    message = place_refused(place, "corpus", f"some/set@{COMMIT}")
    assert f"hf://datasets/some/set@{COMMIT}/train.parquet: expected sha256 " in message


def test_subsets_are_not_mixed(server: Hub, place: Place) -> None:
    server.files |= {f"{name}/train/0000.parquet": parquet(name) for name in ("de", "en")}
    message = place_refused(place, "corpus", f"some/set@{COMMIT}", split="train")
    assert message.endswith("expected one subset, found de, en; choose with member:, as in de/*")
    assert place.texts("corpus", [{"hf": f"some/set@{COMMIT}", "member": "en/*"}]) == ["en"]


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        (f"some/set@{COMMIT}", {"split": "val"}, "expected files of data for split: val, found 2: README.md, train"),
        (f"some/set@{COMMIT}", {"member": "*.zip"}, "expected files of data for member: *.zip, found 2: README.md"),
        ("some/other", {}, "the hub did not give it ("),
        ("some/set@gone", {}, "the hub did not give it ("),
    ],
)
def test_what_the_hub_lacks_is_one_line(
    server: Hub, place: Place, name: str, entry: dict[str, str], message: str
) -> None:
    server.files["train.parquet"] = parquet("a")
    assert message in place_refused(place, "corpus", name, **entry)


def test_without_network_the_cache_serves(server: Hub, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["train.parquet"] = parquet("a", "b")
    entry = {"hf": f"some/set@{COMMIT}"}
    first = place.texts("corpus", [entry])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert place.texts("corpus", [entry]) == first


def test_the_shipped_conversations_are_read_as_they_are_served(server: Hub, place: Place) -> None:
    """The data set has its splits in the names of its files, a column of messages, and others beside it."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    section = parse_params(values).sources["everyday-conversations"].instructions
    assert section is not None and section.files[0].hf is not None
    server.name, _, server.commit = section.files[0].hf.partition("@")
    assert len(server.commit) == 40
    for split, topic in (("train", "Travel"), ("test", "Water cycle")):
        talk = [
            {"role": role, "content": text}
            for role, text in (("user", "Hi"), ("assistant", "Hello!"), ("user", topic), ("assistant", "Of course."))
        ]
        rows = [{"topic": topic, "prompt": "Hi", "completion": "Hello!", "token_length": 9, "messages": talk}] * 2
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        server.files[f"data/{split}_sft-00000-of-00001.parquet"] = buffer.getvalue()
    options = section.model_dump(exclude_unset=True, exclude={"files"})
    records = place.read("instructions", [section.files[0].model_dump(exclude_none=True)], **options)
    assert [record["split"] for record in records] == ["test", "test", "train", "train"]
    assert [message["role"] for message in records[0]["messages"]] == ["user", "assistant"] * 2
    assert [record["messages"][2]["content"] for record in records] == ["Water cycle"] * 2 + ["Travel"] * 2
    place.out.rename(path := place.out.with_name("instructions.jsonl"))
    assert [row.fields["output"] for row in read_instructions(path)] == ["Of course."] * 4
