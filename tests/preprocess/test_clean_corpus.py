"""Shards of the cleaning: a killed run leaves them to the next one, and memory does not hold the texts."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llm.config import CleanParams
from llm.preprocess import clean_corpus as module
from llm.preprocess.clean import clean_text
from llm.preprocess.clean_corpus import clean_corpus, plan_shards
from llm.preprocess.near_duplicates import BANDS, PERMUTATIONS, SIMILAR, find_near_duplicates, signature
from tests.datasets import words, write_corpus
from tests.preprocess.pipeline import ALONE

pytest.importorskip("rensa")
RULES = CleanParams(repair=False, invisible=True, languages=[], quality=[], duplicates="near", mask=["mail"])
KILLED = """
import os, signal, sys
from pathlib import Path
from llm.config import CleanParams
from llm.preprocess import clean_corpus as module, corpus
from llm.preprocess.workers import Workers

corpus.BATCH_BYTES = 2000
clean_text, left = module.clean_text, 75

def until_killed(text, params):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return clean_text(text, params)

module.clean_text = until_killed
params = CleanParams.model_validate_json(sys.argv[1])
module.clean_corpus(Path("corpus.jsonl"), Path("killed.jsonl"), params, Workers(1), Path("state"))
"""


def documents(n: int) -> list[str]:
    """Texts of which some equal an earlier one or differ from it in a few words."""
    chooser = random.Random(1)
    texts = [words(chooser, 40) for _ in range(n)]
    for i in range(10, n, 10):
        texts[i] = texts[i - chooser.randrange(1, 10)] + (" me@mail.org" if i % 20 else "")
    return texts


def test_a_killed_run_repeats_one_shard_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", documents(200))
    command = [sys.executable, "-c", KILLED, RULES.model_dump_json()]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    killed = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": paths}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    monkeypatch.setattr("llm.preprocess.corpus.BATCH_BYTES", 2000)
    calls = 0

    def counted(text: str, params: CleanParams) -> object:
        nonlocal calls
        calls += 1
        return clean_text(text, params)

    monkeypatch.setattr(module, "clean_text", counted)
    whole = clean_corpus(path, tmp_path / "whole.jsonl", RULES, ALONE, tmp_path / "other")
    shards = plan_shards(path, tmp_path / "state")
    done = [shard for shard in shards if shard.folder.is_dir()]
    assert calls == 200 and len(shards) >= 16
    assert 0 < len(done) < len(shards) and done == shards[: len(done)]

    calls = 0
    with caplog.at_level(logging.INFO, logger="llm"):
        assert clean_corpus(path, tmp_path / "again.jsonl", RULES, ALONE, tmp_path / "state") == whole
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    texts_done = sum(len(module.read_column(shard, "removed")) for shard in done)
    assert 75 - texts_done <= len(module.read_column(shards[len(done)], "removed"))  # in the shard that was not done
    assert calls == 200 - texts_done
    assert f"cleaning goes on behind an earlier run: {len(done)} of {len(shards)} shards are done" in caplog.text


def test_near_duplicates_are_those_of_an_index_in_memory(tmp_path: Path) -> None:
    from rensa import RMinHash, RMinHashLSH

    chooser = random.Random(2)
    texts = [words(chooser, 30) for _ in range(60)]
    for _ in range(240):  # chains of changes: whether the first of a chain is kept decides on the next
        parts = chooser.choice(texts).split()
        for i in chooser.sample(range(len(parts)), chooser.randrange(8)):
            parts[i] = words(chooser, 1)
        texts.append(" ".join(parts))
    signatures = [signature(text) for text in texts]
    files = [tmp_path / f"{start}.npy" for start in range(0, len(texts), 70)]
    for file in files:
        np.save(file, signatures[int(file.stem) : int(file.stem) + 70])

    index, kept, expected = RMinHashLSH(SIMILAR, PERMUTATIONS, BANDS), list[RMinHash](), list[bool]()
    rows = [i for i in range(len(texts)) if i % 5]
    for i in rows:
        parts = texts[i].split()
        own = RMinHash(num_perm=PERMUTATIONS, seed=1)
        own.update([f"{first} {second}" for first, second in pairwise(parts)])
        expected.append(any(own.jaccard(kept[j]) >= SIMILAR for j in index.query(own)))
        if not expected[-1]:
            index.insert(len(kept), own)
            kept.append(own)
    assert find_near_duplicates(files, np.array(rows)).tolist() == expected
    assert 50 < sum(expected) < 200


def test_memory_for_a_text_is_a_few_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.preprocess.corpus.BATCH_BYTES", 2000)  # shards of one size in both corpora
    chooser = random.Random(1)

    def peak(n: int) -> int:
        path = write_corpus(tmp_path / f"{n}.jsonl", [words(chooser, 15) for _ in range(n)])
        tracemalloc.start()
        clean_corpus(path, tmp_path / "clean.jsonl", RULES, ALONE, tmp_path / f"state-{n}")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(100)  # modules are loaded
    small, large = peak(1000), peak(3000)
    assert (large - small) / 2000 < 300  # bytes; a signature alone has 512


def test_a_corpus_of_which_nothing_is_left(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", ["Too short.", "Short as well.", "And this."])
    rules = RULES.model_copy(update={"quality": ["gopher"]})
    funnel = clean_corpus(path, tmp_path / "clean.jsonl", rules, ALONE, tmp_path / "state")
    assert (tmp_path / "clean.jsonl").read_bytes() == b""
    assert funnel.removed["gopher"] == 3 and funnel.left == 0
    assert funnel.samples["gopher"] == ["Too short.", "Short as well.", "And this."]


def test_shards_cover_the_corpus_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", documents(300))
    for size, fewest in ((path.stat().st_size // 40, 16), (path.stat().st_size // 400, 30)):
        monkeypatch.setattr("llm.preprocess.corpus.BATCH_BYTES", size)
        shards = plan_shards(path, tmp_path)
        assert len(shards) >= fewest
        batches = [batch for shard in shards for batch in shard.batches]
        assert batches[0].start == 0 and batches[-1].end == path.stat().st_size
        assert all(one.end == other.start for one, other in pairwise(batches))


def test_samples_are_in_the_order_of_the_corpus(tmp_path: Path) -> None:
    page = "One sentence is here.\nAnother one follows!\nA menu\nIs it the third?"
    texts = [f"{page} {i}?" if i % 2 else f"No page {i}" for i in range(8)]
    path = write_corpus(tmp_path / "corpus.jsonl", texts)
    rules = RULES.model_copy(update={"quality": ["c4"], "duplicates": "none"})
    funnel = clean_corpus(path, tmp_path / "clean.jsonl", rules, ALONE, tmp_path / "state")
    kept = "One sentence is here.\nAnother one follows!\nIs it the third? 1?"
    assert funnel.samples["c4"] == ["No page 0", kept, "No page 2"]
    assert (funnel.removed["c4"], funnel.changed["c4"]) == (4, 4)
    assert json.loads((tmp_path / "clean.jsonl").read_text().splitlines()[0])["text"] == kept
