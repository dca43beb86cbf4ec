"""`python -m llm judge`: a model's verdicts in both orders, kept, resumed, and held against exact match."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm.cli.main import main
from llm.evaluation.comparison import paired_share
from llm.evaluation.instruct import judge
from llm.evaluation.instruct.judge import RUBRIC, fill, read_judgements, read_rubric

Reply = Callable[[dict[str, Any]], tuple[int, Any]]


class Stub(http.server.ThreadingHTTPServer):
    """An endpoint that answers by a function of the request's body."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.bodies, self.keys = reply, list[dict[str, Any]](), list[str | None]()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        status, content = self.server.reply(body) if self.path == "/v1/chat/completions" else (404, {})
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode() if not isinstance(content, bytes) else content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Reply], Stub]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judge, "PAUSES", (0.0, 0.0))
    started: list[Stub] = []

    def start(reply: Reply) -> Stub:
        started.append(Stub(reply))
        threading.Thread(target=started[-1].serve_forever, args=(0.01,), daemon=True).start()
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def said(text: str, **more: Any) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"content": text}} | more]}


def parts(body: dict[str, Any]) -> list[str]:
    """Return the correct answer and both answers in a prompt."""
    prompt = body["messages"][0]["content"]
    return [
        re.findall(rf"<{name}>\n(.*?)\n</{name}>", prompt, re.DOTALL)[0] for name in ("correct", "answer-1", "answer-2")
    ]


def truth(body: dict[str, Any]) -> str:
    correct, one, two = parts(body)
    return "tie" if (one == correct) == (two == correct) else "1" if one == correct else "2"


def predictions(n: int = 6) -> None:
    """Write answers of two models: A right on every third pair, B on every second."""
    rows = [
        {
            "instruction": f"question {i} {{answer_2}}",
            "input": "",
            "output": "right",
            "answers": {"a": "right" if i % 3 == 0 else "no", "b": "right" if i % 2 == 0 else "wrong"},
        }
        for i in range(n)
    ]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(server: Stub, *options: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(["judge", "p.jsonl:a", "p.jsonl:b", "--endpoint", server.url, "--model", "m", *options])
    return status, *capsys.readouterr()


def test_both_orders_are_judged_and_counted(stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server = stub(lambda body: said(f"**Verdict: {truth(body)}**"))
    predictions()
    status, out, _ = run(server, "--json", capsys=capsys)
    found = json.loads(out)
    assert status == 0 and len(server.bodies) == 10, "equal answers are a tie without a question"
    assert (found["wins_a"], found["wins_b"], found["ties"]) == (1, 2, 3), "3 alone; 2 and 4 alone; 0, 1 and 5"
    assert found["win_rate"][0] == pytest.approx(3.5 / 6)
    assert found["agreement"][0] == 1.0 and found["comparable"] == 3
    assert found["first"][0] == 0.5 and found["unstable"] == found["unusable"] == 0
    answers = [tuple(parts(body)[1:]) for body in server.bodies]
    assert sorted(answers) == sorted(answer[::-1] for answer in answers), "each pair both ways round"
    status, out, _ = run(server, capsys=capsys)
    assert "B is not to be told apart from A: it wins 58.3 %" in out and "agreement with exact match, on 3 pairs" in out


def test_a_judge_that_prefers_the_first_answer_decides_nothing(stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server = stub(lambda body: said("1"))
    predictions()
    found = json.loads(run(server, "--json", capsys=capsys)[1])
    assert (found["wins_a"], found["wins_b"], found["ties"], found["unstable"]) == (0, 0, 6, 5)
    assert found["first"][0] == 1.0 and found["win_rate"][0] == 0.5 and found["agreement"][0] == 0.0


@pytest.mark.parametrize("form", ["choice", "json_schema", "logprobs", "none"])
def test_a_judge_that_does_not_keep_to_the_form_is_held_to_it(
    form: str, stub: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        kind = body.get("response_format", {}).get("type") or ("logprobs" if body.get("logprobs") else "text")
        if kind == "text":
            return said("Well, I would say that both have something.")
        if kind != form:
            return (400, {"error": "unknown"}) if kind != "logprobs" else said("x")
        word = truth(body)
        if kind == "json_schema":
            return said(json.dumps({"verdict": word}))
        tokens = [{"token": "The", "logprob": -0.1}, {"token": f" {word[:2]}", "logprob": -1.0}]
        tokens += [{"token": other, "logprob": -5.0} for other in ("1", "2", "tie")]
        return said("The", logprobs={"content": [{"top_logprobs": tokens}]}) if kind == "logprobs" else said(word)

    server = stub(reply)
    predictions()
    found = json.loads(run(server, "--json", "--parallel", "1", capsys=capsys)[1])
    forms = {made.form for made in read_judgements(Path("judgements.jsonl")).values()}
    if form == "none":
        assert found["pairs"] == 1 and found["unusable"] == 5 and forms == {"logprobs"}
    else:
        assert (found["wins_a"], found["wins_b"], found["ties"]) == (1, 2, 3) and forms == {form}
    asked = [body.get("response_format", {}).get("type") for body in server.bodies]
    assert asked.count("choice") == (10 if form == "choice" else 1), "a form that is refused is asked for once"


def test_judgements_are_kept_without_the_key_and_not_asked_again(
    stub: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [True]

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        prompt = body["messages"][0]["content"]
        if failing[0] and re.search("question [45]", prompt):
            return 500, b"busy"
        return said(truth(body) if "<correct>" in prompt else "tie")

    server = stub(reply)
    monkeypatch.setenv(judge.KEY, "sesame")
    predictions()
    status, out, err = run(server, "--parallel", "1", capsys=capsys)
    assert status == 1 and not out and len(err.splitlines()) == 1
    assert "status 500: busy; what was judged is kept, run it again to go on" in err
    content = Path("judgements.jsonl").read_bytes()
    assert content.count(b"\n") == 6 and b"sesame" not in content
    assert set(server.keys) == {"Bearer sesame"} and "sesame" not in err
    Path("judgements.jsonl").write_bytes(content[:-7])  # the last line as a kill may leave it
    failing[0], server.bodies = False, []
    found = json.loads(run(server, "--json", capsys=capsys)[1])
    assert len(server.bodies) == 5 and found["pairs"] == 6
    server.bodies = []
    assert json.loads(run(server, "--json", capsys=capsys)[1]) == found and not server.bodies
    run(server, "--json", "--limit", "2", capsys=capsys)
    assert not server.bodies
    Path("own.md").write_text("{question} {answer_1} {answer_2}")
    run(server, "--rubric", "own.md", "--limit", "2", capsys=capsys)
    assert len(server.bodies) == 2, "another rubric asks anew: of question 3 alone, as 0 has equal answers"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--endpoint", "localhost:1"], r"--endpoint: no address \(expected http://HOST:PORT/v1"),
        (["--endpoint", "http://me:secret@h/v1"], "--endpoint: holds a secret; put the key into LLM_JUDGE_KEY"),
        (["--limit", "0"], "--limit: expected 1 or more, got 0"),
        (["--rubric", "own.md"], r"own.md: no place for answer_2 \(expected \{answer_2\}\)"),
        (["--rubric", "gone.md"], "gone.md: No such file"),
        ([], "status 401: who.*; set LLM_JUDGE_KEY in the environment"),
        (["--model", "html"], "no chat completion .*; name an OpenAI-compatible server"),
    ],
)
def test_wrong_input_is_one_line(
    options: list[str], problem: str, stub: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server = stub(lambda body: (200, b"<html>") if body["model"] == "html" else (401, b"who are you"))
    predictions()
    Path("own.md").write_text("{question} {answer_1}")
    status, out, err = run(server, *options, capsys=capsys)
    assert status == 1 and not out and re.search(problem, err) and len(err.splitlines()) == 1, err
    assert "secret@" not in err


def test_no_endpoint_no_judge(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["judge", "a", "b", "--model", "m"])
    assert ended.value.code == 2 and "--endpoint" in capsys.readouterr().err


def test_answers_in_a_rubric_stay_answers() -> None:
    values = {"question": "{answer_2}", "expected": "e", "answer_1": "{expected}", "answer_2": "two"}
    text = fill(read_rubric(RUBRIC), values)
    assert "<question>\n{answer_2}\n</question>" in text and "<answer-1>\n{expected}\n</answer-1>" in text


def test_interval_of_the_win_rate_covers() -> None:
    random = np.random.default_rng(0)
    for win, tie, n in ((0.5, 0.3, 40), (0.9, 0.08, 50), (0.1, 0.0, 30)):
        counts = random.multinomial(n, [win, tie, 1 - win - tie], size=400)
        cache = {tuple(c): paired_share(int(c[0]), int(c[2]), n) for c in np.unique(counts, axis=0)}
        found = [cache[tuple(c)] for c in counts]
        covered = np.mean([low <= win + tie / 2 <= high for _, low, high in found])
        assert 0.92 <= covered <= 0.985, (win, tie, n, covered)
    assert paired_share(0, 0, 0) == (0.5, 0.0, 1.0)
    assert paired_share(20, 0, 20).high == pytest.approx(1.0) and 0.8 < paired_share(20, 0, 20).low < 1
    assert paired_share(0, 0, 9).value == 0.5
