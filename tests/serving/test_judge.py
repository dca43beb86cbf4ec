"""`python -m llm judge` against this project's own server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm.cli.main import main
from llm.evaluation.instruct.judge import read_judgements
from tests.serving.conftest import Running


def test_a_weak_judge_behind_our_server_is_held_to_a_choice(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"q{i}", "output": "x", "answers": {"a": "x", "b": f"y{i}"}} for i in range(2)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("short.md").write_text("{question}: {answer_1} or {answer_2}?")
    server = Running(place)
    try:
        options = ["--endpoint", f"{server.url}/v1", "--model", "instruct", "--rubric", "short.md", "--json"]
        assert main(["judge", "p.jsonl:a", "p.jsonl:b", *options]) == 0
    finally:
        server.stop()
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] == 2 and found["unusable"] == 0, "a random model too gives a verdict"
    made = read_judgements(Path("judgements.jsonl")).values()
    assert len(made) == 4 and {each.form for each in made} == {"choice"}
    assert {each.said for each in made} <= {"1", "2", "tie"}
