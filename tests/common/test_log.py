"""Messages of progress: where they go, from which level upwards, and in what form."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest
from tqdm import tqdm

from llm.common import distributed
from llm.common.errors import InputError
from llm.common.log import setup_logging

LOGGER = logging.getLogger("llm")


@pytest.mark.parametrize(
    ("level", "environment", "shown"),
    [
        (None, None, ["info", "warning"]),
        (None, "warning", ["warning"]),
        (None, "ERROR", []),
        ("info", "error", ["info", "warning"]),
        ("warning", "debug", ["warning"]),
    ],
)
def test_level_selects_messages(
    level: str | None,
    environment: str | None,
    shown: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if environment is not None:
        monkeypatch.setenv("LLM_LOG_LEVEL", environment)
    setup_logging(level)
    for name in ("debug", "info", "warning"):
        getattr(LOGGER, name)(name)
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", shown)


def test_debug_level_adds_time_and_level(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("debug")
    LOGGER.debug("step %d", 3)
    assert capsys.readouterr().err.endswith(" DEBUG step 3\n")


def test_unknown_level_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_LOG_LEVEL", "loud")
    with pytest.raises(InputError, match=r"LLM_LOG_LEVEL: no such level \(expected debug, .*, got loud\)"):
        setup_logging()


def test_message_is_one_line_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    LOGGER.info("a\n\x1b[2Jb")
    assert capsys.readouterr().err == "a\\n\\x1b[2Jb\n"


def test_second_setup_does_not_repeat_messages(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    LOGGER.info("once")
    assert capsys.readouterr().err == "once\n"


def test_message_is_written_above_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    with tqdm(total=2, file=terminal, desc="bar"):
        LOGGER.info("message")
    assert "\rmessage\n" in terminal.getvalue().replace(" ", "") and "\rbar:" in terminal.getvalue().split("message")[1]


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    LOGGER.warning("on rank 1")
    assert capsys.readouterr().err == ""


def test_log_module_loads_without_torch() -> None:
    code = "import sys, llm.common.log; print([name for name in ('torch', 'tqdm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
