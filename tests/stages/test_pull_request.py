"""Report of a pull request from two commits' committed figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm.common.errors import InputError
from stages import pull_request
from tests.pipelines import execute


def write_figures(accuracy: float) -> None:
    path = Path("reports/metrics/evaluate.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    interval = {"accuracy": accuracy, "accuracy_low": accuracy - 0.01, "accuracy_high": accuracy + 0.01}
    path.write_text(json.dumps({"classifier": {**interval, "messages": 100}, "base_xz": {"bpb": 1.0}}))


def test_figures_stand_beside_those_of_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(pull_request, "said", lambda *words: commands.append(words) or "SAID")
    execute(tmp_path, "git", "init", "-q")
    write_figures(0.9)
    execute(tmp_path, "git", "add", "-A")
    execute(tmp_path, "git", "commit", "-qm", "one")
    write_figures(0.95)
    assert pull_request.main(["HEAD"]) == 0
    out = capsys.readouterr().out
    assert "| classifier accuracy | 0.9 (0.89 to 0.91) | 0.95 (0.94 to 0.96) |" in out
    assert "messages" not in out and "xz" not in out and out.count("SAID") == 2
    assert commands == [("llm", "compare", "HEAD", "reports"), ("stages.release", "--dry", "--markdown")]
    with pytest.raises(InputError, match="no-such: no commit here"):
        pull_request.main(["no-such"])


def test_a_command_without_output_gives_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pull_request.said("json.tool", str(tmp_path / "none")).startswith("Not at hand: ")
    (tmp_path / "a").write_text("{}")
    assert pull_request.said("json.tool", str(tmp_path / "a")) == "{}\n"
