"""Write the reference pages that follow from code: params.yaml with its comments and types, and the command line."""

from __future__ import annotations

import argparse
import re
import typing
from pathlib import Path
from typing import Any

import yaml

from llm.cli.main import build_parser
from llm.config import Params, Source, Strict

ROOT = Path(__file__).resolve().parent.parent
TABLED = ("sources", "gpt2_files")  # sections that hold files and no values: their types are listed, not their values


def comments(text: str) -> dict[str, str]:
    """Return the comment behind each key of params.yaml, by dotted key.

    A key that has none takes that of the same key in an earlier section: the trainings share their words.
    """
    found: dict[str, str] = {}
    by_name: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for indent, name, rest in re.findall(r"^( *)([A-Za-z0-9_-]+):(.*)$", text, re.MULTILINE):
        above = [key for key in above if key[0] < len(indent)]
        above.append((len(indent), name))
        comment = rest.partition("#")[2].strip()
        if comment:
            by_name.setdefault(name, comment)
        found[".".join(key for _, key in above)] = comment or by_name.get(name, "")
    return found


def leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of params.yaml by dotted key."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {k: v for name, value in values.items() for k, v in leaves(value, f"{prefix}.{name}".lstrip(".")).items()}


def cell(text: str) -> str:
    """Return a text that stays within a cell of a table."""
    return text.replace("|", "\\|")


def params_page() -> str:
    """Return the page of params.yaml."""
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    said = comments(text)
    lines = ["# params.yaml", "", "All values that change a result. Each section is a class of `llm/config.py`.", ""]
    for section, values in yaml.safe_load(text).items():
        if section in TABLED:
            continue
        lines += [f"## {section}", "", *([f"{said[section]}", ""] if said.get(section) else [])]
        lines += ["| key | shipped value | meaning |", "|---|---|---|"]
        for key, value in leaves(values, section).items():
            shown = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
            lines.append(f"| `{key}` | `{cell(shown)}` | {cell(said[key])} |")
        lines.append("")
    lines += ["## sources", "", "A source is a name with the files of up to three kinds of data.", ""]
    return "\n".join([*lines, *source_tables(Source, "sources.NAME")]) + "\n"


def source_tables(model: type[Strict], name: str) -> list[str]:
    """Return a table of the keys of a class, then those of the classes that it holds."""
    lines = [f"`{name}`:", "", "| key | type | when absent |", "|---|---|---|"]
    below: list[str] = []
    for key, field in model.model_fields.items():
        kind = re.sub(r"<class '([\w.]+)'>", r"\1", str(field.annotation)).replace("llm.config.", "")
        absent = "has to be there" if field.is_required() else f"`{field.get_default(call_default_factory=True)}`"
        lines.append(f"| `{key}` | `{cell(kind)}` | {cell(absent)} |")
        for inner in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, Strict):
                below += source_tables(inner, f"{name}.{key}")
    return [*lines, "", *below]


def commands_page() -> str:
    """Return the page of the command line."""
    lines = [
        "# Command line",
        "",
        "Answers go to stdout, messages to stderr. Exit status: 0 done, 1 wrong input, 2 a command",
    ]
    lines += ["line that cannot be parsed, 130 interrupted.", ""]
    return "\n".join([*lines, *command_sections(build_parser())]) + "\n"


def command_sections(parser: argparse.ArgumentParser) -> list[str]:
    """Return the help of a parser's commands, and of theirs."""
    lines: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                help_text = command.format_help().rstrip()
                lines += [f"## {command.prog.removeprefix('python -m llm ')}", "", "```text", help_text, "```", ""]
                lines += command_sections(command)
    return lines


def write(folder: Path) -> None:
    """Write the generated pages into a folder."""
    for name, page in {"params.md": params_page(), "command-line.md": commands_page()}.items():
        (folder / name).write_text(page, encoding="utf-8")


assert set(TABLED) <= Params.model_fields.keys()
