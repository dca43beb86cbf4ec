"""Survey the corpus, cut it into chunks and plan its leak-free splits.

The corpus is read three times and never held: for the survey, for the text that the vocabulary is trained on, and for
the encoding. Memory holds a few numbers for each chunk. A chunk is a document or a part of a long one.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm.common.errors import InputError
from llm.config import SPLITS, TEST, TRAIN, VAL, CorpusSplit
from llm.preprocess.chunks import cut_at, cut_chunks
from llm.preprocess.text import TextHasher, count_characters, dedup_key, key_hash, open_raw, parse_record, text_field
from llm.preprocess.workers import Workers, show_progress

BATCH_BYTES = 1_000_000  # of the corpus file that one worker has at a time

logger = logging.getLogger("llm")

Array = np.ndarray[Any, np.dtype[Any]]


class LineBatch(NamedTuple):
    """Whole lines of the corpus file, as byte positions."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


class Survey(NamedTuple):
    """The findings of a worker in one batch; one entry for each record, or for each chunk of it."""

    documents: list[int]
    n_chunks: list[int]
    keys: list[str]  # of whole records
    chunk_lengths: list[int]
    chunk_hashes: list[int]
    code_points: dict[int, int]


class Plan(NamedTuple):
    """The whole corpus, cut and split: N chunks, R records, D documents, B batches."""

    batches: list[LineBatch]
    batch_records: Array  # [B] records in each batch
    record_chunks: Array  # [R] chunks of each record
    chunk_lengths: Array  # [N]
    chunk_hashes: Array  # [N] of the dedup keys
    chunk_document: Array  # [N] the document's place in the stream
    chunk_split: Array  # [N] 0 train, 1 val, 2 test
    chunk_ends: Array  # [N] whether the separator token follows
    document_hashes: Array  # [D]
    code_points: dict[int, int]  # how often each character occurs

    def first_chunks(self) -> Array:
        """Return the first chunk of each record, and the number of chunks: [R + 1]."""
        return np.concatenate([[0], np.cumsum(self.record_chunks)])


def line_batches(path: Path) -> list[LineBatch]:
    """Divide the corpus file among the workers' jobs."""
    with open_raw(path) as file:
        size, starts = path.stat().st_size, [0]
        while starts[-1] < size:
            file.seek(min(starts[-1] + BATCH_BYTES, size))
            file.readline()
            starts.append(file.tell())
    return [LineBatch(start, end) for start, end in pairwise(starts)]


def read_batch(path: Path, batch: LineBatch) -> Iterator[tuple[int, str]]:
    """Yield the document number and the normalised text of each record."""
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


def survey_batch(batch: LineBatch, path: Path, chunk_chars: int | None, seed: int) -> Survey:
    survey = Survey([], [], [], [], [], {})
    texts = []
    for document, text in read_batch(path, batch):
        chunks = cut_chunks(text, chunk_chars or max(len(text), 1))
        keys = [dedup_key(chunk) for chunk in chunks]
        survey.documents.append(document)
        survey.n_chunks.append(len(chunks))
        survey.keys.append("".join(keys))
        survey.chunk_lengths.extend(map(len, chunks))
        survey.chunk_hashes.extend(key_hash(key, seed) for key in keys)
        texts.append(text)
    return survey._replace(code_points=count_characters("".join(texts)))


def plan_corpus(path: Path, params: CorpusSplit, seed: int, workers: Workers) -> Plan:
    """Survey the corpus and assign each chunk to a split."""
    book = params.split == "book"
    batches = line_batches(path)
    n_records, n_chunks = array("q"), array("q")
    chunk_lengths, chunk_hashes, chunk_document = array("q"), array("Q"), array("q")
    document_hashes, code_points = array("Q"), Counter[int]()
    previous, hasher = None, TextHasher(seed)
    surveys = workers.in_order(survey_batch, batches, path, None if book else params.chunk_chars, seed)
    for survey in show_progress(surveys, [batch.size for batch in batches], "survey"):
        chunks = iter(zip(survey.chunk_lengths, survey.chunk_hashes, strict=True))
        for document, n, key in zip(survey.documents, survey.n_chunks, survey.keys, strict=True):
            n_chunks.append(n)
            if n == 0:  # nothing is left after cleaning
                continue
            if document != previous:
                previous, hasher = document, TextHasher(seed)
                document_hashes.append(0)
            hasher.update(key)  # the same hash wherever the document is cut into records
            document_hashes[-1] = hasher.value()
            for _ in range(n):
                chars, chunk_hash = next(chunks)
                chunk_lengths.append(chars)
                chunk_hashes.append(chunk_hash)
                chunk_document.append(len(document_hashes) - 1)
        n_records.append(len(survey.documents))
        code_points.update(survey.code_points)
    if not chunk_lengths:
        raise InputError(f"{path}: no text is left after cleaning; choose another data.corpus")
    plan = Plan(
        batches=batches,
        batch_records=np.array(n_records),
        record_chunks=np.array(n_chunks),
        chunk_lengths=np.array(chunk_lengths),
        chunk_hashes=np.array(chunk_hashes),
        chunk_document=np.array(chunk_document),
        chunk_split=np.zeros(0),
        chunk_ends=np.zeros(0),
        document_hashes=np.array(document_hashes),
        code_points=dict(code_points),
    )
    return split_by_book(plan) if book else split_leak_free(plan, params)


def split_leak_free(plan: Plan, params: CorpusSplit) -> Plan:
    """Assign the chunks with the smallest hashes to val and the next ones to test: equal texts cannot part.

    Copies of a long document that were cut at different places count as one chunk, and so does a document that is no
    longer than a chunk although the download had to write it as several records. What would tip a held-out split, such
    as these copies or a text that repeats very often, is in train.
    """
    chunks = np.bincount(plan.chunk_document)  # [D]
    chars = np.bincount(plan.chunk_document, weights=plan.chunk_lengths)  # [D]
    unaligned = _unaligned_copies(plan, chunks)
    whole = unaligned | ((chars <= params.chunk_chars) & (chunks > 1))
    order = np.where(whole[plan.chunk_document], plan.document_hashes[plan.chunk_document], plan.chunk_hashes)
    distinct, same = np.unique(order, return_inverse=True)
    if len(distinct) < len(SPLITS):
        raise InputError(
            f"data.corpus: too little text to split into train, val and test: {len(distinct)} different chunks; "
            f"add documents, lower tokenize.corpus.chunk_chars ({params.chunk_chars}) or set "
            "tokenize.corpus.split: book"
        )
    weights = np.bincount(same, weights=plan.chunk_lengths)
    light = _light(weights, params)
    # A document that counts as one chunk still has its share of the text.
    first_copies = np.unique(plan.document_hashes[unaligned], return_index=True)[1]
    n_units = len(distinct) + int((chunks[unaligned][first_copies] - 1).sum())
    n_val, n_test = (max(1, int(share * n_units)) for share in (params.val, params.test))
    if not light.all() and n_val + n_test > (room := max(2, int(light.sum()) // 2)):
        n_val = max(1, int(room * params.val / (params.val + params.test)))
        n_test = room - n_val
        logger.warning("data.corpus: few texts do not repeat: val has %d chunks of them, test %d", n_val, n_test)
    split_of = np.full(len(distinct), TRAIN, dtype=np.uint8)
    candidates = np.flatnonzero(light)  # in the order of their hashes
    split_of[candidates[:n_val]] = VAL
    split_of[candidates[n_val : n_val + n_test]] = TEST
    split = split_of[same]
    stays = (split[1:] == split[:-1]) & (plan.chunk_document[1:] == plan.chunk_document[:-1])
    return plan._replace(chunk_split=split, chunk_ends=np.append(~stays, True))


def _unaligned_copies(plan: Plan, chunks: Array) -> Array:
    """Return which documents have an equal one that was cut into other chunks: [D]."""
    ends = np.cumsum(chunks)
    _, same, copies = np.unique(plan.document_hashes, return_inverse=True, return_counts=True)
    cuts: dict[int, set[bytes]] = {}
    repeated = np.flatnonzero((copies[same] > 1) & (chunks > 1))
    for document in repeated.tolist():
        hashes = plan.chunk_hashes[ends[document] - chunks[document] : ends[document]]
        cuts.setdefault(int(same[document]), set()).add(hashes.tobytes())
    unaligned = np.zeros(len(chunks), dtype=bool)
    for document in repeated.tolist():
        unaligned[document] = len(cuts[int(same[document])]) > 1
    return unaligned


def _light(weights: Array, params: CorpusSplit) -> Array:
    """Return which texts are too small, with their copies, to tip a held-out split: two at least."""
    limit = max(3 * params.chunk_chars, 0.1 * min(params.val, params.test) * weights.sum())
    light = weights <= limit
    if light.sum() < 2:
        light[np.argsort(weights, kind="stable")[:2]] = True
    if not light.all():
        logger.warning("data.corpus: %d texts repeat so much that they are in train", (~light).sum())
    return light


def split_by_book(plan: Plan) -> Plan:
    """Assign the first 90 % of the characters to train, the rest to val, with separators between documents only."""
    total = int(plan.chunk_lengths.sum())
    cut = int(0.9 * total)
    if cut == 0:
        raise InputError(f"data.corpus: {total} characters are too little for tokenize.corpus.split: book; add text")
    ends = np.cumsum(plan.chunk_lengths)
    chunk = int(np.searchsorted(ends, cut))  # the one that holds the last character of train
    left = cut - int(ends[chunk] - plan.chunk_lengths[chunk])
    right = int(plan.chunk_lengths[chunk]) - left
    if right:
        record = int(np.searchsorted(np.cumsum(plan.record_chunks), chunk, side="right"))
        plan.record_chunks[record] += 1
        plan.chunk_lengths[chunk] = left
        plan = plan._replace(
            chunk_lengths=np.insert(plan.chunk_lengths, chunk + 1, right),
            chunk_hashes=np.insert(plan.chunk_hashes, chunk + 1, 0),  # half a text equals no other
            chunk_document=np.insert(plan.chunk_document, chunk + 1, plan.chunk_document[chunk]),
        )
    split = np.full(len(plan.chunk_lengths), VAL, dtype=np.uint8)
    split[: chunk + 1] = TRAIN
    between = (split[1:] == split[:-1]) & (plan.chunk_document[1:] != plan.chunk_document[:-1])
    return plan._replace(chunk_split=split, chunk_ends=np.append(between, False))


def training_texts(path: Path, plan: Plan, max_chars: int) -> Iterator[str]:
    """Yield up to `max_chars` of the train split for the vocabulary, in chunks taken evenly from the whole stream."""
    first = plan.first_chunks()
    share = min(1.0, max_chars / plan.chunk_lengths[plan.chunk_split == TRAIN].sum())
    seen = taken = 0
    with open_raw(path) as file:
        for record, line in enumerate(file):
            rooms = []  # characters taken of each chunk
            for chunk in range(first[record], first[record + 1]):
                chars, room = int(plan.chunk_lengths[chunk]), 0
                if plan.chunk_split[chunk] == TRAIN:
                    seen += chars
                    if taken < share * seen:
                        room = min(chars, max_chars - taken)
                rooms.append(room)
                taken += room
            if any(rooms):  # a record that is not used costs no parsing
                text = text_field(parse_record(line, str(path)), "text", str(path))
                chunks = cut_at(text, plan.chunk_lengths[first[record] : first[record + 1]].tolist())
                yield from (chunk[:room] for chunk, room in zip(chunks, rooms, strict=True) if room)
