"""Pairwise judgement of two models' answers by a language model behind an OpenAI-compatible endpoint.

Each pair is judged in both orders: only a preference that survives the exchange counts, everything else is a tie.
Judgements are appended to a file, and those that it holds are not asked again.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import requests

from llm.common.errors import InputError
from llm.evaluation.comparison import paired_share
from llm.evaluation.metrics import Interval, fold, wilson
from llm.evaluation.predictions import Predictions

RUBRIC = Path(__file__).with_name("rubric.md")
CHOICES = ("1", "2", "tie")
PLACES = ("question", "expected", "answer_1", "answer_2")  # in a rubric
VERDICT = re.compile(r"\W*(?:(?:verdict|answer|result)\W+)?(1|2|tie)\W*", re.IGNORECASE)
PAUSES = (1.0, 4.0, 16.0)  # seconds before the next attempt
KEY = "LLM_JUDGE_KEY"  # in the environment
Side = Literal["a", "b", "tie"]


class Judgement(NamedTuple):
    """A judge's verdict on a pair in one order; `said` is its own text, `verdict` None where that has no sense."""

    id: str  # of the judge, the rubric and the prompt
    example: int
    order: str  # ab or ba
    verdict: Side | None
    form: str  # of the request: text, choice, json_schema or logprobs; equal answers need none
    said: str


class JudgeReport(NamedTuple):
    """Verdicts on pairs; a tie is half a win."""

    pairs: int
    wins_a: int
    wins_b: int
    ties: int
    unstable: int  # ties in which the preference followed the order
    unusable: int  # pairs without a sensible verdict, not counted above
    win_rate: Interval  # of B
    first: Interval  # share of the preferences that were for the first answer; 0.5 without position bias
    agreement: Interval  # of the pairs where one answer alone is the expected one, those judged in its favour
    comparable: int  # number of such pairs


# ---- asking ----------------------------------------------------------------------------------------------------------


class Judge:
    """A model behind an endpoint: asked for a word, and where it says something else, held to one by a form."""

    def __init__(self, endpoint: str, model: str, key: str | None, max_tokens: int, timeout: float = 300.0) -> None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"--endpoint: no address (expected http://HOST:PORT/v1, got {parts.path}); name a server")
        if parts.username or parts.password or parts.query:
            raise InputError(f"--endpoint: holds a secret; put the key into {KEY} in the environment")
        self.url, self.model, self.max_tokens, self.timeout = endpoint.rstrip("/"), model, max_tokens, timeout
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.refused: set[str] = set()  # forms that the server does not know

    def ask(self, prompt: str) -> tuple[str | None, str, str]:
        """Return one of CHOICES or None, the form of the request, and the reply."""
        form, said = "text", ""
        for form, extra in forms(self.max_tokens):
            if form in self.refused:
                continue
            reply = self.post({"messages": [{"role": "user", "content": prompt}], "temperature": 0.0} | extra, form)
            if reply is None:
                self.refused.add(form)
                continue
            said = reply_text(reply, form)
            if (found := VERDICT.fullmatch(last_line(said))) is not None:
                return found[1].lower(), form, said
        return None, form, said

    def post(self, body: Mapping[str, Any], form: str) -> Mapping[str, Any] | None:
        """Return the server's reply; None where it refuses a form other than plain text."""
        for pause in (*PAUSES, None):
            try:
                reply = requests.post(
                    f"{self.url}/chat/completions",
                    json={"model": self.model, **body},
                    auth=self._authorize,
                    timeout=self.timeout,
                    allow_redirects=False,  # the key is for this host
                )
            except requests.RequestException as error:
                problem = type(error).__name__
            else:
                if reply.status_code == 200:
                    return parsed(reply)
                problem = f"status {reply.status_code}: {reply.text[:200].strip()}"
                if reply.status_code in (400, 422) and form != "text":
                    return None
                if reply.status_code < 500 and reply.status_code not in (408, 429):
                    hint = f"; set {KEY} in the environment" if reply.status_code in (401, 403) else ""
                    raise InputError(f"judge at {self.url}: {problem}{hint}")
            if pause is not None:
                time.sleep(pause)
        raise InputError(f"judge at {self.url}: {problem}; what was judged is kept, run it again to go on")

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers.update(self.headers)  # in place of what ~/.netrc might say
        return request


def forms(max_tokens: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the forms of a request with their fields, the freest first."""
    schema = {
        "type": "object",
        "properties": {"verdict": {"type": "string", "enum": list(CHOICES)}},
        "required": ["verdict"],
        "additionalProperties": False,
    }
    named = {"name": "verdict", "schema": schema, "strict": True}
    yield "text", {"max_tokens": max_tokens}
    yield "choice", {"max_tokens": 8, "response_format": {"type": "choice", "choices": list(CHOICES)}}
    yield "json_schema", {"max_tokens": 32, "response_format": {"type": "json_schema", "json_schema": named}}
    yield "logprobs", {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}


def parsed(reply: requests.Response) -> Mapping[str, Any]:
    try:
        content = reply.json()
        content["choices"][0]["message"]
    except (ValueError, LookupError, TypeError):
        raise InputError(
            f"judge: no chat completion (got {reply.text[:80]!r}); name an OpenAI-compatible server"
        ) from None
    return dict(content)


def reply_text(reply: Mapping[str, Any], form: str) -> str:
    """Return the verdict or the text in a reply."""
    choice = reply["choices"][0]
    text = str(choice["message"].get("content") or "")
    if form == "json_schema":
        try:
            return str(json.loads(text)["verdict"])
        except (ValueError, LookupError, TypeError):
            return text
    if form == "logprobs":
        try:
            likely = choice["logprobs"]["content"][0]["top_logprobs"]
            fitting = [(each["logprob"], c) for each in likely for c in CHOICES if begins(c, each["token"])]
            return str(max(fitting, default=(0.0, ""))[1])
        except (LookupError, TypeError):
            return ""
    return text


def begins(choice: str, token: str) -> bool:
    """Return whether a token is the beginning of a choice."""
    text = token.strip().lower()
    return bool(text) and choice.startswith(text)


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


# ---- judging ---------------------------------------------------------------------------------------------------------


def read_rubric(path: Path) -> str:
    """Return a rubric; it has a place for the question and both answers."""
    text = path.read_text(encoding="utf-8")
    if lacking := [place for place in PLACES if place != "expected" and f"{{{place}}}" not in text]:
        raise InputError(f"{path}: no place for {lacking[0]} (expected {{{lacking[0]}}}); see {RUBRIC}")
    return text


def fill(rubric: str, values: Mapping[str, str]) -> str:
    """Put values into a rubric in one pass, so that a value is never read as a place."""
    return re.sub("{(" + "|".join(PLACES) + ")}", lambda match: values[match[1]], rubric)


def judge_pairs(
    judge: Judge, rubric: str, a: Predictions, b: Predictions, out: Path, *, examples: Sequence[int], parallel: int
) -> list[Judgement]:
    """Judge aligned answers in both orders; append each judgement to `out`, which may hold earlier ones."""
    jobs = [(prompt, example, order) for example in examples for order, prompt in both_orders(rubric, a, b, example)]
    known = read_judgements(out)
    lock = threading.Lock()

    def work(job: tuple[str, int, str]) -> Judgement:
        prompt, example, order = job
        if fold(a.predicted[example]) == fold(b.predicted[example]):
            return Judgement("", example, order, "tie", "equal", "")
        digest = hashlib.sha256(json.dumps([judge.model, judge.max_tokens, prompt]).encode()).hexdigest()[:24]
        if digest in known:
            return known[digest]._replace(example=example, order=order)
        choice, form, said = judge.ask(prompt)
        verdict: Side | None = None
        if choice is not None:
            verdict = "tie" if choice == "tie" else ("a", "b")[(choice == "2") != (order == "ba")]
        made = Judgement(digest, example, order, verdict, form, said)
        with lock, out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(made._asdict(), ensure_ascii=False) + "\n")
        return made

    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def both_orders(rubric: str, a: Predictions, b: Predictions, example: int) -> Iterator[tuple[str, str]]:
    """Yield both orders of a pair with their prompts."""
    question = "\n\n".join(part for part in a.keys[example] if part)
    answers = (a.predicted[example], b.predicted[example])
    for order, (first, second) in (("ab", answers), ("ba", answers[::-1])):
        values = {"question": question, "expected": a.expected[example], "answer_1": first, "answer_2": second}
        yield order, fill(rubric, values)


def read_judgements(path: Path) -> dict[str, Judgement]:
    """Return earlier judgements by id; a line that a kill cut is passed over, and ended."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    found = {}
    for line in content.decode("utf-8", errors="replace").splitlines():
        try:
            made = Judgement(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[made.id] = made
    return found


# ---- report ----------------------------------------------------------------------------------------------------------


def summarize(judgements: Sequence[Judgement], a: Predictions, b: Predictions) -> JudgeReport:
    """Combine the two orders of each pair, and hold the verdicts against exact match."""
    pairs: dict[int, list[Judgement]] = {}
    for each in judgements:
        pairs.setdefault(each.example, []).append(each)
    verdicts: dict[int, Side] = {}
    unstable = 0
    for example, both in pairs.items():
        said = [each.verdict for each in both if each.verdict is not None]
        if len(said) == len(both):
            verdicts[example] = said[0] if len(set(said)) == 1 else "tie"
            unstable += {"a", "b"} <= set(said)
    counts = [list(verdicts.values()).count(side) for side in ("a", "b", "tie")]
    decided = [each for each in judgements if each.verdict in ("a", "b")]
    first = sum(each.order[0] == each.verdict for each in decided)
    right = {example: [fold(x.predicted[example]) == fold(x.expected[example]) for x in (a, b)] for example in verdicts}
    comparable = [example for example, (one, other) in right.items() if one != other]
    agreeing = sum(verdicts[example] == ("a" if right[example][0] else "b") for example in comparable)
    return JudgeReport(
        pairs=len(verdicts),
        wins_a=counts[0],
        wins_b=counts[1],
        ties=counts[2],
        unstable=unstable,
        unusable=len(pairs) - len(verdicts),
        win_rate=paired_share(counts[1], counts[0], len(verdicts)),
        first=wilson(first, len(decided)),
        agreement=wilson(agreeing, len(comparable)),
        comparable=len(comparable),
    )
