"""Token shards: reads across files, damage, and bits per byte."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.common.errors import InputError
from llm.data.batches import (
    held_out_windows,
)
from llm.data.shards import TokenShards, bits_per_byte
from tests.datasets import write_shards

in_one_folder = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@in_one_folder
@given(data=st.data())
def test_reads_go_across_shards(tmp_path: Path, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["uint16", "uint32"]))
    n = data.draw(st.integers(1, 40))
    tokens = [(7919 * i) % (60_000 if dtype == "uint16" else 200_000) for i in range(n)]
    shards = write_shards(tmp_path, tokens, data.draw(st.lists(st.integers(1, 9))), dtype)
    start = data.draw(st.integers(0, n))
    length = data.draw(st.integers(0, n - start))
    found = shards.read(start, length)
    assert found.dtype == np.int64
    assert found.tolist() == tokens[start : start + length]
    assert (shards.n_tokens, shards.n_bytes) == (n, 3 * n)


def test_reading_beyond_the_end_is_an_error_not_fewer_tokens(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, list(range(10)), [4])
    with pytest.raises(IndexError):
        shards.read(8, 3)


def test_an_empty_split_is_allowed(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [], [])
    assert shards.n_tokens == 0
    assert list(held_out_windows(shards, 4, 2, 100)) == []


def test_broken_shards_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"meta\.json: missing; run tokenize"):
        TokenShards(tmp_path, "train")
    write_shards(tmp_path, list(range(10)), [4])
    with pytest.raises(InputError, match=r"no readable token shards of split val"):
        TokenShards(tmp_path, "val")
    shard = tmp_path / "train-00001.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    with pytest.raises(InputError, match=r"train should hold 10 tokens, found 9; run tokenize"):
        TokenShards(tmp_path, "train")
    for damage in (lambda: shard.write_bytes(content[:-1]), lambda: shard.write_bytes(b""), shard.unlink):
        damage()
        with pytest.raises(InputError, match=r"no readable token shards of split train") as error:
            TokenShards(tmp_path, "train")
        assert "\n" not in str(error.value)
    (tmp_path / "meta.json").write_text("[]")
    with pytest.raises(InputError, match=r"no readable token shards"):
        TokenShards(tmp_path, "train")


def test_loss_in_nats_becomes_bits_per_byte(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, list(range(10)), [])  # 3 bytes a token
    assert shards.bpb(math.log(8)) == pytest.approx(1.0)
    assert bits_per_byte(10 * math.log(8), 30) == shards.bpb(math.log(8))
    assert bits_per_byte(1.0, 0) > 0


def test_shards_load_without_torch() -> None:
    code = "import sys, llm.data.shards; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
