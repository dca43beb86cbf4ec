"""A conversation in the terminal or a pipe: its messages, its settings, and the commands that begin with a slash."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.cli.terminal import write
from llm.common.errors import InputError
from llm.common.files import parse_json, write_atomic
from llm.common.sanitize import one_line
from llm.tokenizer.prompts import Message

if TYPE_CHECKING:
    from llm.api import Model

COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)
HELP = {
    "reset": ("", "forget the conversation; the system message stays"),
    "system": ("[TEXT]", "set the system message; without TEXT remove it"),
    "save": ("FILE", "write the conversation as JSON lines of messages"),
    "load": ("FILE", "go on with a saved conversation"),
    "params": ("[NAME=VALUE ...]", "show or change temperature, top_k, top_p, min_p, repetition_penalty, "
               "max_new_tokens, seed, and variables of the model's own chat template such as enable_thinking"),
    "help": ("", "show these commands; a question that begins with a slash is written with two"),
}  # fmt: skip
METER_SECONDS = 1.0  # between two lines of speed
log = logging.getLogger("llm")


def say(text: str) -> None:
    """Write a note beside the answers."""
    print(one_line(text), file=sys.stderr)


class ChatSession:
    """A conversation with a model, from one question to the next."""

    def __init__(self, model: Model, options: dict[str, Any], system: str | None = None) -> None:
        """Start a conversation; `options` are those of `Model.stream`."""
        self.model, self.options = model, options
        self.system: str | None = None
        self.turns: list[Message] = []  # without the system message
        self.template_kwargs: dict[str, Any] = {}
        if system is not None:
            self.set_system(system)

    @property
    def messages(self) -> list[Message]:
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *self.turns]

    def take(self, line: str) -> None:
        """Obey a command, or answer a question; raise `InputError` for one that cannot be, and change nothing."""
        if line.startswith("//"):
            self.ask(line[1:])
        elif found := COMMAND.fullmatch(line):
            self._command(found[1], (found[2] or "").strip())
        else:
            self.ask(line)

    def ask(self, question: str) -> None:
        """Write the answer to a question, and remember both."""
        before = list(self.turns)
        self.turns.append({"role": "user", "content": question})
        try:
            self._answer()
        except InputError:
            self.turns = before
            raise
        except KeyboardInterrupt:
            if self.turns[-1]["role"] == "user":  # interrupted before a word was said
                self.turns = before
            raise

    def _answer(self) -> None:
        """Write an answer to the last question. An interrupted one is remembered as far as it was shown."""
        pieces = self.model.stream(self.messages, template_kwargs=self.template_kwargs, **self.options)
        self.options["seed"] += 1  # asked again, it may answer otherwise
        shown: list[str] = []
        try:
            write(self._metered(pieces, shown))
        finally:
            if text := "".join(shown):
                self.turns.append({"role": "assistant", "content": text})

    def _metered(self, pieces: Iterator[str], shown: list[str]) -> Iterator[str]:
        """Yield the pieces and keep them; log the speed at the end, and while they go to no terminal."""
        start = last = time.perf_counter()
        for piece in pieces:
            shown.append(piece)
            yield piece
            if (now := time.perf_counter()) - last >= METER_SECONDS and not sys.stdout.isatty():
                last = now
                self._log_speed(now - start)
        self._log_speed(time.perf_counter() - start)

    def _log_speed(self, seconds: float) -> None:
        usage = self.model.usage
        speed = usage.new_tokens / max(seconds, 1e-9)
        log.debug("%d tokens read, %d written, %.1f tokens/s", usage.prompt_tokens, usage.new_tokens, speed)

    # ---- commands ----------------------------------------------------------------------------------------------------

    def _command(self, name: str, argument: str) -> None:
        if name not in HELP:
            raise InputError(f"/{name}: unknown command (expected /{', /'.join(HELP)}); // begins a question with a /")
        needs = HELP[name][0]
        if needs == "FILE" and not argument:
            raise InputError(f"/{name}: no file named; write /{name} FILE")
        if not needs and argument:
            raise InputError(f"/{name}: takes nothing behind it (got {one_line(argument)!r}); leave it out")
        match name:
            case "reset":
                self.turns = []
            case "system":
                self.set_system(argument or None)
            case "save":
                self._save(Path(argument))
            case "load":
                self.load(Path(argument))
            case "params":
                self._set_params(argument)
            case "help":
                for command, (what, text) in HELP.items():
                    say(f"/{command} {what}".ljust(26) + text)

    def set_system(self, text: str | None) -> None:
        """Set or remove the system message; raise `InputError` where the template has no place for one."""
        question = {"role": "user", "content": "?"}
        if text is not None:
            self.model.encode_conversation([{"role": "system", "content": text}, question])
        self.system = text

    def _save(self, path: Path) -> None:
        if path.exists():
            try:
                read_conversation(path)
            except InputError:
                raise InputError(f"{path}: exists and is no saved conversation; name another file") from None
        lines = [json.dumps(dict(message), ensure_ascii=False) + "\n" for message in self.messages]
        try:
            write_atomic(path, "".join(lines))
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); name another file") from None
        say(f"{path}: {len(lines)} messages")

    def load(self, path: Path) -> None:
        """Go on with a saved conversation; one that ends in a question is answered."""
        messages = read_conversation(path)
        if messages:
            self.model.encode_conversation(messages)
        first = messages[:1] if messages and messages[0]["role"] == "system" else []
        self.system = first[0]["content"] if first else None
        self.turns = messages[len(first) :]
        say(f"{path}: {len(messages)} messages")
        if self.turns and self.turns[-1]["role"] == "user":
            self._answer()

    def _set_params(self, argument: str) -> None:
        """Change all the settings that are named, or none."""
        options, variables = dict(self.options), dict(self.template_kwargs)
        names = [field.name for field in fields(options["sampling"])]
        for setting in argument.split():
            name, _, text = setting.partition("=")
            value = _value(text)
            if name in names:
                number = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
                if not number or (name == "top_k" and isinstance(value, float)):
                    raise InputError(f"/params: {name}: expected a number, got {one_line(text)!r}; correct it")
                options["sampling"] = replace(options["sampling"], **{name: value})
            elif name in ("max_new_tokens", "seed"):
                if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                    raise InputError(f"/params: {name}: expected 0 or more, got {one_line(text)!r}; correct it")
                options[name] = value
            elif text and self.model.has_template_variable(name):
                variables[name] = value
            else:
                known = ", ".join([*names, "max_new_tokens", "seed"])
                raise InputError(f"/params: {one_line(setting)!r} is no NAME=VALUE of {known}; correct it")
        self.options, self.template_kwargs = options, variables
        shown = {**vars(options["sampling"]), **{k: options[k] for k in ("max_new_tokens", "seed")}, **variables}
        say(" ".join(f"{name}={json.dumps(value)}" for name, value in shown.items()))


def _value(text: str) -> Any:
    """Return a number, true, false, none or another text."""
    try:
        return None if text.lower() in ("none", "null") else parse_json(text)
    except ValueError:
        return text


def read_conversation(path: Path) -> list[Message]:
    """Read JSON lines of messages; raise `InputError` naming the line that is none."""
    try:
        lines = path.read_bytes().decode().split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a saved conversation") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; name a saved conversation") from None
    messages: list[Message] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            message = parse_json(line)
        except ValueError:
            message = None
        texts = isinstance(message, dict) and [message.get(key) for key in ("role", "content")]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path}, line {number}: no message (expected an object with role and content as text)")
        messages.append(message)
    return messages
