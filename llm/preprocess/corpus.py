"""The corpus: from raw records to token shards, by leak-free splits and parallel encoding.

It is read three times and never held: once to survey it (where each text may be cut, and a 64-bit hash of every
piece), once for the text that the vocabulary is trained on, once to encode it. What stays in memory is a few numbers
for each piece. A unit is what a split is made of: a document, or a section of a long one.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import threading
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from llm.common.errors import InputError
from llm.config import CorpusSplit
from llm.preprocess.text import (
    SPLITS,
    TEST,
    TRAIN,
    VAL,
    dedup_key,
    key_hash,
    key_hasher,
    open_raw,
    parse_record,
    text_field,
)
from llm.tokenizer.bpe import FILE_NAME, Tokenizer

BATCH_BYTES = 1_000_000  # of the corpus file that one worker has at a time

T = TypeVar("T")
Array = np.ndarray[Any, np.dtype[Any]]


# ---- sections --------------------------------------------------------------------------------------------------------

PLACES_TO_CUT = (  # the first of them that occurs; the cut is after the match
    re.compile(r"\n[^\S\n]*\n\s*"),  # the end of a paragraph
    re.compile(r"\n"),
    re.compile(r"[.!?…]['\"”’)]*\s+|[。！？]"),  # the end of a sentence
    re.compile(r"\s+"),
)


def cut_chunks(text: str, limit: int) -> list[str]:
    """Pieces of at most `limit` characters and about equal length, cut at paragraph ends where there are any.

    >>> cut_chunks("One.\\n\\nTwo. Three.", 12)
    ['One.\\n\\n', 'Two. Three.']
    """
    pieces, start = [], 0
    while (rest := len(text) - start) > limit:
        longest = start + math.ceil(rest / math.ceil(rest / limit))
        end = _last_place_to_cut(text, (start + longest) // 2, longest)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]] if start < len(text) else pieces


def _last_place_to_cut(text: str, low: int, high: int) -> int:
    for place in PLACES_TO_CUT:
        ends = [match.end() for match in place.finditer(text, low, high)]
        if ends:
            return ends[-1]
    return high


# ---- survey ----------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Whole lines of the corpus file, as byte positions."""

    start: int
    end: int


class Survey(NamedTuple):
    """What a worker finds in one batch; one entry for each record, or for each unit of it."""

    documents: list[int]
    n_units: list[int]
    keys: list[bytes]  # of whole records
    unit_chars: list[int]
    unit_hashes: list[int]
    code_points: dict[int, int]


class Plan(NamedTuple):
    """The whole corpus, cut and split. U units, R records, D documents, B batches."""

    batches: list[Batch]
    batch_records: Array  # [B] records in each batch
    record_units: Array  # [R] units of each record
    unit_chars: Array  # [U]
    unit_hashes: Array  # [U] of the leak keys
    unit_document: Array  # [U] the document's place in the stream
    unit_split: Array  # [U] 0 train, 1 val, 2 test
    unit_ends: Array  # [U] whether the separator token follows
    document_hashes: Array  # [D]
    code_points: dict[int, int]  # how often each character occurs

    def first_units(self) -> Array:
        """[R + 1] where the units of each record begin."""
        return np.concatenate([[0], np.cumsum(self.record_units)])


def batches_of(path: Path) -> list[Batch]:
    with open_raw(path) as file:
        size, starts = path.stat().st_size, [0]
        while starts[-1] < size:
            file.seek(min(starts[-1] + BATCH_BYTES, size))
            file.readline()
            starts.append(file.tell())
    return [Batch(start, end) for start, end in pairwise(starts)]


def batch_records(path: Path, batch: Batch) -> Iterator[tuple[int, str]]:
    """The document number and the normalised text of each record."""
    with open_raw(path) as file:
        file.seek(batch.start)
        while (position := file.tell()) < batch.end:
            where = f"{path}: at byte {position}"
            record = parse_record(file.readline(), where)
            document = record.get("doc")
            if not isinstance(document, int):
                raise InputError(
                    f"{where}: expected a number under 'doc', found {document!r}; run the download stage again"
                )
            yield document, text_field(record, "text", where)


def survey_batch(batch: Batch, path: Path, chunk_chars: int | None, seed: int) -> Survey:
    survey = Survey([], [], [], [], [], {})
    texts = []
    for document, text in batch_records(path, batch):
        units = cut_chunks(text, chunk_chars or max(len(text), 1))
        keys = [dedup_key(unit).encode() for unit in units]
        survey.documents.append(document)
        survey.n_units.append(len(units))
        survey.keys.append(b"".join(keys))
        survey.unit_chars.extend(map(len, units))
        survey.unit_hashes.extend(key_hash(key, seed) for key in keys)
        texts.append(text)
    return survey._replace(code_points=count_characters("".join(texts)))


def count_characters(text: str) -> dict[int, int]:
    counts = np.bincount(np.frombuffer(text.encode("utf-32-le"), dtype="<u4"))
    return {int(code): int(counts[code]) for code in np.flatnonzero(counts)}


def plan_corpus(path: Path, params: CorpusSplit, seed: int, workers: Workers) -> Plan:
    """Surveys the corpus and gives each unit its split."""
    book = params.split == "book"
    batches = batches_of(path)
    n_records, n_units = array("q"), array("q")
    unit_chars, unit_hashes, unit_document = array("q"), array("Q"), array("q")
    document_hashes, code_points = array("Q"), Counter[int]()
    previous, hasher = None, key_hasher(seed)
    surveys = workers.in_order(survey_batch, batches, path, None if book else params.chunk_chars, seed)
    for survey in _progress(surveys, batches, "survey"):
        units = iter(zip(survey.unit_chars, survey.unit_hashes, strict=True))
        for document, n, key in zip(survey.documents, survey.n_units, survey.keys, strict=True):
            n_units.append(n)
            if n == 0:  # nothing is left after cleaning
                continue
            if document != previous:
                previous, hasher = document, key_hasher(seed)
                document_hashes.append(0)
            hasher.update(key)  # the same hash wherever the document is cut into records
            document_hashes[-1] = int.from_bytes(hasher.digest(), "little")
            for _ in range(n):
                chars, unit_hash = next(units)
                unit_chars.append(chars)
                unit_hashes.append(unit_hash)
                unit_document.append(len(document_hashes) - 1)
        n_records.append(len(survey.documents))
        code_points.update(survey.code_points)
    if not unit_chars:
        raise InputError(f"{path}: no text is left after cleaning; choose another data.corpus")
    plan = Plan(
        batches=batches,
        batch_records=np.array(n_records),
        record_units=np.array(n_units),
        unit_chars=np.array(unit_chars),
        unit_hashes=np.array(unit_hashes),
        unit_document=np.array(unit_document),
        unit_split=np.zeros(0),
        unit_ends=np.zeros(0),
        document_hashes=np.array(document_hashes),
        code_points=dict(code_points),
    )
    return split_by_book(plan) if book else split_leak_free(plan, params)


# ---- splits ----------------------------------------------------------------------------------------------------------


def split_leak_free(plan: Plan, params: CorpusSplit) -> Plan:
    """Units with the smallest hashes are val, the next ones test: equal texts cannot part.

    A long document that occurs twice is one unit, because its copies may be cut at different places; so is a document
    that the download had to write as several records although it is no longer than a section.
    """
    order = plan.unit_hashes.copy()
    chars = np.bincount(plan.unit_document, weights=plan.unit_chars)
    _, same, copies = np.unique(plan.document_hashes, return_inverse=True, return_counts=True)
    whole = ((copies[same] > 1) | (chars <= params.chunk_chars)) & (np.bincount(plan.unit_document) > 1)
    order = np.where(whole[plan.unit_document], plan.document_hashes[plan.unit_document], order)
    distinct = np.unique(order)
    if len(distinct) < len(SPLITS):
        raise InputError(
            f"data.corpus: too little text to split into train, val and test: {len(distinct)} different units; "
            f"add documents, lower tokenize.corpus.chunk_chars ({params.chunk_chars}) or set "
            "tokenize.corpus.split: book"
        )
    n_val, n_test = (max(1, int(share * len(distinct))) for share in (params.val, params.test))
    bounds = distinct[[n_val - 1, n_val + n_test - 1]]
    split = np.array([VAL, TEST, TRAIN], dtype=np.uint8)[np.searchsorted(bounds, order)]
    stays = (split[1:] == split[:-1]) & (plan.unit_document[1:] == plan.unit_document[:-1])
    return plan._replace(unit_split=split, unit_ends=np.append(~stays, True))


def split_by_book(plan: Plan) -> Plan:
    """The first nine tenths of the characters are train, the rest val; the separator stands between documents only."""
    total = int(plan.unit_chars.sum())
    cut = int(0.9 * total)
    if cut == 0:
        raise InputError(f"data.corpus: {total} characters are too little for tokenize.corpus.split: book; add text")
    ends = np.cumsum(plan.unit_chars)
    unit = int(np.searchsorted(ends, cut))  # the one that holds the last character of train
    left = cut - int(ends[unit] - plan.unit_chars[unit])
    right = int(plan.unit_chars[unit]) - left
    if right:
        record = int(np.searchsorted(np.cumsum(plan.record_units), unit, side="right"))
        plan.record_units[record] += 1
        plan.unit_chars[unit] = left
        plan = plan._replace(
            unit_chars=np.insert(plan.unit_chars, unit + 1, right),
            unit_hashes=np.insert(plan.unit_hashes, unit + 1, 0),  # half a text equals no other
            unit_document=np.insert(plan.unit_document, unit + 1, plan.unit_document[unit]),
        )
    split = np.full(len(plan.unit_chars), VAL, dtype=np.uint8)
    split[: unit + 1] = TRAIN
    between = (split[1:] == split[:-1]) & (plan.unit_document[1:] != plan.unit_document[:-1])
    return plan._replace(unit_split=split, unit_ends=np.append(between, False))


def training_texts(path: Path, plan: Plan, max_chars: int) -> Iterator[str]:
    """Text of the train split for the vocabulary, at most `max_chars`, in units taken evenly from the whole stream."""
    first = plan.first_units()
    share = min(1.0, max_chars / plan.unit_chars[plan.unit_split == TRAIN].sum())
    seen = taken = 0
    with open_raw(path) as file:
        for record, line in enumerate(file):
            rooms = []  # how much is taken of each unit
            for unit in range(first[record], first[record + 1]):
                chars, room = int(plan.unit_chars[unit]), 0
                if plan.unit_split[unit] == TRAIN:
                    seen += chars
                    if taken < share * seen:
                        room = min(chars, max_chars - taken)
                rooms.append(room)
                taken += room
            if any(rooms):  # a record that is not used costs no parsing
                text = text_field(parse_record(line, str(path)), "text", str(path))
                units = slices(text, plan.unit_chars[first[record] : first[record + 1]].tolist())
                yield from (unit[:room] for unit, room in zip(units, rooms, strict=True) if room)


def slices(text: str, lengths: Iterable[int]) -> list[str]:
    pieces, start = [], 0
    for length in lengths:
        pieces.append(text[start : start + length])
        start += length
    return pieces


# ---- encoding --------------------------------------------------------------------------------------------------------


class EncodeJob(NamedTuple):
    """A batch and what the plan says of its records and units."""

    batch: Batch
    record_units: list[int]
    unit_chars: list[int]
    unit_split: list[int]
    unit_ends: list[bool]


class Encoded(NamedTuple):
    tokens: list[Array]  # for each split
    n_bytes: list[int]  # UTF-8, for each split
    unit_tokens: list[int]  # without the separator


def encode_batch(job: EncodeJob, path: Path, tokenizer_folder: Path) -> Encoded:
    tokenizer = saved_tokenizer(tokenizer_folder)
    streams: list[list[Array]] = [[np.zeros(0, np.uint32)] for _ in SPLITS]
    n_bytes, unit_tokens = [0] * len(SPLITS), []
    separator = np.array([tokenizer.eot], np.uint32)
    unit = 0
    for (_, text), n_units in zip(batch_records(path, job.batch), job.record_units, strict=True):
        for piece in slices(text, job.unit_chars[unit : unit + n_units]):
            ids = tokenizer.encode_array(piece)
            split = job.unit_split[unit]
            streams[split] += [ids, separator] if job.unit_ends[unit] else [ids]
            n_bytes[split] += len(piece.encode())
            unit_tokens.append(len(ids))
            unit += 1
    dtype = token_dtype(tokenizer.vocab_size)
    return Encoded([np.concatenate(stream).astype(dtype) for stream in streams], n_bytes, unit_tokens)


def saved_tokenizer(folder: Path) -> Tokenizer:
    """Built once in each process, which takes longer than to encode a batch; built again when the file has changed."""
    return _built_tokenizer(folder, (folder / FILE_NAME).read_bytes())


@lru_cache(maxsize=1)
def _built_tokenizer(folder: Path, content: bytes) -> Tokenizer:
    return Tokenizer.load(folder)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


class ShardWriter:
    """Writes one split as `train-00000.bin` and so on, each with `tokens_per_shard` tokens but the last."""

    def __init__(self, folder: Path, split: str, tokens_per_shard: int) -> None:
        self.shards: list[str] = []
        self.n_tokens = 0
        self._folder, self._split, self._shard_tokens = folder, split, tokens_per_shard

    def write(self, tokens: Array) -> None:
        while len(tokens):
            room = -self.n_tokens % self._shard_tokens
            if room == 0:
                self.shards.append(f"{self._split}-{len(self.shards):05d}.bin")
                room = self._shard_tokens
            with (self._folder / self.shards[-1]).open("ab") as file:
                file.write(tokens[:room].tobytes())
            self.n_tokens += len(tokens[:room])
            tokens = tokens[room:]


class EncodedCorpus(NamedTuple):
    meta: dict[str, Any]  # what `meta.json` holds
    unit_tokens: Array  # [U]
    used: Array  # [V] how often each token occurs in train


def encode_corpus(
    path: Path, folder: Path, plan: Plan, tokenizer_folder: Path, tokens_per_shard: int, workers: Workers
) -> EncodedCorpus:
    """Writes the shards and `meta.json`: the same bytes with any number of workers."""
    vocab_size = Tokenizer.load(tokenizer_folder).vocab_size
    folder.mkdir(parents=True)
    writers = [ShardWriter(folder, split, tokens_per_shard) for split in SPLITS]
    n_bytes, unit_tokens = np.zeros(len(SPLITS), np.int64), array("q")
    used = np.zeros(vocab_size, np.int64)
    results = workers.in_order(encode_batch, encode_jobs(plan), path, tokenizer_folder)
    for encoded in _progress(results, plan.batches, "encode"):
        for writer, tokens in zip(writers, encoded.tokens, strict=True):
            writer.write(tokens)
        n_bytes += encoded.n_bytes
        unit_tokens.extend(encoded.unit_tokens)
        used += np.bincount(encoded.tokens[TRAIN], minlength=vocab_size)
    starts = np.append(True, (np.diff(plan.unit_document) != 0) | (np.diff(plan.unit_split) != 0))
    meta = {
        "dtype": token_dtype(vocab_size).name,
        "vocab_size": vocab_size,
        "splits": {
            split: {
                "shards": writers[i].shards,
                "tokens": writers[i].n_tokens,
                "bytes": int(n_bytes[i]),
                "documents": int((starts & (plan.unit_split == i)).sum()),
            }
            for i, split in enumerate(SPLITS)
        },
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return EncodedCorpus(meta, np.array(unit_tokens), used)


def encode_jobs(plan: Plan) -> Iterator[EncodeJob]:
    first = plan.first_units()
    ends = np.cumsum(plan.batch_records)
    for batch, start, end in zip(plan.batches, ends - plan.batch_records, ends, strict=True):
        units = slice(first[start], first[end])
        yield EncodeJob(
            batch=batch,
            record_units=plan.record_units[start:end].tolist(),
            unit_chars=plan.unit_chars[units].tolist(),
            unit_split=plan.unit_split[units].tolist(),
            unit_ends=plan.unit_ends[units].tolist(),
        )


# ---- processes -------------------------------------------------------------------------------------------------------


class Workers:
    """Processes that share work out among them; a single worker is this process itself.

    >>> with Workers(1) as workers:
    ...     list(workers.in_order(pow, [2, 3], 2))
    [4, 9]
    """

    def __init__(self, count: int) -> None:
        self._count = count
        # Not by fork: a fork of a process with threads may hang.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, context, _start_worker) if count > 1 else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def in_order(self, function: Callable[..., T], jobs: Iterable[Any], *shared: Any) -> Iterator[T]:
        """`function(job, *shared)` for each job, in the order of the jobs.

        Two jobs for each process are under way at a time, so memory does not grow with their number. `shared` goes
        with every job: what is large, a worker reads from a file.
        """
        if self._pool is None:
            yield from (function(job, *shared) for job in jobs)
            return
        pending: deque[Future[T]] = deque()
        try:
            for job in jobs:
                pending.append(self._pool.submit(function, job, *shared))
                if len(pending) >= 2 * self._count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise InputError(
                "runtime.workers: one of the processes was killed, for want of memory perhaps; try a smaller number"
            ) from None


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers

    def end_with_parent() -> None:  # a parent that was killed cannot say so
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _progress(results: Iterator[T], batches: Sequence[Batch], title: str) -> Iterator[T]:
    with tqdm(total=batches[-1].end if batches else 0, desc=title, unit="B", unit_scale=True, disable=None) as bar:
        for batch, result in zip(batches, results, strict=True):
            yield result
            bar.update(batch.end - batch.start)
