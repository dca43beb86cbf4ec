"""Detection of the other package named `llm`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm.common import namesake
from llm.common.errors import InputError
from tests.conftest import ROOT


def install_other(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (site / "llm-0.27.dist-info").mkdir()
    (site / "llm-0.27.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: llm\nVersion: 0.27\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])


def test_no_other_package_no_word(capsys: pytest.CaptureFixture[str]) -> None:
    namesake.check_namesake()
    assert capsys.readouterr().err == ""


def test_package_beside_ours_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install_other(tmp_path, monkeypatch)
    with caplog.at_level("WARNING"):
        namesake.check_namesake()
    assert "llm 0.27, another package of the same name, is installed too" in caplog.text


def test_package_over_ours_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_other(tmp_path, monkeypatch)
    monkeypatch.setattr(namesake, "PACKAGE", tmp_path / "llm")
    with pytest.raises(InputError, match=r"llm 0\.27, .*installed over this project's files; use an environment"):
        namesake.check_namesake()


def test_package_in_place_of_ours_stops_every_stage(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/__init__.py").write_text("")
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    code = "import sys; sys.path[:0] = sys.argv[1:]; import stages.sync"
    env = os.environ | {"PYTHONPATH": ""}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("stages: wrong package llm (expected ") and done.stderr.count("\n") == 1
