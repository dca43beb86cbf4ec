"""The plain form of a chat template: fixed texts around the messages, for tools that cannot run Jinja.

The texts are found by rendering conversations of marks. Then others are rendered, and have to come out the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llm.checkpoint.folder import CheckpointConfig
from llm.common.errors import InputError
from llm.common.sanitize import one_line
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.chat_source import default_special_tokens
from llm.tokenizer.chat_template import RenderError, render_chat_untrusted
from llm.tokenizer.own_template import DEFAULT
from llm.tokenizer.prompts import TEMPLATES

SYSTEM, USER, ANSWER, LATER = "Qsystem0", "Quser1", "Qanswer2", "Quser3"  # marks
END_OF_THOUGHT = "</think>"
ROLES = ("system", "user", "assistant")
Thoughts = Literal["kept", "cut", "cut with line feeds"]
Turn = tuple[str, str]  # role and text


@dataclass(frozen=True)
class ChatForm:
    """Texts around the messages of a prompt, which ends with a question."""

    start: str  # before the first question
    assistant: str  # before an earlier answer
    user: str  # before a later question
    answer: str  # behind the last question
    system_start: str | None = None  # in place of `start`, before a system message; None: there is no place for one
    system_end: str = ""  # between the system message and the question that follows it
    system_last: bool = False  # whether the system message stands before the last question, not the first
    strips: tuple[str, ...] = ()  # roles whose texts lose their outer white space
    thoughts: Thoughts = "kept"  # in earlier answers, up to </think>
    answer_without_thoughts: str | None = None  # `answer` where enable_thinking is false
    dated: bool = False  # whether the template writes today's date where it is told; this form has the template's own

    def prompt(self, turns: Sequence[Turn]) -> str:
        """Return the prompt of questions and answers in turn, below a system message if one is first."""
        system = self._text(*turns[0]) if turns[0][0] == "system" else None
        rest = [self._text(*turn) for turn in turns[system is not None :]]
        if system is not None and self.system_start is None:
            raise InputError("messages: the chat template has no place for a system message; leave it out")
        given = "" if system is None else f"{system}{self.system_end}"
        first = self.start if system is None or self.system_last else f"{self.system_start}{given}"
        text = ""
        for i, content in enumerate(rest):
            before = self.assistant if i % 2 else self.user if i else first
            last = given if self.system_last and i == len(rest) - 1 else ""
            text += f"{before}{last}{content}"
        return text + self.answer

    def _text(self, role: str, content: str) -> str:
        if role == "assistant" and self.thoughts != "kept" and END_OF_THOUGHT in content:
            content = content.rpartition(END_OF_THOUGHT)[2]
            content = content.lstrip("\n") if self.thoughts == "cut with line feeds" else content
        return content.strip() if role in self.strips else content


class Renderer:
    """The chat template of a model, its own or ours."""

    def __init__(self, config: CheckpointConfig, tokenizer: Tokenizer) -> None:
        """Take the template of an instruct model."""
        named = config.special_tokens or default_special_tokens(tokenizer)
        templates = config.chat_templates or {}
        if not templates:
            assert config.template is not None
            templates = {DEFAULT: TEMPLATES[config.template].jinja(tokenizer, config.system)}
        if DEFAULT not in templates:
            raise InputError("its chat template has no form for plain chats")
        self.source, self.named = templates[DEFAULT], named

    def __call__(self, turns: Sequence[Turn], **variables: Any) -> str:
        """Return the prompt of a conversation."""
        messages = [{"role": role, "content": content} for role, content in turns]
        given: Mapping[str, Any] = {**self.named, "messages": messages, "add_generation_prompt": True, **variables}
        return render_chat_untrusted(self.source, given, clock=False)


def chat_form(config: CheckpointConfig, tokenizer: Tokenizer) -> ChatForm:
    """Return the form of an instruct model's prompts; raise `InputError` where its chat template has none."""
    render = Renderer(config, tokenizer)
    try:
        form = _switch(_style(_texts(render), render), render)
        for turns in _probes(form):
            if render(turns) != form.prompt(turns):
                raise InputError(f"its chat template writes more than fixed texts around {len(turns)} messages")
    except RenderError as error:
        dated = "; it needs today's date" if "strftime_now" in str(error) else ""
        raise InputError(f"its chat template cannot be rendered here ({one_line(str(error))}){dated}") from None
    return replace(form, dated="strftime_now" in render.source)


def check_tokens(form: ChatForm, tokenizer: Tokenizer) -> None:
    """Raise `InputError` for a form with a token that strips the text beside it, as llama.cpp does not."""
    texts = "\n".join(text for text in vars(form).values() if isinstance(text, str))
    for name in tokenizer.special_tokens:
        if tokenizer.form.flags.get(name) and name not in tokenizer.user_defined and name in texts:
            raise InputError(f"its token {name!r} strips the text beside it")


def _texts(render: Renderer) -> ChatForm:
    """Return the texts around marks."""
    several = [("user", USER), ("assistant", ANSWER), ("user", LATER)]
    start, assistant, user, answer = _cut(render(several), USER, ANSWER, LATER)
    form = ChatForm(start, assistant, user, answer)
    try:
        below = render([("system", SYSTEM), *several])
    except RenderError:
        return form
    if SYSTEM not in below:
        return form
    if below.find(SYSTEM) > below.find(ANSWER):
        _, _, before, end, _ = _cut(below, USER, ANSWER, SYSTEM, LATER)
        return replace(form, system_start=start, system_end=end, system_last=True) if before == user else form
    system_start, system_end, *_ = _cut(below, SYSTEM, USER, ANSWER, LATER)
    return replace(form, system_start=system_start, system_end=system_end)


def _cut(text: str, *marks: str) -> list[str]:
    """Return what stands between marks; raise `InputError` unless each stands there once, in this order."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise InputError("its chat template does not write each message once, in order")
        parts.append(before)
    return [*parts, text]


def _style(form: ChatForm, render: Renderer) -> ChatForm:
    """Return the form with what the template does to the messages' texts."""
    padded = " \n x y\n "
    for role in ROLES[form.system_start is None :]:
        turns = [(each, padded if each == role else mark) for each, mark in _conversation(form)]
        stripped = replace(form, strips=(*form.strips, role))
        if render(turns) != form.prompt(turns) and render(turns) == stripped.prompt(turns):
            form = stripped
    turns = [("user", USER), ("assistant", f"<think>\nt\n{END_OF_THOUGHT}\n\nx"), ("user", LATER)]
    kinds: tuple[Thoughts, ...] = ("kept", "cut", "cut with line feeds")
    return next((made for kind in kinds if (made := replace(form, thoughts=kind)).prompt(turns) == render(turns)), form)


def _switch(form: ChatForm, render: Renderer) -> ChatForm:
    """Return the form with the text behind a question to be answered without thoughts, where the template has one."""
    turns = [("user", USER)]
    without = render(turns, enable_thinking=False)
    begin = form.prompt(turns).removesuffix(form.answer)
    if without == form.prompt(turns) or not without.startswith(begin):
        return form
    return replace(form, answer_without_thoughts=without.removeprefix(begin))


def _conversation(form: ChatForm) -> list[Turn]:
    system = [] if form.system_start is None else [("system", SYSTEM)]
    return [*system, ("user", USER), ("assistant", ANSWER), ("user", LATER)]


def _probes(form: ChatForm) -> list[list[Turn]]:
    """Return conversations of every length up to four questions, of texts that templates are known to change."""
    odd = [
        "How are you?",
        " a\n\nb\n",
        'It\'s <b>"5"</b> & {{ x }} {% y %}',
        "日本 😀\tz ",
        "'",
        "\n\n<think>a\nb</think>\n\nc\n",
    ]
    found: list[list[Turn]] = []
    for n in range(1, 5):
        turns = [(ROLES[1 + i % 2], odd[(i + n) % len(odd)]) for i in range(2 * n - 1)]
        found += [turns] if form.system_start is None else [turns, [("system", odd[n]), *turns]]
    return found
