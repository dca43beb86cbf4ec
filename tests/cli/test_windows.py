"""The library and the command line without the modules that Windows lacks, in a process of their own."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llm.checkpoint.folder import Checkpoint, CheckpointConfig, save_checkpoint
from llm.common import files
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from tests.conftest import ROOT
from tests.helpers import SHIPPED_FORM, gpt_config

PROGRAM = """
import importlib, importlib.abc, pkgutil, sys
import psutil  # has modules of its own for each system

ABSENT = {"fcntl", "resource", "pwd", "grp", "termios", "readline"}


class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}")


for name in ABSENT:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Absent())

import llm
from llm.cli.main import main

for module in pkgutil.walk_packages(llm.__path__, "llm."):
    if module.name not in ("llm.__main__", "llm.bench.__main__", "llm.common.lock"):  # the lock is that of the pipeline
        importlib.import_module(module.name)
sys.argv = ["llm", "generate", sys.argv[1], "--prompt", "One morning", "--max-new-tokens", "3"]
main()
"""


def test_library_and_command_line_need_no_module_that_windows_lacks(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["One morning the baker sold bread."] * 5, vocab_size=270)
    config = gpt_config(**SHIPPED_FORM, vocab_size=tokenizer.vocab_size)
    checkpoint = Checkpoint(GPT(config), tokenizer, CheckpointConfig(kind="base", gpt=config))
    save_checkpoint(tmp_path / "model", checkpoint)
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "model")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("One morning")


def test_files_are_flushed_as_windows_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, flushed = os.open, os.fsync

    def open_(path: Path, flags: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags)

    def fsync(descriptor: int) -> None:
        assert stat.S_ISREG(os.fstat(descriptor).st_mode)
        os.write(descriptor, b"")  # as there, an error where it is not open for writing
        flushed(descriptor)

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", fsync)
    with files.replaced_folder(tmp_path / "model") as draft:
        files.write_atomic(draft / "config.json", "{}")
    assert files.read_json(tmp_path / "model/config.json") == {}
