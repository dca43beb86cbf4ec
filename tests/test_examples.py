"""The examples of own data: their files are as their scripts write them, and one command runs each."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm.config import KINDS, parse_params
from llm.download.fetching.fetch import fetch
from llm.download.records.readers import write_records
from tests.conftest import ROOT
from tests.pipelines import environment, execute, read_params, tiny_copy

SCRIPTS = ["examples/mail/make_mails.py", "examples/handbook/make_handbook.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_writes_the_committed_files(script: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / script, "--out", tmp_path], check=True)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {name: (ROOT / script).with_name(name).read_bytes() for name in written} and len(written) == 2


def test_the_sources_read_the_files_with_their_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    params = parse_params(read_params(ROOT))
    records = {}
    for name in ("example-mails", "example-handbook"):
        for kind in KINDS:
            section = getattr(params.sources[name], kind)
            if section is not None:
                files = [found for file in section.files for found in fetch(section.entry(file), tmp_path)]
                write_records(section, files, tmp_path / "out.jsonl")
                records[name, kind] = (tmp_path / "out.jsonl").read_text(encoding="utf-8").count("\n")
    assert records == {
        ("example-mails", "corpus"): 1200,
        ("example-mails", "messages"): 600,
        ("example-handbook", "corpus"): 201,
        ("example-handbook", "instructions"): 328,
    }


def test_no_mail_of_test_is_in_training_and_each_label_is_in_both_languages() -> None:
    with (ROOT / "examples/mail/mails.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    archive = (ROOT / "examples/mail/archive.txt").read_text(encoding="utf-8").split("\n\n")
    texts = [row["text"] for row in rows] + [text.strip() for text in archive]
    assert len(set(texts)) == len(texts)
    for split in ("train", "val", "test"):
        kinds = {(row["label"], row["language"]) for row in rows if row["split"] == split}
        assert len(kinds) == 8, split


def test_questions_that_are_never_asked_are_answered_by_the_handbook_alone() -> None:
    lines = (ROOT / "examples/handbook/questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    asked = {(row["instruction"], row["output"]) for row in questions if row["split"] != "test"}
    handbook = (ROOT / "examples/handbook/handbook.md").read_text(encoding="utf-8")
    never = [row for row in questions if row["task"] == "never asked"]
    assert len(never) > 20
    for row in never:
        assert (row["instruction"], row["output"]) not in asked
        value = re.findall(r"\w+", row["output"])[-2 if row["output"].endswith(("coins.", "years.")) else -1]
        assert value in handbook, row


@pytest.mark.slow
def test_each_example_runs_by_its_command(tmp_path: Path) -> None:
    """With a tiny model and few steps: `-S` of the settings is what is tested, not what the models reach."""
    folder = tiny_copy(tmp_path / "copy")
    few = "-S pretrain.max_steps=4 -S finetune_classify.max_steps=4 -S finetune_instruct.max_steps=4".split()
    execute(folder, "git", "add", "-A")
    execute(folder, "git", "commit", "-q", "-m", "examples")
    for name, source in (("mail", "messages of example-mails"), ("handbook", "instructions of example-handbook")):
        settings = shlex.split((ROOT / f"examples/{name}/settings").read_text(encoding="utf-8"))
        kept = [word for word in settings if word != "-S" and not re.match(r"model\.", word)]
        command = ["dvc", "exp", "run", *(part for word in kept for part in ("-S", word)), *few]
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and source in done.stdout + done.stderr, done.stdout + done.stderr
        assert (folder / "reports/report.md").exists()
    for name in ("models/base", "models/instruct", "data/tokens/corpus"):
        shutil.copytree(folder / name, folder / ".work/sample" / Path(name).name)
    measure = ("env", "PYTHONPATH=.", sys.executable, "examples/handbook/measure.py", ".work/sample")
    lines = execute(folder, *measure).splitlines()
    assert re.fullmatch(r"handbook, bits per byte: (\d+\.\d+) before, \1 after", lines[0])
    nothing = "0 of 28 (0.0-12.1 %; 0 more but for one word)"
    assert f"never asked, answered: {nothing} before, {nothing} after" in lines


def test_little_text_trains_members_and_a_student(tmp_path: Path) -> None:
    options = (
        "--megabytes 0.2 --vocab 300 --layers 1 --width 64 --epochs 0.2 --members 2 --student-epochs 0.2 --baselines"
    )
    script = [sys.executable, ROOT / "examples/limited/train.py"]
    done = subprocess.run(
        [*script, ROOT / "data/sample/stories.txt", *options.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = dict(re.findall(r"^\| ([a-z0-9 -]+) \| (\d\.\d+) \|", done.stdout.lower(), re.MULTILINE))
    names = ["n-gram model", "ppm", "one model", "its weights averaged", "ensemble of 2", "student of the ensemble"]
    assert list(rows) == names
    assert all(0.5 < float(bits) < 7 for bits in rows.values())
    refused = subprocess.run([*script, tmp_path / "none.txt"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and re.fullmatch(r"error: .*none.txt: not found; .*\n", refused.stderr)
