"""Rows inside of other objects: records by a path, whole tables in one object, cells by a path or a template."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm.common.errors import InputError
from llm.download.content.formats import Row

FIELD = re.compile(r"\{([^{}]+)\}")  # of a template
STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


def inner_rows(rows: Iterator[Row], records: str) -> Iterator[Row]:
    """Yield the rows that the objects hold: by a path such as `data[].paragraphs[].qas[]`, or as pandas writes a table.

    Rows of a path have the fields of all objects around them too, the inner ones first.
    """
    for where, row in rows:
        if isinstance(row, InputError):
            yield where, row
        elif "[]" in records:
            yield from _walk(row, records.split("."), {}, where)
        else:
            yield from _table(row, records, where)


def _walk(value: Any, steps: Sequence[str], around: Mapping[str, Any], where: str) -> Iterator[Row]:
    if not isinstance(value, Mapping):
        yield where, InputError(f"{where}: expected an object, found {type(value).__name__}; correct records:")
        return
    if not steps:
        yield where, {**around, **value}
        return
    key, is_list = steps[0].removesuffix("[]"), steps[0].endswith("[]")
    inner = value.get(key)
    if not isinstance(inner, list if is_list else Mapping):
        found = f"{type(inner).__name__} there" if key in value else f"only {', '.join(value) or 'nothing'}"
        problem = f"expected {'a list' if is_list else 'an object'} under {key!r}, found {found}; correct records:"
        yield where, InputError(f"{where}: {problem}")
        return
    outer = {**around, **{name: each for name, each in value.items() if name != key}}
    if not is_list:
        yield from _walk(inner, steps[1:], outer, where)
        return
    for number, each in enumerate(inner, 1):
        yield from _walk(each, steps[1:], outer, f"{where}, {key} {number}")


def _table(table: Mapping[str, Any], orientation: str, where: str) -> Iterator[Row]:
    """Yield the rows of a table in one object, in one of pandas' orientations, or with a list for each column."""
    try:
        if orientation == "split":
            names, rows = table["columns"], table["data"]
            cells: list[Any] = [dict(zip(names, row, strict=True)) for row in rows]
        elif orientation == "index":
            cells = [dict(row) for row in table.values()]
        elif orientation == "columns":
            keys = dict.fromkeys(key for column in table.values() for key in column)
            cells = [{name: column[key] for name, column in table.items()} for key in keys]
        else:
            if not all(isinstance(column, list) for column in table.values()):
                raise TypeError
            cells = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    except (AttributeError, KeyError, TypeError, ValueError):
        shown = ", ".join(map(str, list(table)[:10]))
        problem = f"expected a table as records: {orientation} says, found an object of {shown}; correct records:"
        yield where, InputError(f"{where}: {problem}")
        return
    for number, row in enumerate(cells, 1):
        yield f"{where}, record {number}", row


def records_of(row: Mapping[str, Any]) -> str | None:
    """Return the option `records` that reads an object which holds rows, or None."""
    values = list(row.values())
    if isinstance(row.get("tokens"), list):
        return None
    if {"columns", "data"} <= row.keys() and all(isinstance(row[key], list) for key in ("columns", "data")):
        return "split"
    if len(values) > 1 and all(isinstance(value, Mapping) and value for value in values):
        same = len({tuple(value) for value in values}) == 1
        is_columns = same and not any(isinstance(cell, list | Mapping) for value in values for cell in value.values())
        numbered = all(str(key).isdigit() for value in values for key in value)
        if is_columns and numbered:
            return "columns"
        return "index" if is_columns and all(str(key).isdigit() for key in row) else None
    if len(values) > 1 and all(isinstance(value, list) and len(value) > 1 for value in values):
        lengths = {len(value) for value in values}
        return (
            "lists" if len(lengths) == 1 and not any(isinstance(cell, Mapping) for v in values for cell in v) else None
        )
    path: list[str] = []
    inner: Any = row
    while True:
        lists = [name for name, value in inner.items() if _has_objects(value) and not _is_part(inner, name)]
        inside = lists or [name for name, value in inner.items() if isinstance(value, Mapping)]
        if len(inside) != 1:
            break
        path.append(f"{inside[0]}[]" if lists else inside[0])
        inner = inner[inside[0]][0] if lists else inner[inside[0]]
    while path and not path[-1].endswith("[]"):
        path.pop()
    return ".".join(path) or None


def _has_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)


def _is_part(row: Mapping[str, Any], name: str) -> bool:
    """Return whether objects are no rows, but parts of one: messages, or answers to a question."""
    first = row[name][0]
    return any(key in first for key in ("role", "from")) or (name == "answers" and "question" in row)


def cell(row: Mapping[str, Any], column: str) -> tuple[bool, Any]:
    """Return whether a row has a cell, and the cell: of a column, by a path such as `answers[0].text`, by a template.

    A template such as `{title}: {body}` joins cells to a text.
    """
    if column in row:
        return True, row[column]
    if fields := FIELD.findall(column):
        found = [cell(row, name) for name in fields]
        if not all(has for has, _ in found) or any(isinstance(value, list | Mapping) for _, value in found):
            return False, None
        texts = iter("" if value is None else str(value) for _, value in found)
        return True, FIELD.sub(lambda _: next(texts), column) if any(value for _, value in found) else ""
    value: Any = row
    for name, number in STEP.findall(column):
        if number and isinstance(value, list):
            value = value[int(number)] if int(number) < len(value) else None
        elif name and isinstance(value, Mapping) and name in value:
            value = value[name]
        else:
            return value is None and column.count("[") > 0, None
    return True, value


def columns_of(column: str) -> list[str]:
    """Return the columns that a template names, else the column."""
    return FIELD.findall(column) or [column]
