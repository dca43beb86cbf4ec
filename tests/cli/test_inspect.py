"""`python -m llm inspect`: records as the training reads them, what is cut, dropped and cleaned away, and names."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm.checkpoint.folder import save_checkpoint
from llm.cli.inspect import BETWEEN, GREEN, PLAIN
from llm.cli.main import main
from llm.config import parse_params
from llm.download.fetching import transfer
from llm.preprocess.clean import clean_text
from tests.cli.test_chat import TEMPLATE, tiny_model
from tests.conftest import ROOT
from tests.helpers import tiny_tokenizer

Inspect = Callable[..., str]
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "the dog."},
    {"role": "user", "content": "the mat?"},
    {"role": "assistant", "content": "the cat sat."},
]


@pytest.fixture
def inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inspect:
    """The command in a folder with a tokenizer and the shipped params, changed by section; it returns stdout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transfer, "PAUSES", (0.0,))
    tiny_tokenizer().save(Path("data/tokens/tokenizer"))

    def run(*arguments: str, **changes: dict[str, Any]) -> str:
        values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        for section, change in changes.items():
            values[section] |= change
        Path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        assert main(["inspect", *arguments]) == 0
        return capsys.readouterr().out

    return run


def write(name: str, *records: Any) -> str:
    Path(name).write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return name


def tokens(out: str, number: int = 1) -> str:
    """Return the line with the tokens of a record."""
    found = re.search(rf"^{number}: .*\n   (.*)$", out, re.MULTILINE)
    assert found, out
    return found[1]


def counted(out: str, number: int = 1) -> list[str]:
    """Return the texts that count in the loss."""
    return [text.replace(BETWEEN, "") for text in re.findall(r"\[\[(.*?)\]\]", tokens(out, number))]


# ---- what counts in the loss -----------------------------------------------------------------------------------------


def test_the_answers_and_their_ends_stand_in_brackets(inspect: Inspect) -> None:
    name = write("a.jsonl", {"messages": TALK}, {"messages": TALK[1:3]})
    out = inspect(name)
    assert counted(out) == ["the dog.<|im_end|>", "the cat sat.<|im_end|>"]
    assert counted(out, 2) == ["the dog.<|im_end|>"]
    text = tokens(out).replace(BETWEEN, "").replace("[[", "").replace("]]", "")
    assert text == "".join(f"<|im_start|>{m['role']}\u23ce{m['content']}<|im_end|>\u23ce" for m in TALK)[:-1]
    assert (
        "template chatml, tokenizer data/tokens/tokenizer (280 tokens), up to 256 tokens (model.context_length); "
        in out
    )
    n = len(tokens(out, 2).replace("[[", BETWEEN).replace("]]", "").split(BETWEEN))
    assert f"2: {n} tokens, " in out


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"loss_on": "last"}, ["the cat sat.<|im_end|>"]), ({"template": "alpaca"}, ["the dog.<|endoftext|>"] * 0)],
)
def test_the_params_of_the_training_hold(inspect: Inspect, change: dict[str, Any], expected: list[str]) -> None:
    out = inspect(write("a.jsonl", {"messages": TALK}), finetune_instruct=change)
    if expected:
        assert counted(out) == expected
    else:  # our alpaca takes the system message in the preamble's place, or says that it has none
        assert "the template alpaca has no place for a system message" in out


def test_without_a_mask_all_but_the_first_token_counts(inspect: Inspect) -> None:
    out = inspect(write("a.jsonl", {"messages": TALK[1:3]}), finetune_instruct={"mask_prompt": False})
    assert tokens(out).startswith("<|im_start|>[[")
    assert counted(out) == ["user\u23cethe cat?<|im_end|>\u23ce<|im_start|>assistant\u23cethe dog.<|im_end|>"]


def test_colour_is_for_terminals_alone(inspect: Inspect, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write("a.jsonl", {"messages": TALK[1:3]})
    assert "\033" not in inspect(name)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = inspect(name)
    shown = tokens(out)
    assert "[[" not in shown and f"{GREEN}green{PLAIN} counts in the loss" in out
    assert "".join(re.findall(rf"{re.escape(GREEN)}(.*?){re.escape(PLAIN)}", shown)) == "the dog.<|im_end|>"
    monkeypatch.setenv("NO_COLOR", "1")
    assert counted(inspect(name)) == ["the dog.<|im_end|>"]


def test_texts_are_shown_and_not_obeyed(inspect: Inspect) -> None:
    talk = [
        {"role": "user", "content": "\x1b[2J?"},
        {"role": "assistant", "content": "\u202e\x1b[0m caf\u00e9 \U0001f600"},
    ]
    out = inspect(write("a.jsonl", {"messages": talk}))
    assert "\x1b" not in out and "\u202e" not in out
    assert "caf\u00e9 \U0001f600" in "".join(counted(out)), "the bytes of a character come together"


# ---- cut and dropped -------------------------------------------------------------------------------------------------


def test_what_is_cut_or_dropped_is_shown_and_counted(inspect: Inspect) -> None:
    long = [*TALK[1:], {"role": "user", "content": "the cat " * 90}, TALK[2]]
    records = [
        {"messages": long},
        {"messages": [{"role": "user", "content": "the cat " * 300}, TALK[2]]},
        {"messages": [TALK[1], {"role": "assistant", "content": "the cat " * 300}]},
        *({"messages": [{"role": "user", "content": f"the cat {i}?"}, TALK[2]]} for i in range(9)),
    ]
    out = inspect(write("a.jsonl", *records))
    assert re.search(r"^1: \d+ tokens, \d+ count in the loss; cut to \d+: the last turns are left out$", out, re.M)
    assert counted(out) == ["the dog.<|im_end|>", "the cat sat.<|im_end|>"]
    assert re.search(r"^2: \d+ tokens, dropped: no room for an answer in 256$", out, re.MULTILINE)
    assert counted(out, 2) == []
    assert re.search(r"^3: \d+ tokens, \d+ count in the loss; cut to 257: the answer lacks its end$", out, re.MULTILINE)
    assert re.search(r" \.\.\. \d+ more \.\.\. ", tokens(out, 3)), "a long record is shown in part"
    assert "of all 12 records:\n" in out
    assert "longer than model.context_length (256 tokens): 2 cut and 1 dropped of 12 in these records" in out
    out = inspect("a.jsonl", tokenize={**tokenize_params(), "max_too_long": 0.1})
    assert "the tokenize stage refuses it: data.instructions: longer than model.context_length" in out
    out = inspect("a.jsonl", "--rows", "2")
    assert "of the first 2 records:\n" in out


def tokenize_params() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["tokenize"]
    return values


def test_rows_that_cannot_be_used_are_counted(inspect: Inspect) -> None:
    good = [{"instruction": f"Do {i}.", "output": f"Done {i}."} for i in range(5)]
    name = write("a.jsonl", *good, {"instruction": "Do.", "output": " "}, *good[:2])
    out = inspect(name)
    assert "1 row besides cannot be used: expected text in 'output', found none (a.jsonl, line 6)" in out
    assert "the first of them stops the download stage; skip_invalid: true leaves them out" in out
    assert "2 repeat an earlier one; val and test hold each once" in out and "of all 7 records" in out


def test_what_the_tokenize_stage_refuses_is_said(inspect: Inspect) -> None:
    pair = {"chosen": TALK[1:3], "rejected": [TALK[1], TALK[4]]}
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["sources"]
    mine = {"licence": "private", "instructions": {"files": [write("a.jsonl", pair, pair)]}}
    out = inspect("mine", sources=values | {"mine": mine})
    assert "as the training reads them: not at all" in out
    assert "the tokenize stage refuses it: data.instructions: 2 records are preference pairs" in out


def test_messages_show_their_label(inspect: Inspect) -> None:
    rows = [{"text": f"the cat sat on the mat, {i} times {'the dog ' * 40 * (i == 0)}", "label": "ab"[i % 2] * 4}
            for i in range(12)]  # fmt: skip
    out = inspect(write("a.jsonl", *rows), finetune_classify={"max_length": 20})
    assert counted(out) == ["aaaa"] and counted(out, 2) == ["bbbb"]
    assert re.search(r"^1: \d\d\d tokens, cut to 20; the label counts in the loss$", out, re.MULTILINE)
    assert tokens(out, 1).count(BETWEEN) == 19
    assert "longer than finetune_classify.max_length (20 tokens): 1 cut of 12 in these records" in out


# ---- a corpus --------------------------------------------------------------------------------------------------------


def test_a_corpus_without_rules(inspect: Inspect) -> None:
    out = inspect(write("a.jsonl", *({"text": f"the cat sat on the mat {i}. " * 9} for i in range(4))))
    assert "tokenize.clean: no rule is on" in out and "bytes a token; none is cut off" in out
    assert counted(out)[0].startswith("the cat sat on the mat 0.") and "<|endoftext|>" in tokens(out)


def test_the_cleaning_rules_say_what_they_would_remove(inspect: Inspect) -> None:
    texts = [f"the cat sat on the mat {i}. " * 9 for i in range(6)]
    texts += [texts[0].upper(), texts[1].replace(" ", "  "), "write to me@mail.org for the cat, the dog and all"]
    rules = {"duplicates": "exact", "mask": ["mail", "iban"], "invisible": True}
    clean = tokenize_params()["clean"] | rules
    out = inspect(write("a.jsonl", *({"text": text} for text in texts)), tokenize=tokenize_params() | {"clean": clean})
    assert "tokenize.clean: 7 of 9 texts are left" in out
    assert "  exact: 2 removed, such as 'THE CAT SAT" in out
    assert "  mask mail: 1 changed, such as 'write to <mail> for" in out
    assert "  mask iban: nothing\n" in out and "  invisible: nothing\n" in out
    params = parse_params(yaml.safe_load(Path("params.yaml").read_text())).tokenize.clean
    assert clean_text(texts[-1], params).changed == ("mask mail",), "the rules of the stage"


# ---- tokenizer and template ------------------------------------------------------------------------------------------


def test_a_model_folder_brings_tokenizer_context_and_template(inspect: Inspect) -> None:
    save_checkpoint(Path("models/mine"), tiny_model(chat_templates={"default": TEMPLATE}))
    name = write("a.jsonl", {"messages": TALK[1:3]})
    out = inspect(name, "--tokenizer", "models/mine", "--template", "own")
    assert "template own, tokenizer models/mine (280 tokens), up to 192 tokens (the context of pretrain.init)" in out
    assert counted(out) == ["the dog.<|im_end|>"]
    out = inspect(name, "--template", "llama3")
    assert "template llama3, tokenizer data/tokens/tokenizer" in out and counted(out) == ["the dog.<|endoftext|>"]


def test_an_impossible_choice_is_one_line(inspect: Inspect, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(name := write("a.jsonl", {"messages": TALK[1:3]}))
    for options, message in (
        (["--template", "own"], "needs a model's chat template; name its folder with --tokenizer"),
        (["--tokenizer", "nowhere.gguf"], "nowhere.gguf: not found"),
        (["--rows", "0"], "expected 1 or more"),
    ):
        assert main(["inspect", name, *options]) == 1
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_without_any_tokenizer_one_is_trained(inspect: Inspect) -> None:
    shutil.rmtree("data")
    shutil.copytree(ROOT / "data/sample", "data/sample")
    out = inspect(write("a.jsonl", {"messages": TALK[1:3]}))
    assert "tokenizer trained for this look, as none is made yet (1,280 tokens)" in out
    assert counted(out) == ["the dog.<|im_end|>"]
    shutil.rmtree("data")
    out = inspect(write("a.jsonl", *({"messages": TALK[1:3]} for _ in range(3))))
    assert re.search(r"as none is made yet \(2\d\d tokens\)", out), "the corpus is not here: from these texts"


def test_without_network_gpt2_is_not_shown(inspect: Inspect, capsys: pytest.CaptureFixture[str]) -> None:
    values = tokenize_params()
    values["tokenizer"]["kind"] = "gpt2"
    files = {name: {"url": "http://127.0.0.1:9/a"} for name in ("encoder", "merges")}
    name = write("a.jsonl", {"messages": TALK[1:3]})
    out = inspect(name, tokenize=values, gpt2_files=files)
    assert "as the training reads them: not shown (http://127.0.0.1:9/a: connection failed" in out
    assert "for params.yaml:\n" in out
    assert main(["inspect", name, "--tokenizer", "gpt2"]) == 1


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sample", "example-mails", "example-handbook"])
def test_a_source_shows_each_of_its_kinds(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["inspect", name, "--rows", "30"]) == 0
    out = capsys.readouterr().out
    source = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))["sources"][name]
    kinds = [kind for kind in ("corpus", "messages", "instructions") if kind in source]
    assert re.findall(r"^source:     \S+, (\w+) \(licence: MIT\)$", out, re.MULTILINE) == kinds
    assert [f"  {kind}: {name}" in out for kind in kinds] == [True] * len(kinds)
    assert out.count("records:\n") == 2 * len(kinds) and out.count("as the training reads them: ") == len(kinds)


def test_a_bad_name_gives_the_known_ones(inspect: Inspect, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(write("a.jsonl", {"messages": TALK[1:3]}))
    assert main(["inspect", "tinystory"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert "tinystory: no such file and no such source (expected a file, one of the sources sample, " in printed.err
    assert "tinystories" in printed.err and "hf:OWNER/NAME or a URL" in printed.err


def test_broken_params_do_not_hide_a_file(inspect: Inspect, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(name := write("a.jsonl", {"messages": TALK[1:3]}))
    Path("params.yaml").write_text("data: [")
    assert main(["inspect", name]) == 0
    out = capsys.readouterr().out
    assert "as the training reads them: not shown (params.yaml: " in out and "read as:    instructions" in out
