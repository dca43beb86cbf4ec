"""Own files stay out of git, of the reports and of the tracked artifacts, and experiments find them all the same."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

from llm.common.errors import InputError
from llm.config import KINDS, parse_params
from llm.data.examples import read_quotable
from llm.evaluation.base.base_model import BaseResult, Completion
from llm.evaluation.classifier.classification import ClassifierResult
from llm.evaluation.instruct.instruction_following import InstructResult
from llm.preprocess import data_card as datacard
from llm.preprocess.supervised import SplitRows
from llm.reporting import report, tables
from stages import download, evaluate
from stages.runtime.run import Run
from tests.conftest import ROOT
from tests.datasets import message_rows
from tests.helpers import tiny_tokenizer
from tests.pipelines import change_params, environment, execute, read_params, tiny_copy, write_params
from tests.reporting.test_report import results

MARKS = {kind: f"zq{kind}zq" for kind in KINDS}  # in every text of that kind
OWN = Path("data/own/mine")
ODD = ("data/own/README.md.txt", "data/own/a b/ü.md", "data/own/-x", "data/own/deep/er/README.md", "data/own/dvc")


# ---- with DVC and git ------------------------------------------------------------------------------------------------


def with_own_data(folder: Path) -> Path:
    """Make a tiny copy of the repository whose committed params choose own files; the files are not committed."""
    tiny_copy(folder)
    values = read_params(folder)
    values["data"] = dict.fromkeys(KINDS, "mine")
    values["sources"]["mine"] = {
        "licence": "private",
        "corpus": {"files": [{"path": f"{OWN}/books/*.txt"}], "document_separator": "\n\n\n"},
        "messages": {"files": [{"path": f"{OWN}/mails.csv"}], "labels": ["ham", "spam"]},
        "instructions": {"files": [{"path": f"{OWN}/pairs.jsonl"}]},
    }
    values["tokenize"]["tokenizer"]["vocab_size"] = 290
    write_params(folder, values)
    for section in ("pretrain", "finetune_classify", "finetune_instruct"):
        change_params(folder, {section: {"max_steps": 4, "warmup_steps": 1, "decay_steps": 1, "eval_interval": 4}})
    for section in ("finetune_classify", "finetune_instruct"):
        change_params(folder, {section: {"scratch_control": False}})
    commit(folder, "Start")

    books = folder / OWN / "books"
    books.mkdir(parents=True)
    prose = "one morning the cat sat on the mat and saw a dog"
    book = "\n\n\n".join(f"{MARKS['corpus']} {i} {prose * 6}" for i in range(50))
    (books / "a diary.txt").write_text(book, encoding="utf-8")
    mails = [f"{MARKS['messages']} {i // 2 * 2} hello,{('ham', 'spam')[i % 2]}\n" for i in range(60)]
    (folder / OWN / "mails.csv").write_text("text,label\n" + "".join(mails), encoding="utf-8")
    pairs = [json.dumps({"instruction": f"{MARKS['instructions']} {i}", "output": f"said {i}"}) for i in range(60)]
    (folder / OWN / "pairs.jsonl").write_text("\n".join([*pairs, *pairs[:3]]) + "\n", encoding="utf-8")
    return folder


def commit(folder: Path, message: str) -> None:
    execute(folder, "git", "add", "-A")
    execute(folder, "git", "commit", "-qm", message)


def with_remotes(folder: Path) -> tuple[Path, Path]:
    """Give the repository a bare git remote `origin` and a committed default DVC remote; return both folders."""
    origin, remote = folder.with_name(f"{folder.name}.git"), folder.with_name(f"{folder.name}-remote")
    execute(folder, "git", "init", "-q", "--bare", str(origin))
    execute(folder, "git", "remote", "add", "origin", str(origin))
    execute(folder, "dvc", "remote", "add", "-q", "-d", "there", str(remote))
    execute(folder, "git", "commit", "-qm", "Add a remote", ".dvc/config")
    return origin, remote


def git_objects(folder: Path) -> bytes:
    """Return the content of every git object, whether a ref leads to it or not."""
    command = ["git", "cat-file", "--batch-all-objects", "--batch"]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout


def marked(content: bytes) -> list[str]:
    """Return the kinds of private data that the content quotes."""
    return [kind for kind, mark in MARKS.items() if mark.encode() in content]


def files_marked(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and marked(path.read_bytes())]


def run_queue(folder: Path, name: str) -> None:
    """Run what is queued; the experiment has to succeed."""
    execute(folder, "dvc", "queue", "start")
    for _ in range(120):
        if done := [task for task in execute(folder, "dvc", "queue", "status").splitlines() if f" {name} " in task]:
            assert "Failed" not in done[0], execute(folder, "dvc", "queue", "logs", name)
            if "Success" in done[0]:
                return
        time.sleep(0.5)
    raise AssertionError("the queue did not end")


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in which experiments of each sort have read own files, and were pushed to a git remote."""
    folder = with_own_data(tmp_path_factory.mktemp("private") / "project")
    with_remotes(folder)
    said = execute(folder, "dvc", "exp", "run", "-n", "here")
    assert "download: mine: private data." in said
    assert marked(git_objects(folder)) == []
    for name in ODD:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(" ".join(MARKS.values()), encoding="utf-8")
    words = ["dvc", "exp", "run", "-f", "-C", str(OWN)]
    execute(folder, *words, "--queue", "-n", "queued", "download")
    run_queue(folder, "queued")
    execute(folder, *words, "--temp", "-n", "temporary", "-S", "tokenize.tokenizer.vocab_size=291", "tokenize")
    execute(folder, "dvc", "exp", "push", "--no-cache", "origin", "here", "queued", "temporary")
    return folder


@pytest.mark.slow
def test_no_git_object_of_any_experiment_quotes_own_files(private: Path) -> None:
    origin = private.with_name("project.git")
    for place in (private, origin):
        refs = execute(place, "git", "for-each-ref", "--format=%(refname)")
        assert all(f"/{name}\n" in refs for name in ("here", "queued", "temporary"))
        assert marked(git_objects(place)) == []
    assert not private.with_name("project-remote").exists(), "--no-cache uploads nothing to the DVC remote"


@pytest.mark.slow
def test_git_adds_and_stashes_no_own_file(private: Path) -> None:
    assert "data/own" not in execute(private, "git", "status", "--porcelain", "-uall")
    execute(private, "git", "stash", "-u")
    assert all((private / name).is_file() for name in ODD)
    execute(private, "git", "stash", "pop")
    execute(private, "git", "add", "-A")
    assert execute(private, "git", "ls-files", "data/own").split() == ["data/own/README.md"]
    assert marked(git_objects(private)) == []


@pytest.mark.slow
def test_reports_and_tracked_artifacts_quote_no_private_source(private: Path) -> None:
    quoting = {path.relative_to(private / "reports").as_posix() for path in files_marked(private / "reports")}
    assert {"predictions/messages.jsonl", "predictions/instructions.jsonl"} <= quoting
    assert all(name.startswith("predictions/") for name in quoting)
    assert (private / "reports/predictions/completions.jsonl").is_file()
    text = (private / "reports/report.md").read_text(encoding="utf-8")
    assert text.count("is not `quotable`. The texts are in `reports/predictions/") == 2
    card = json.loads((private / "reports/data_card.json").read_text(encoding="utf-8"))
    assert card["messages"]["most_repeated"] == [{"times": 2}] * 3
    assert "data/raw/messages.jsonl" in (private / "reports/data_card.md").read_text(encoding="utf-8")
    runs = private / ".work/runs"
    assert list(runs.rglob("report.md")) and list(runs.rglob("data_card.md"))
    assert files_marked(runs) == []


@pytest.mark.slow
def test_experiments_without_own_files_say_what_is_missing(private: Path) -> None:
    command = ["dvc", "exp", "run", "--temp", "-f", "download"]
    done = subprocess.run(command, cwd=private, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode and f"{OWN}/books/*.txt: expected a file or a pattern of files" in done.stdout + done.stderr


@pytest.mark.slow
def test_files_that_dvc_adds_are_found_by_experiments_and_stay_out_of_git(tmp_path: Path) -> None:
    folder = with_own_data(tmp_path / "project")
    origin, remote = with_remotes(folder)
    execute(folder, "dvc", "add", str(OWN / "mails.csv"), str(OWN / "books"), str(OWN / "pairs.jsonl"))
    commit(folder, "Add own data")
    added = set(execute(folder, "git", "ls-files", str(OWN)).split())
    assert added == {f"{OWN}/{name}" for name in (".gitignore", "mails.csv.dvc", "books.dvc", "pairs.jsonl.dvc")}
    execute(folder, "dvc", "exp", "run", "--queue", "-n", "queued", "download")
    run_queue(folder, "queued")
    execute(folder, "dvc", "exp", "run", "--temp", "-n", "temporary", "-f", "download")
    execute(folder, "dvc", "exp", "push", "origin", "queued", "temporary")
    for place in (folder, origin):
        assert marked(git_objects(place)) == []
    assert files_marked(remote), "the owner has pushed them to the DVC remote"


# ---- what is withheld, and what is said ------------------------------------------------------------------------------


def quoting_results() -> tuple[BaseResult, ClassifierResult, InstructResult]:
    """Results in which models recite what they were trained on."""
    base, classifiers, instruct = results(["ham", "spam"])
    base = base._replace(completions=[Completion("One", MARKS["corpus"], MARKS["corpus"])])
    first = instruct.examples[0]
    pair = first.pair._replace(instruction=MARKS["instructions"], output=MARKS["instructions"])
    examples = [first._replace(pair=pair, answers={"gpt": MARKS["corpus"]}), *instruct.examples[1:]]
    return base, classifiers._replace(texts=[MARKS["messages"]] * 60), instruct._replace(examples=examples)


@pytest.mark.parametrize(
    ("quotable", "quoted"),
    [
        (KINDS, ["corpus", "instructions"]),
        (("corpus", "instructions"), ["corpus", "instructions"]),
        (("corpus",), ["corpus"]),
        (("messages", "instructions"), []),
        ((), []),
    ],
)
def test_the_report_quotes_only_what_may_be_quoted(quotable: tuple[str, ...], quoted: list[str]) -> None:
    sources = dict.fromkeys(KINDS, "mine")
    text = report.markdown(*quoting_results(), sources, [], quotable)
    assert marked(text.encode()) == quoted
    assert text.count("Withheld: ") == ("corpus" not in quotable) + (not {"corpus", "instructions"} <= set(quotable))


def test_files_that_dvc_plots_and_metrics_hold_no_texts() -> None:
    plots = "".join(tables.plot_files(*quoting_results()).values())
    assert marked((plots + json.dumps(tables.metrics(*quoting_results()))).encode()) == []
    kept = "".join(tables.predictions(*quoting_results()).values())
    assert marked(kept.encode()) == list(KINDS), "the owner finds all of them here"


def test_the_card_shows_repeated_texts_of_quotable_sources_only() -> None:
    rows = message_rows([(MARKS["messages"], "ham")] * 9 + [("other", "spam")] * 9)
    split = SplitRows({"train": rows, "val": rows[:1], "test": rows[:1]}, 0, {"val": 0, "test": 0})
    part = datacard.describe_messages(rows, split, tiny_tokenizer(), "book")
    card = {"messages": part, "corpus": {"units": 1}}
    assert datacard.without_texts(card, []) == card
    withheld = datacard.without_texts(card, KINDS[:2])
    assert withheld["messages"]["most_repeated"] == [{"times": 9}, {"times": 9}]
    assert withheld["messages"]["splits"] == part["splits"] and withheld["corpus"] == card["corpus"]
    assert marked(json.dumps(card).encode()) == ["messages"] and marked(json.dumps(withheld).encode()) == []


def test_shipped_sources_are_quotable_and_others_not_unless_they_say_so() -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert all(s.quotable == (s.licence != "not stated") for s in parse_params(values).sources.values())
    del values["sources"]["sample"]["quotable"]
    assert not parse_params(values).sources["sample"].quotable
    values["sources"]["sample"]["quotable"] = "yes"
    with pytest.raises(InputError, match=r"sources\.sample\.quotable: input should be a valid boolean"):
        parse_params(values)


def test_an_evaluation_without_the_list_of_quotable_data_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    results = evaluate.Results(*quoting_results(), cast(Any, None), None, {})
    with pytest.raises(InputError, match=r"quotable\.json: missing"):
        evaluate.write_reports(cast(Run, SimpleNamespace()), results)
    (tmp_path / "quotable.json").write_text('["corpus"]\n')
    assert read_quotable(tmp_path) == ["corpus"]
    assert not Path("reports").exists()


@pytest.mark.parametrize(
    ("path", "quotable", "private"),
    [
        ("data/own/mine/a.txt", False, True),
        ("data/own/**/*.txt", True, True),
        ("./data/sample/../own/a.txt", True, True),
        ("/elsewhere/a.txt", False, True),
        ("/elsewhere/a.txt", True, False),
        ("data/own2/\0a.txt", True, False),
    ],
)
def test_private_sources_in_use_are_told(
    path: str, quotable: bool, private: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["sources"]["mine"] = {"licence": "any", "quotable": quotable, "corpus": {"files": [{"path": path}]}}
    download.tell_what_is_private(parse_params(values))
    assert capsys.readouterr().err == "", "it is not in use"
    values["data"]["corpus"] = "mine"
    download.tell_what_is_private(parse_params(values))
    assert ("mine: private data." in capsys.readouterr().err) == private
