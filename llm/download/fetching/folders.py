"""List the files of a folder that make a corpus: texts, documents and code, by simple rules."""

from __future__ import annotations

import fnmatch
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from llm.common.errors import InputError
from llm.download.content.signatures import archive_of, check_pointer, looks_binary

TEXTS = ".txt .text .md .markdown .rst .adoc .org .tex"
DOCUMENTS = ".pdf .html .htm .xhtml .epub .docx"
CODE = """.py .pyi .js .mjs .cjs .jsx .ts .tsx .java .kt .kts .scala .groovy .c .h .cc .cpp .cxx .hpp .hh .cs .fs .go
.rs .rb .php .swift .m .mm .r .jl .lua .pl .pm .sh .bash .zsh .fish .ps1 .sql .hs .ml .mli .ex .exs .erl .clj .lisp
.scm .el .vim .zig .nim .d .dart .f .f90 .pas .asm .s .css .scss .less .vue .svelte .yaml .yml .toml .ini .cfg
.cmake .mk .proto .graphql .tf"""
SUFFIXES = frozenset(f"{TEXTS} {DOCUMENTS} {CODE}".split())
NAMES = frozenset("Makefile Dockerfile Containerfile Rakefile Gemfile README LICENSE NOTICE CHANGELOG AUTHORS".split())
VENDORED = frozenset("node_modules vendor third_party site-packages __pycache__ venv env target build dist".split())
GENERATED = ("*.min.js", "*.min.css", "*-lock.*", "*_pb2.py", "*.lock.*", "*.g.dart")

log = logging.getLogger("llm")


def folder_files(folder: Path) -> list[Path]:
    """Return the texts, documents and code below a folder, in order; hidden, vendored and binary files are left out."""
    chosen, left_out = [], Counter[str]()
    for path in _walk(folder, left_out):
        why = _reason_against(path)
        if why is None:
            chosen.append(path)
        elif why:
            left_out[why] += 1
    if left_out:
        reasons = ", ".join(f"{count:,} {why}" for why, count in left_out.most_common(6))
        log.info("%s: takes %s files, leaves out: %s", folder, f"{len(chosen):,}", reasons)
    if not chosen:
        seen = ", ".join(why for why, _ in left_out.most_common(6)) or "nothing"
        raise InputError(
            f"{folder}: expected texts, documents or code in the folder, found none ({seen}); "
            f"for files of rows write {folder.as_posix().rstrip('/')}/*.csv or their ending"
        )
    return chosen


def _walk(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        kept = [name for name in sorted(folders) if not name.startswith(".") and name not in VENDORED]
        left_out["hidden or vendored folders"] += len(folders) - len(kept)
        folders[:] = [name for name in kept if not (Path(place) / name).is_symlink()]
        yield from (Path(place) / name for name in sorted(names))
    left_out += Counter()  # drops zeros


def _reason_against(path: Path) -> str | None:
    """Return why a file is left out, nothing for one that nobody misses, None for one to read."""
    name, suffix = path.name, path.suffix.lower()
    if name.startswith("."):
        return ""
    if path.is_symlink() or not path.is_file():
        return "links"
    if any(fnmatch.fnmatch(name.lower(), pattern) for pattern in GENERATED):
        return "generated"
    if suffix not in SUFFIXES and name not in NAMES:
        return f"*{suffix}" if suffix else "without a known name"
    with path.open("rb") as stream:
        head = stream.read(4096)
    if not head.strip():
        return "empty"
    check_pointer(str(path), head)
    is_document = suffix in DOCUMENTS.split()
    return "binary" if not is_document and (archive_of(head) or looks_binary(head)) else None
