"""Params in any shape, and messages about anything: a value or one line, never another error."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.common.errors import LONGEST_MESSAGE, InputError
from llm.common.files import parse_json
from llm.config import RENAMED, TRAININGS, effective_params, parse_params
from tests.conftest import ROOT

SHIPPED: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def keys_of(values: Any, above: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The place of every value, sections and lists included."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [key for name, value in inner for key in ((*above, name), *keys_of(value, (*above, name)))]


KEYS = keys_of(SHIPPED)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30, 1e-320, 1e308, "", "auto", "all", "sample", "file:///x", "~/x"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3), max_leaves=5
)
CHANGES = st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(["set", "add", "remove"]), VALUES), max_size=3)


@settings(max_examples=60)
@given(changes=CHANGES)
def test_any_change_of_the_params_is_valid_or_one_line(changes: list[tuple[tuple[str | int, ...], str, Any]]) -> None:
    values = copy.deepcopy(SHIPPED)
    for (*sections, last), kind, value in changes:
        section: Any = values
        try:
            for name in sections:
                section = section[name]
            if kind == "remove":
                del section[last]
            else:
                section[last if kind == "set" else value] = value
        except (LookupError, TypeError):
            continue  # an earlier change has taken the place away, or a list cannot be a key
    try:
        params = parse_params(values)
    except InputError as error:
        assert str(error).isprintable() and str(error).startswith("params.yaml: ")
        assert len(str(error)) <= LONGEST_MESSAGE + 5
        return
    assert parse_params(params.model_dump()) == params


def changed_params(**changes: Any) -> dict[str, Any]:
    """Return the shipped values with some keys of some sections changed."""
    values = copy.deepcopy(SHIPPED)
    for section, change in changes.items():
        values[section] |= change
    return values


def test_a_training_has_the_shared_values_but_for_its_own() -> None:
    lora = {"rank": 3}
    params = parse_params(changed_params(training={"optimizer": "adamw"}, pretrain={"optimizer": "muon", "lora": lora}))
    assert [getattr(params, name).optimizer for name in TRAININGS] == ["muon", "adamw", "adamw"]
    shipped = parse_params(SHIPPED)
    assert params.pretrain.lora == shipped.pretrain.lora.model_copy(update=lora)
    assert params.finetune_classify.lora == shipped.finetune_classify.lora


def test_a_training_from_random_weights_has_its_own_rates_and_trains_everything() -> None:
    rates = {"scratch_lr": 0.5, "scratch_muon_lr": 0.25}
    section = parse_params(changed_params(finetune_instruct={"trainable": "lora", **rates})).finetune_instruct
    changed = {"trainable": "all", "lr": 0.5, "muon_lr": 0.25}
    assert section.from_scratch().model_dump() == section.model_dump() | changed


def test_effective_params_are_those_of_full_sections() -> None:
    effective = effective_params(SHIPPED)
    assert effective["training"] == {} and effective_params(effective) == effective
    for name in TRAININGS:
        assert effective[name] == getattr(parse_params(SHIPPED), name).model_dump()
    del effective["training"]  # as in files of earlier versions
    assert parse_params(effective) == parse_params(SHIPPED)


def test_no_value_of_the_shipped_params_stands_in_all_three_trainings() -> None:
    first, *others = (SHIPPED[name].items() for name in TRAININGS)
    assert not [item for item in first if all(item in other for other in others)]
    assert not [(name, key) for name in TRAININGS for key in SHIPPED[name] if key in SHIPPED["training"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"beta1": 2.0}}, r"training\.beta1: input should be less than 1, found 2\.0$"),
        ({"training": {"beta1": 2.0}, "pretrain": {"beta1": 0.5}}, r"training\.beta1: .* found 2\.0$"),
        ({"pretrain": {"beta1": 2.0}}, r"pretrain\.beta1: .* found 2\.0$"),
        ({"training": {"max_length": 8}}, r"training\.max_length: unknown key; remove it or correct its name$"),
        (
            {"training": {"lora": {"rnk": 8}}},
            r"pretrain\.lora\.rank: missing key; add it here or to the section training",
        ),
        ({"training": {"lora": 8}}, r"training\.lora: .* found 8$"),
        ({"pretrain": {"lora": {"rnk": 8}}}, r"pretrain\.lora\.rnk: unknown key"),
    ],
)
def test_an_error_names_the_section_in_which_the_value_stands(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"^params\.yaml: {message}"):
        parse_params(changed_params(**changes))


@pytest.mark.parametrize(("key", "name"), RENAMED.items())
def test_a_renamed_key_is_an_error_with_its_new_name(key: str, name: str) -> None:
    values = copy.deepcopy(SHIPPED)
    *sections, last = key.split(".")
    section = values
    for part in sections:
        section = section[part]
    section[last] = section.pop(name, 0)
    with pytest.raises(InputError, match=rf"^params\.yaml: {key}: renamed; write {name}$"):
        parse_params(values)


@pytest.mark.parametrize("changed", [("seed", 0), ("seed", 2**32 - 1)])
def test_the_ends_of_a_range_are_in_it(changed: tuple[str, int]) -> None:
    assert parse_params(SHIPPED | dict([changed])).seed == changed[1]


@given(text=st.text(alphabet=st.characters(), max_size=300))
def test_a_message_is_one_line_whatever_it_quotes(text: str) -> None:
    """With lone surrogates, control characters, odd spaces and line ends of every kind."""
    message = str(InputError(f"file: {text}"))
    assert message.isprintable() and message.startswith("file: ")
    assert message == f"file: {text}" or not text.isprintable()


def test_a_message_that_is_too_long_keeps_its_ends() -> None:
    message = str(InputError(f"file: found {'a' * 10**6}; correct it"))
    assert message.startswith("file: found aaa") and message.endswith("aaa; correct it")
    assert len(message) == LONGEST_MESSAGE + 5


@settings(max_examples=200)
@given(text=st.text('[]{}",:0123456789.eE+-truefalsn \\u', max_size=40) | st.binary(max_size=20))
def test_any_json_is_a_value_or_a_value_error(text: str | bytes) -> None:
    try:
        value = parse_json(text)
    except ValueError:
        return
    json.dumps(value)


@pytest.mark.parametrize("text", ["[" * 5000, '{"a":' * 5000, "9" * 5000, b"\xff", ""])
def test_json_that_exhausts_the_parser_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def parse_messages(**messages: Any) -> Any:
    """Return the messages of a source as parsed, with these keys."""
    values = copy.deepcopy(SHIPPED)
    files = {"files": [{"path": "a.csv"}]}
    values["sources"]["mine"] = {"licence": "x", "messages": files | {"labels": ["a", "b"]} | messages}
    return parse_params(values).sources["mine"].messages


@pytest.mark.parametrize(
    ("written", "labels"),
    [("[0, 1]", ["0", "1"]), ("[1.0, 2.5]", ["1.0", "2.5"]), ("['no', 'yes']", ["no", "yes"]), ("auto", ["auto"])],
)
def test_labels_are_text(written: str, labels: list[str]) -> None:
    assert parse_messages(labels=yaml.safe_load(written)).labels == labels


@pytest.mark.parametrize(
    ("key", "written", "message"),
    [
        ("labels", "[no, yes]", r"labels\.0: .* found False, which YAML makes of no, off or false; quote the word"),
        ("labels", "[x, on]", r"labels\.1: .* found True, which YAML makes of yes, on or true; quote the word"),
        ("labels", "[x, null]", r"labels\.1: .* found null, .*; quote it"),
        ("labels", "[x, ]", r"labels: expected two labels or more, or auto, found \['x'\]"),
        ("labels", "[x, 2020-01-01]", r"labels\.1: expected text, found date 2020-01-01; write it in quotes"),
        ("labels", "[x, 1, '1']", r"labels: expected each label once, found '1' twice"),
        ("label", "no", r"label: expected text, found False"),
        ("split", "{train: a.csv}", r"split: expected the name of a column; files for each split go to files:"),
        ("encoding", "rot13", r"encoding: expected the name of an encoding .* found 'rot13'"),
        ("encoding", "utf-99", r"encoding: expected the name of an encoding .* found 'utf-99'"),
        ("separator", "'||'", r"separator: expected one character or tab, found '\|\|'"),
        ("header", "maybe", r"header: expected true, false or a list of the columns' names, found 'maybe'"),
        ("header", "[a, a]", r"header: expected a name of its own for each column"),
        ("files", "{train: a.csv, rest: b.csv}", r"files: expected a list of files, or files for train.*'rest'"),
        ("format", "docm", r"format: input should be 'text'"),
        ("max_rows", "0", r"max_rows: "),
    ],
)
def test_a_wrong_option_of_a_source_is_named(key: str, written: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"^params\.yaml: sources\.mine\.messages\.{message}"):
        parse_messages(**{key: yaml.safe_load(written)})


def test_labels_that_are_not_listed_may_be_found_out() -> None:
    values = copy.deepcopy(SHIPPED)
    values["sources"]["mine"] = {"licence": "x", "messages": {"files": [{"path": "a.csv"}]}}
    with pytest.raises(InputError, match=r"messages\.labels: missing key; list all labels .* or write labels: auto"):
        parse_params(values)


def test_files_of_splits_and_their_options() -> None:
    files = {"Train": "a.csv", "dev": ["b.csv", {"url": "https://h.invalid/c"}], "test": {"path": "d", "format": "csv"}}
    section = parse_messages(files=files, encoding="windows-1251", format="jsonl")
    entries = [section.entry(file) for file in section.files]
    assert [(entry.path or entry.url, entry.split, entry.format) for entry in entries] == [
        ("a.csv", "train", "jsonl"),
        ("b.csv", "val", "jsonl"),
        ("https://h.invalid/c", "val", "jsonl"),
        ("d", "test", "csv"),
    ]
    assert {entry.encoding for entry in entries} == {"windows-1251"}
    again = parse_messages(**section.model_dump())
    assert again == section
