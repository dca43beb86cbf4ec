"""Fetching, against a server on this machine that can be told to fail, and every way in which a file can be wrong."""

from __future__ import annotations

import contextlib
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import requests
import urllib3

from llm.config import SourceFile
from llm.download.content import archives
from llm.download.fetching import remote, transfer
from llm.download.fetching.fetch import fetch
from tests.download.files import DATA, content, refused, sha

HTML = b"<!DOCTYPE html>\n<html><body>Please log in</body></html>"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; before that it goes through `failures`: a status to answer with, or `cut`: half of the body."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.failures: list[int | str] = []
        self.redirects: dict[str, str] = {}
        self.ranges, self.etag = True, '"1"'
        self.asked: list[tuple[str, str | None]] = []  # path and Range of each request
        self.authorization: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers["Range"]
        server.asked.append((self.path, wanted))
        server.authorization.append(self.headers["Authorization"])
        failure = server.failures.pop(0) if server.failures else None
        body = server.files.get(self.path.partition("?")[0])
        if there := server.redirects.get(self.path):
            self.send_response(302)
            self.send_header("Location", there)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if isinstance(failure, int) or body is None:
            self.send_error(failure if isinstance(failure, int) else 404)
            return
        unchanged = self.headers["If-Range"] in (None, server.etag)
        if server.ranges and wanted and unchanged:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            body = body[start:]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if failure == "cut" else body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(transfer, "PAUSES", (0.0, 0.0))
    with serving(Server()) as running:
        yield running


def left_in(cache: Path) -> list[str]:
    """Return the files that a download left behind, without its locks."""
    return sorted(path.name for path in cache.glob("*") if path.suffix != ".lock")


# ---- downloads -------------------------------------------------------------------------------------------------------


def test_downloads_once(server: Server, cache: Path) -> None:
    server.files["/a.txt"] = DATA
    wanted = SourceFile(url=f"{server.url}/a.txt", sha256=sha(DATA))
    for _ in range(2):
        (found,) = fetch(wanted, cache)
        assert content(found) == DATA
        assert (found.name, found.sha256, found.size) == (wanted.url, sha(DATA), len(DATA))
    assert len(server.asked) == 1
    assert left_in(cache) == [sha(DATA)]


def test_a_damaged_earlier_download_is_fetched_again(server: Server, cache: Path) -> None:
    server.files["/a.txt"] = DATA
    cache.mkdir()
    (cache / sha(DATA)).write_bytes(DATA[:100])
    (found,) = fetch(SourceFile(url=f"{server.url}/a.txt", sha256=sha(DATA)), cache)
    assert content(found) == DATA


@pytest.mark.parametrize("pinned", [True, False])
def test_a_broken_download_goes_on_where_it_stopped(server: Server, cache: Path, pinned: bool) -> None:
    server.files["/a.txt"] = DATA
    server.failures = ["cut", 503, "cut"]
    (found,) = fetch(SourceFile(url=f"{server.url}/a.txt", sha256=sha(DATA) if pinned else None), cache)
    assert content(found) == DATA
    half = len(DATA) // 2
    later = half + (len(DATA) - half) // 2
    assert [wanted for _, wanted in server.asked] == [None, f"bytes={half}-", f"bytes={half}-", f"bytes={later}-"]


def test_without_ranges_it_starts_again(server: Server, cache: Path) -> None:
    server.files["/a.txt"] = DATA
    server.failures, server.ranges = ["cut"], False
    (found,) = fetch(SourceFile(url=f"{server.url}/a.txt"), cache)
    assert content(found) == DATA


def test_a_file_that_changed_meanwhile_is_not_continued(server: Server, cache: Path) -> None:
    server.files["/a.txt"] = DATA
    server.failures = ["cut", 500, 500, 500]
    refused(SourceFile(url=f"{server.url}/a.txt"), cache)
    server.files["/a.txt"], server.etag = DATA.upper(), '"2"'
    (found,) = fetch(SourceFile(url=f"{server.url}/a.txt"), cache)
    assert content(found) == DATA.upper()


@pytest.mark.parametrize("start", [b"x" * 500, DATA + b"too long"])
def test_a_part_of_something_else_is_thrown_away(server: Server, cache: Path, start: bytes) -> None:
    server.files["/a.txt"] = DATA
    cache.mkdir()
    (cache / f"{sha(DATA)}.part").write_bytes(start)
    (found,) = fetch(SourceFile(url=f"{server.url}/a.txt", sha256=sha(DATA)), cache)
    assert content(found) == DATA
    assert server.asked[0][1] == f"bytes={len(start)}-"


def test_gives_up_after_errors_that_last(server: Server, cache: Path) -> None:
    server.files["/a.txt"] = DATA
    server.failures = [503] * 3
    message = refused(SourceFile(url=f"{server.url}/a.txt"), cache)
    assert "HTTP status 503" in message and "after 2 retries" in message and "HTTPS_PROXY" in message
    assert len(server.asked) == 3
    assert left_in(cache) == []


def test_a_missing_page_is_not_tried_again(server: Server, cache: Path) -> None:
    assert "404" in refused(SourceFile(url=f"{server.url}/a.txt"), cache)
    assert len(server.asked) == 1


def test_no_network(server: Server, cache: Path) -> None:
    server.shutdown()
    server.socket.close()
    message = refused(SourceFile(url=f"{server.url}/a.txt"), cache)
    assert message.startswith(f"{server.url}/a.txt: connection failed (Connection refused)")
    assert "LLM_DATA_MIRROR" in message


def test_backup(server: Server, cache: Path) -> None:
    server.files |= {"/changed.txt": DATA[1:], "/good.txt": DATA}
    wanted = SourceFile(url=f"{server.url}/changed.txt", backup_url=f"{server.url}/good.txt", sha256=sha(DATA))
    (found,) = fetch(wanted, cache)
    assert content(found) == DATA
    assert found.name == wanted.url  # what is written about it does not depend on who was up


def test_both_fail(server: Server, cache: Path) -> None:
    server.files["/good.txt"] = DATA[1:]
    wanted = SourceFile(url=f"{server.url}/gone.txt", backup_url=f"{server.url}/good.txt", sha256=sha(DATA))
    message = refused(wanted, cache)
    assert "gone.txt: expected the file, found HTTP status 404" in message and "the backup failed too" in message
    assert sha(DATA) in message and sha(DATA[1:]) in message
    assert left_in(cache) == []


def test_a_proxy_of_the_environment_is_used(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    server.files["http://data.invalid/a.txt"] = DATA  # what a proxy is asked for
    (found,) = fetch(SourceFile(url="http://data.invalid/a.txt", sha256=sha(DATA)), cache)
    assert content(found) == DATA


def test_secrets_stay_secret(
    server: Server, cache: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/a.txt"] = DATA
    place = server.url.removeprefix("http://")
    monkeypatch.setenv("WHO", "me")
    monkeypatch.setenv("PASS", "word")
    monkeypatch.setenv("TOKEN", "hidden")
    wanted = SourceFile(url=f"http://${{WHO}}:${{PASS}}@{place}/a.txt?token=${{TOKEN}}")
    server.failures = ["cut"]
    (found,) = fetch(wanted, cache)
    assert found.name == f"http://{place}/a.txt"
    assert server.asked[0][0] == "/a.txt?token=hidden"
    server.failures = [404]
    message = refused(SourceFile(url=f"http://${{WHO}}:${{PASS}}@{place}/b.txt?token=${{TOKEN}}"), cache)
    server.shutdown()
    server.socket.close()
    message += refused(SourceFile(url=f"http://${{WHO}}:${{PASS}}@{place}/c.txt?token=${{TOKEN}}"), cache)
    printed = capfd.readouterr()
    for secret in ("word", "hidden"):
        assert secret not in message + printed.out + printed.err


def test_says_what_to_pin(server: Server, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server.files["/a.txt"] = DATA
    fetch(SourceFile(url=f"{server.url}/a.txt"), cache)
    out, err = capfd.readouterr()
    assert out == ""
    assert f"add sha256: {sha(DATA)}" in err


def test_a_variable_that_is_not_set_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKEN", raising=False)
    message = refused(SourceFile(url="https://host.invalid/a.txt?token=${TOKEN}"), cache)
    assert message == "https://host.invalid/a.txt: the environment variable TOKEN is not set; its URL needs it"


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("https://me:word@host/a.txt", True),
        ("https://token@host/a.txt", True),
        ("https://host/a.txt?b=c&access_token=d", True),
        ("https://host/a.txt?X-Amz-Signature=d", True),
        ("https://host/a.txt?key=d", True),
        ("https://${ME}:${WORD}@host/a.txt?token=${TOKEN}", False),
        ("https://host/a@b.txt?keyword=a&author=b&token=", False),
        ("s3://bucket/a.txt", False),
    ],
)
def test_a_url_in_params_holds_no_secret(url: str, secret: bool) -> None:
    for values in ({"url": url}, {"url": "https://host/a.txt", "backup_url": url}):
        if secret:
            with pytest.raises(ValueError, match=r"seems to hold a password or token.*\$\{NAME\}"):
                SourceFile(**values)
        else:
            SourceFile(**values)


@pytest.mark.parametrize(
    "there", ["file:///etc/hostname", "ftp://host.invalid/a.txt", "s3://bucket/a.txt", "gopher://x"]
)
def test_a_redirect_leads_to_no_other_scheme(server: Server, cache: Path, there: str) -> None:
    server.redirects["/a.txt"] = there
    message = refused(SourceFile(url=f"{server.url}/a.txt"), cache)
    assert message.startswith(f"{server.url}/a.txt: redirects to {there}, expected https or http")
    assert left_in(cache) == []


def test_a_redirect_is_followed_without_the_password(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASS", "word")
    with serving(Server()) as other:
        other.files["/b.txt"] = DATA
        server.redirects["/a.txt"] = f"http://localhost:{other.server_port}/b.txt"  # another host
        url = f"http://${{PASS}}:${{PASS}}@{server.url.removeprefix('http://')}/a.txt"
        (found,) = fetch(SourceFile(url=url), cache)
        assert content(found) == DATA
        assert server.authorization[0] is not None and other.authorization == [None]


def test_a_redirect_does_not_lead_from_https_to_http(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def send(adapter: Any, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        asked.append(request.url)
        response = requests.Response()
        response.status_code, response.url, response.request = 302, str(request.url), request
        response.headers["Location"] = "/b.txt" if len(asked) == 1 else "http://host.invalid/c.txt?token=hidden"
        response.raw = urllib3.HTTPResponse(io.BytesIO(b""), preload_content=False)
        return response

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    message = refused(SourceFile(url="https://host.invalid/a.txt"), cache)
    assert message.startswith("https://host.invalid/b.txt: redirects to http://host.invalid/c.txt, expected https;")
    assert asked == ["https://host.invalid/a.txt", "https://host.invalid/b.txt"]


@pytest.mark.parametrize("url", ["ftp://host/a.txt", "memory://a.txt", "simplecache::http://host/a.txt", "a.txt"])
def test_other_schemes_are_refused(cache: Path, url: str) -> None:
    assert "expected one of https://" in refused(SourceFile(url=url), cache)


def test_file_url(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "BLOCK", 1000)
    monkeypatch.setattr(remote, "BLOCK", 1000)
    source = tmp_path / "a.txt"
    source.write_bytes(DATA)
    (found,) = fetch(SourceFile(url=source.as_uri()), cache)
    assert content(found) == DATA
    assert "No such file" in refused(SourceFile(url=(tmp_path / "b.txt").as_uri()), cache)


@pytest.mark.parametrize("unchanged", [True, False])
def test_fsspec_goes_on_where_it_stopped(tmp_path: Path, cache: Path, unchanged: bool) -> None:
    source = tmp_path / "a.txt"
    source.write_bytes(DATA)
    key = sha(source.as_uri().encode())
    cache.mkdir()
    (cache / f"{key}.part").write_bytes(b"PART OF IT")
    version = fsspec.filesystem("file").ukey(source.as_uri())
    (cache / f"{key}.version").write_text(version if unchanged else "older")
    (found,) = fetch(SourceFile(url=source.as_uri()), cache)
    assert content(found) == (b"PART OF IT" + DATA[10:] if unchanged else DATA)


# ---- wrong content ---------------------------------------------------------------------------------------------------


def test_wrong_hash(server: Server, cache: Path) -> None:
    server.files["/a.txt"] = DATA
    message = refused(SourceFile(url=f"{server.url}/a.txt", sha256=sha(b"")), cache)
    assert f"expected sha256 {sha(b'')}, found {sha(DATA)}" in message
    assert left_in(cache) == []


@pytest.mark.parametrize("pinned", [sha(DATA), None])
@pytest.mark.parametrize("page", [HTML, b"\xef\xbb\xbf \n<!-- hi --><HTML lang=en>", b'<?xml version="1.0"?><html>'])
def test_html_in_place_of_data(server: Server, cache: Path, page: bytes, pinned: str | None) -> None:
    server.files["/a.txt"] = page
    message = refused(SourceFile(url=f"{server.url}/a.txt", sha256=pinned), cache)
    assert "expected data, found an HTML page" in message
    assert left_in(cache) == []


def test_a_pinned_html_page_is_data(server: Server, cache: Path) -> None:
    server.files["/a.txt"] = HTML
    (found,) = fetch(SourceFile(url=f"{server.url}/a.txt", sha256=sha(HTML)), cache)
    assert content(found) == HTML


def test_empty(server: Server, cache: Path) -> None:
    server.files["/a.txt"] = b""
    assert "found an empty file" in refused(SourceFile(url=f"{server.url}/a.txt"), cache)
    assert left_in(cache) == []


# ---- mirror ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a%2Bb.txt", "a+b.txt"])
def test_mirror_comes_first(tmp_path: Path, cache: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DATA)
    wanted = SourceFile(url="https://host.invalid/x/a%2Bb.txt", sha256=sha(DATA))
    (found,) = fetch(wanted, cache, tmp_path)
    assert content(found) == DATA
    assert found.name == wanted.url


def test_mirror_by_the_name_of_the_backup(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a b.txt").write_bytes(DATA)
    wanted = SourceFile(
        url="https://host.invalid/f?id=1", backup_url="https://host.invalid/a%20b.txt", sha256=sha(DATA)
    )
    assert content(fetch(wanted, cache, tmp_path)[0]) == DATA


def test_wrong_file_in_the_mirror(
    server: Server, tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(DATA[1:])
    server.files["/a.txt"] = DATA
    (found,) = fetch(SourceFile(url=f"{server.url}/a.txt", sha256=sha(DATA)), cache, tmp_path)
    assert content(found) == DATA
    assert f"{tmp_path / 'a.txt'}: not used" in capfd.readouterr().err


def test_mirror_names_do_not_lead_elsewhere(server: Server, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "secret.txt").write_bytes(DATA)
    (tmp_path / "mirror").mkdir()
    assert "404" in refused(SourceFile(url=f"{server.url}/..%2Fsecret.txt"), cache, tmp_path / "mirror")


def test_no_such_mirror(tmp_path: Path, cache: Path) -> None:
    message = refused(SourceFile(url="https://host.invalid/a.txt"), cache, tmp_path / "nowhere")
    assert message.startswith("LLM_DATA_MIRROR: expected a folder")


# ---- paths -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("data/own/b.txt", "data/own/sub/a.txt", "else/c[1].txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path


def test_globs(here: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = fetch(SourceFile(path="data/own/**/*.txt"), cache)
    assert [file.name for file in found] == ["data/own/b.txt", "data/own/sub/a.txt"]
    assert [content(file) for file in found] == [b"data/own/b.txt", b"data/own/sub/a.txt"]
    assert capfd.readouterr().err == ""
    assert [file.name for file in fetch(SourceFile(path=str(here / "data/own/*.txt")), cache)] == [
        (here / "data/own/b.txt").as_posix()
    ]


def test_what_dvc_does_not_see_is_said(here: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (found,) = fetch(SourceFile(path="else/c[1].txt"), cache)  # a name that exists is no pattern
    assert "DVC will not notice" in capfd.readouterr().err
    fetch(SourceFile(path="else/c[1].txt", sha256=found.sha256), cache)
    assert capfd.readouterr().err == ""


def test_wrong_paths(here: Path, cache: Path) -> None:
    (cache.parent / "empty").mkdir()
    assert "found nothing" in refused(SourceFile(path="data/own/*.md"), cache)
    assert "found none (nothing)" in refused(SourceFile(path=str(cache.parent / "empty")), cache)
    assert "found 2" in refused(SourceFile(path="data/own/**/*.txt", sha256=sha(DATA)), cache)
    assert "expected sha256" in refused(SourceFile(path="data/own/b.txt", sha256=sha(DATA)), cache)
