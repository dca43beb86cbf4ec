"""Open a URL at a byte position, over http(s) or any file system of fsspec.

http and https go through requests, which honours proxies, certificates and .netrc of the environment. file, s3, gs and
hf go through fsspec. A redirect leads to http(s) only, and never from https to http. A URL may name environment
variables, `https://host/a.txt?token=${TOKEN}`, so that its secret stands in no file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO, Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

import fsspec
import requests
import urllib3

from llm.common.errors import InputError
from llm.common.sanitize import error_text

SCHEMES = ("https", "http", "file", "s3", "gs", "hf")
BLOCK = 1 << 20  # bytes read at once
TIMEOUT = (10.0, 30.0)  # seconds to connect, and without a byte from a server
VARIABLE = re.compile(r"\$\{(\w+)\}")  # of the environment, in a URL


class TransientError(Exception):
    """An error that may be gone on the next attempt."""


class Body(NamedTuple):
    """An answer under way."""

    blocks: Iterator[bytes]
    start: int  # position of its first byte in the file
    total: int | None  # size of the whole file
    version: str  # identifies this content: a later answer with the same version continues it


def redact(url: str) -> str:
    """Return the URL without user, password, query and fragment: any of them may hold a secret."""
    scheme, netloc, path, *_ = urlsplit(url)
    return urlunsplit((scheme, netloc.rpartition("@")[2], path, "", ""))


def open_url(url: str, start: int, version: str) -> AbstractContextManager[Body]:
    """Request the bytes from `start` on, of the content that `version` identifies; `Body.start` may be smaller."""
    return (_open_http if urlsplit(url).scheme in ("http", "https") else _open_fsspec)(url, start, version)


@contextmanager
def _open_http(url: str, start: int, version: str) -> Iterator[Body]:
    headers = {"Accept-Encoding": "identity"}  # compressed in transfer, neither Range nor the length would fit the file
    if start:
        headers["Range"] = f"bytes={start}-"
        headers |= {"If-Range": version} if version else {}
    with _http_errors(url):
        response = requests.get(
            _with_variables(url), headers=headers, stream=True, timeout=TIMEOUT, hooks={"response": _check_redirect}
        )
    with response:
        status = f"HTTP status {response.status_code} {response.reason or ''}".strip()
        if response.status_code in (408, 425, 429) or response.status_code >= 500:
            raise TransientError(status)
        if response.status_code == 416:  # the part on disk is longer than the file
            with _open_http(url, 0, "") as body:
                yield body
            return
        if response.status_code not in (200, 206):
            raise InputError(f"{redact(url)}: expected the file, found {status}; correct the URL or your access to it")
        first = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if response.status_code == 206 and (first is None or int(first[1]) != start):
            raise InputError(
                f"{redact(url)}: the server answered with another part than it was asked for; try a backup_url"
            )
        begin = start if response.status_code == 206 else 0
        length = response.headers.get("Content-Length", "")
        etag = response.headers.get("ETag", "")
        tag = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
        yield Body(_http_blocks(response, url), begin, begin + int(length) if length.isdigit() else None, tag)


def _with_variables(url: str) -> str:
    def value(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise InputError(f"{redact(url)}: the environment variable {found[1]} is not set; its URL needs it")
        return quote(os.environ[found[1]], safe="")

    return VARIABLE.sub(value, url)


def _check_redirect(response: requests.Response, *args: Any, **kwargs: Any) -> None:
    """Refuse a redirect to a less safe scheme; requests calls this before it follows one."""
    if not response.is_redirect:
        return
    there = urljoin(response.url, response.headers["Location"])
    schemes = ("https",) if urlsplit(response.url).scheme == "https" else ("https", "http")
    if urlsplit(there).scheme not in schemes:
        raise InputError(
            f"{redact(response.url)}: redirects to {redact(there)}, expected {' or '.join(schemes)}; give the right URL"
        )


def _http_blocks(response: requests.Response, url: str) -> Iterator[bytes]:
    with _http_errors(url):
        yield from response.raw.stream(BLOCK, decode_content=False)


@contextmanager
def _http_errors(url: str) -> Iterator[None]:
    try:
        yield
    except requests.exceptions.SSLError as error:
        raise InputError(
            f"{redact(url)}: {_cause(error)}; set REQUESTS_CA_BUNDLE to your network's certificates"
        ) from None
    except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
        raise TransientError(_cause(error)) from None
    except requests.RequestException as error:
        raise InputError(f"{redact(url)}: {type(error).__name__}; correct the URL") from None


def _innermost(error: BaseException) -> BaseException:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _cause(error: BaseException) -> str:
    """Return the innermost reason. Outer messages repeat the URL, and with it its secrets."""
    error = _innermost(error)
    if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
        return f"connection failed ({error.strerror or error_text(error)})"
    return f"connection failed ({type(error).__name__})"


@contextmanager
def _open_fsspec(url: str, start: int, version: str) -> Iterator[Body]:
    with _fsspec_errors(url):
        filesystem: Any = fsspec.filesystem(urlsplit(url).scheme)
        total, found = filesystem.info(url)["size"], str(filesystem.ukey(url))
        stream = filesystem.open(url, "rb")
    with stream:
        begin = start if found == version else 0
        stream.seek(begin)
        yield Body(_fsspec_blocks(stream, url), begin, total, found)


def _fsspec_blocks(stream: IO[bytes], url: str) -> Iterator[bytes]:
    while True:
        with _fsspec_errors(url):
            block = stream.read(BLOCK)
        if not block:
            return
        yield block


@contextmanager
def _fsspec_errors(url: str) -> Iterator[None]:
    """Turn a backend's errors, which may be of any type, into ours: transient only where the network fails."""
    try:
        yield
    except ImportError as error:
        install = f"pip install -e '.[{urlsplit(url).scheme}]'"
        raise InputError(f"{redact(url)}: needs another package ({error_text(error)}); {install}") from None
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise InputError(
            f"{redact(url)}: expected a file, found {error.strerror or type(error).__name__}; correct url:"
        ) from None
    except OSError as error:
        raise TransientError(error.strerror or type(error).__name__) from None
    except Exception as error:
        if isinstance(_innermost(error), OSError):
            raise TransientError(_cause(error)) from None
        problem = error_text(error).replace(url, redact(url))
        raise InputError(f"{redact(url)}: {type(error).__name__}: {problem}") from None
