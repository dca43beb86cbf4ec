"""`python -m llm chat` as a conversation: history, commands, interruptions, speed."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import llm
from llm.api import Model
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, save_checkpoint
from llm.cli.main import main
from llm.cli.session import ChatSession, read_conversation
from llm.cli.terminal import has_colour
from llm.common.errors import InputError
from llm.common.sanitize import visible
from llm.inference.sampling import Sampling
from llm.model.gpt import GPT
from llm.tokenizer.chat_source import GenerationConfig
from tests.helpers import SHIPPED_FORM, gpt_config, randomize, tiny_tokenizer

WORDS = ["--max-new-tokens", "9"]
SETTINGS = GenerationConfig(do_sample=True, temperature=0.9, top_k=7, eos_token_id=[3])
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>{% endif %}{% endif %}"
)


def tiny_model(**config: Any) -> Checkpoint:
    form = gpt_config(**SHIPPED_FORM, vocab_size=280, context_length=192, emb_dim=32, head_dim=8)
    model = randomize(GPT(form))
    assert isinstance(model, GPT)
    return Checkpoint(model, tiny_tokenizer(), CheckpointConfig(kind="instruct", gpt=form, **config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "instruct"
    save_checkpoint(path, tiny_model(template="chatml"))
    return path


@pytest.fixture
def session(folder: Path) -> ChatSession:
    return ChatSession(llm.load(folder, device="cpu"), {"max_new_tokens": 9, "sampling": Sampling(), "seed": 0})


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    def run(folder: Path, *lines: str, options: list[str] = WORDS) -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
        return Result(main(["chat", str(folder), *options]), *capsys.readouterr())

    return run


def test_a_pipe_is_one_conversation(chat: Callable[..., Result], folder: Path) -> None:
    model = llm.load(folder, device="cpu")
    messages: list[dict[str, str]] = [{"role": "system", "content": "Be brief."}]
    expected = []
    for i, question in enumerate(("the cat", "/etc and //", "the dog")):
        messages.append({"role": "user", "content": question})
        expected.append(model.chat(messages, max_new_tokens=9, seed=i))
        messages.append({"role": "assistant", "content": expected[-1]})
    lines = ["the cat", "", "//etc and //", "the dog"]
    result = chat(folder, *lines, options=[*WORDS, "--system", "Be brief."])
    assert result == (0, "".join(visible(text) + "\n" for text in expected), "")
    alone = chat(folder, "the cat", "the dog", options=[*WORDS, "--single-turn"])
    assert alone.out == "".join(
        visible(model.chat([{"role": "user", "content": question}], max_new_tokens=9)) + "\n"
        for question in ("the cat", "the dog")
    )
    assert alone.out.splitlines()[-1] != result.out.splitlines()[-1]


def test_reset_and_system(session: ChatSession) -> None:
    session.take("/system Be brief.")
    session.take("the cat")
    first = list(session.messages)
    assert [message["role"] for message in first] == ["system", "user", "assistant"]
    session.take("/reset")
    assert session.messages == [{"role": "system", "content": "Be brief."}]
    session.take("the cat")
    assert session.messages == first  # greedy, and nothing was remembered
    session.take("/system")
    assert session.messages == first[1:]


def test_save_and_load(session: ChatSession, folder: Path, tmp_path: Path) -> None:
    session.take("/system Be\u2028brief: é")
    session.take("the cat")
    path = tmp_path / "talk one.jsonl"
    session.take(f"/save {path}")
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == session.messages
    other = ChatSession(llm.load(folder, device="cpu"), dict(session.options))
    other.take(f"/load {path}")
    assert other.messages == session.messages
    session.take("the dog")
    other.take("the dog")
    assert other.messages == session.messages
    session.take(f"/save {path}")
    assert read_conversation(path) == session.messages


def test_a_loaded_question_is_answered(chat: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text('{"role": "user", "content": "the cat"}\n\n')
    asked = chat(folder, options=[*WORDS, "--load", str(path)])
    assert asked.out == chat(folder, "the cat").out
    assert "1 messages" in asked.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"\xff", "not UTF-8"),
        (b'{"role": "user", "content": "a"}\n[]', "line 2: no message"),
        (b'{"role": "user", "content": 5}', "line 1: no message"),
        (b'{"role": "robot", "content": "a"}', "message 1 has the role robot"),
    ],
)
def test_a_damaged_conversation_changes_nothing(
    content: bytes | None, message: str, session: ChatSession, tmp_path: Path
) -> None:
    session.take("the cat")
    before, path = session.messages, tmp_path / "talk.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        session.take(f"/load {path}")
    assert session.messages == before


def test_save_replaces_no_other_file(session: ChatSession, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(InputError, match="exists and is no saved conversation"):
        session.take(f"/save {path}")
    assert path.read_text() == "mine"
    with pytest.raises(InputError, match="cannot be written"):
        session.take(f"/save {path}/below.jsonl")


def test_params(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    session.take("/params temperature=0.7 top_k=5 seed=3")
    assert session.options["sampling"] == Sampling(temperature=0.7, top_k=5)
    assert session.options["seed"] == 3
    session.take("/params top_k=none max_new_tokens=4")
    assert "temperature=0.7 top_k=null" in capsys.readouterr().err
    session.take("the cat")
    assert session.model.usage.new_tokens <= 4 and session.options["seed"] == 4
    before = dict(session.options)
    for setting, message in (
        ("temperature=hot", "temperature: expected a number, got 'hot'"),
        ("top_k=2.5", "top_k: expected a number"),
        ("top_p=0.5 top_p=7", "top_p must be above 0"),
        ("max_new_tokens=-1", "max_new_tokens: expected 0 or more"),
        ("colour=red", "'colour=red' is no NAME=VALUE of"),
        ("enable_thinking=false", "is no NAME=VALUE"),
    ):
        with pytest.raises(InputError, match=message):
            session.take(f"/params {setting}")
        assert session.options == before


def test_variables_of_the_own_template(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "own", tiny_model(chat_templates={"default": TEMPLATE}))
    model = llm.load(tmp_path / "own", device="cpu")
    session = ChatSession(model, {"max_new_tokens": 3, "sampling": Sampling(), "seed": 0})
    session.take("/params enable_thinking=true")
    session.take("the cat")
    messages = session.messages[:1]
    longer = model.encode_conversation(messages, template_kwargs={"enable_thinking": True})
    assert model.usage.prompt_tokens == len(longer) > len(model.encode_conversation(messages))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sing a song", "/sing: unknown command .expected /reset, /system"),
        ("/save", "/save: no file named"),
        ("/reset now", "/reset: takes nothing behind it"),
    ],
)
def test_commands_that_cannot_be_obeyed(
    line: str, message: str, chat: Callable[..., Result], session: ChatSession, folder: Path
) -> None:
    with pytest.raises(InputError, match=message):
        session.take(line)
    result = chat(folder, line, "the cat")
    assert (result.status, result.out, result.err.count("\n")) == (1, "", 1)


def test_help_names_every_command(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    session.take("/help")
    shown = capsys.readouterr()
    assert shown.out == ""
    for command in ("/reset", "/system", "/save FILE", "/load FILE", "/params", "/help"):
        assert command in shown.err


def test_old_turns_are_left_out_and_still_saved(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(8):
        session.take("the cat sat on the mat and the dog")
    assert len(session.messages) == 16
    assert session.model.usage.prompt_tokens <= 192 - 9
    assert "the context is full" in capsys.readouterr().err
    before = session.messages
    with pytest.raises(InputError, match="the last turn has"):
        session.take("x1 " * 100)
    assert session.messages == before


def interrupted(model: Model, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C come after some pieces of every answer."""
    stream = model.stream

    def broken(*args: Any, **options: Any) -> Iterator[str]:
        pieces = stream(*args, **options)
        yield from (piece for piece, _ in zip(pieces, range(after), strict=False))
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "stream", broken)


@pytest.mark.parametrize(("after", "roles"), [(0, []), (2, ["user", "assistant"])])
def test_an_interrupted_answer_is_remembered_as_shown(
    after: int, roles: list[str], session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(session.model, after, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        session.take("the cat")
    assert [message["role"] for message in session.messages] == roles


def test_speed_is_told_at_v_alone(chat: Callable[..., Result], folder: Path) -> None:
    assert chat(folder, "the cat").err == ""
    result = chat(folder, "the cat", options=[*WORDS, "-v"])
    assert "tokens/s" in result.err and "tokens/s" not in result.out


def test_settings_of_the_model_are_the_defaults(chat: Callable[..., Result], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "warm", tiny_model(template="chatml", generation=SETTINGS))
    model = llm.load(tmp_path / "warm", device="cpu")
    for options, sampling in (
        ([], Sampling(temperature=0.9, top_k=7)),
        (["--temperature", "2.5"], Sampling(temperature=2.5, top_k=7)),
        (["--temperature", "0"], Sampling(top_k=7)),
    ):
        expected = model.chat([{"role": "user", "content": "the cat"}], max_new_tokens=30, sampling=sampling, seed=5)
        given = ["--max-new-tokens", "30", "--seed", "5", *options]
        assert chat(tmp_path / "warm", "the cat", options=given).out == visible(expected) + "\n"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals_without_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert has_colour(Screen()) and not has_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colour(Screen())
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "dumb")
    assert not has_colour(Screen())


def test_generate_takes_the_settings_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path / "warm", tiny_model(template="chatml", generation=SETTINGS))
    expected = llm.load(tmp_path / "warm", device="cpu").generate(
        "the", max_new_tokens=30, sampling=Sampling(temperature=0.9, top_k=7), seed=5
    )
    command = ["generate", str(tmp_path / "warm"), "--prompt", "the", "--max-new-tokens", "30", "--seed", "5"]
    assert main(command) == 0
    assert capsys.readouterr().out == visible("the" + expected) + "\n"
