"""Everything that a user can get wrong, as a table: each case ends with its exit status, one line that names the place
and the remedy, and a disk as it was before.

A case does one thing to a place where all is well, and gives one command: a stage, or `python -m llm`. Commands run in
this process, through the functions that the processes run; `IN_A_PROCESS` are run as the user would too.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pandas
import pyarrow
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm.checkpoint.adapter import save_trained
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, save_checkpoint
from llm.cli.main import main as llm_main
from llm.config import SPLITS
from llm.convert.gguf import export_gguf
from llm.convert.hf import export_hf
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.tokenizer.bpe import GPT2_PATTERN, Tokenizer
from llm.training.freeze import freeze
from stages.runtime import run as stage_run
from tests import forks
from tests.conftest import ROOT
from tests.helpers import LLAMA_FORM, gpt_config, randomize, tiny_tokenizer, train_params

# The stages' inputs, without the code: it is not copied.
DVC_YAML = """
stages:
  download:
    params: [data, sources, gpt2_files, tokenize.tokenizer.kind]
    deps: [data/own]
  tokenize:
    params: [seed, tokenize, pretrain.init]
    deps: [data/raw]
  pretrain:
    params: [seed, model, pretrain]
    deps: [data/tokens]
  finetune-classify:
    params: [seed, finetune_classify]
    deps: [data/tokens, models/base]
  evaluate:
    params: [seed]
    deps: [data/tokens]
"""
Harm = Callable[[Path], Any]


class Case(NamedTuple):
    harm: Harm | None
    command: str
    message: str  # a regular expression for the line, which begins with the stage or with python -m llm COMMAND
    stdin: bytes = b""
    status: int = 1  # 2 for a command line that cannot be parsed


# ---- the place where all is well -------------------------------------------------------------------------------------


KINDS = ("corpus", "messages", "instructions")


@cache
def sound_params() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["data"] = dict.fromkeys(KINDS, "mine")
    values["sources"] = {name: values["sources"][name] for name in ("sample", "novels")}
    values["sources"]["mine"] = {
        "licence": "private",
        "corpus": {"files": [{"path": "data/own/a.txt"}]},
        "messages": {"files": [{"path": "data/own/mails.csv"}], "labels": ["ham", "spam"]},
        "instructions": {"files": [{"path": "data/own/pairs.jsonl"}]},
    }
    return values


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound")
    source = {"source": "mine", "licence": "private", "quotable": False}
    files = {
        "dvc.yaml": DVC_YAML,
        "params.yaml": yaml.safe_dump(sound_params()),
        "text.txt": "The cat sat on the mat.\n",
        "data/own/a.txt": "The cat sat on the mat.\n",
        "data/own/mails.csv": "text,label\nhello,ham\nWIN,spam\n",
        "data/own/pairs.jsonl": '{"instruction": "Greet", "output": "Hi"}\n',
        "data/raw/corpus.jsonl": "".join(f'{{"doc": {i}, "text": "text {i} of many"}}\n' for i in range(40)),
        "data/raw/messages.jsonl": "".join(f'{{"text": "t{i}", "label": "{"hs"[i % 2]}"}}\n' for i in range(40)),
        "data/raw/instructions.jsonl": "".join(f'{{"instruction": "do {i}", "output": "d"}}\n' for i in range(40)),
        "data/raw/labels.json": '["h", "s"]',
        "data/raw/sources.json": json.dumps(dict.fromkeys(KINDS, source)),
        "data/tokens/messages/labels.json": '["ham", "spam"]\n',
        **{f"data/tokens/messages/{split}.jsonl": '{"text": "the cat", "label": "ham"}\n' for split in SPLITS},
    }
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")

    plain = tiny_tokenizer()
    tokenizer = Tokenizer(plain.ranks, GPT2_PATTERN, plain.special_tokens)  # a pattern that other tools know too
    tokenizer.save(path / "data/tokens/tokenizer")
    gpt = gpt_config(**LLAMA_FORM | {"vocab_size": tokenizer.vocab_size, "context_length": 64})
    models: dict[str, tuple[GPT | GPTClassifier, dict[str, Any]]] = {
        "base": (GPT(gpt), {}),
        "classifier": (GPTClassifier(GPT(gpt), 2), {"labels": ["ham", "spam"], "max_length": 16}),
        "instruct": (GPT(gpt), {"template": "chatml"}),
    }
    for kind, (model, options) in models.items():
        randomize(model)
        config = CheckpointConfig(kind=kind, gpt=gpt, **options)  # type: ignore[arg-type]
        folder = Checkpoint(model, tokenizer, config)
        save_checkpoint(path / "models" / kind, folder)
        if kind == "base":
            export_hf(folder, path / "theirs")
            export_gguf(folder, path / "it.gguf", "f16")
    tuned = Checkpoint(GPT(gpt), tokenizer, CheckpointConfig(kind="base", gpt=gpt))
    params = train_params(trainable="lora")
    freeze(tuned.model, params)
    save_trained(path / "models/tuned", tuned, params)
    return path


# ---- what is done to it ----------------------------------------------------------------------------------------------


def write(name: str, content: str | bytes) -> Harm:
    def harm(place: Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return harm


def remove(name: str) -> Harm:
    return lambda place: shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink()


def cut(name: str, length: int) -> Harm:
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[:length])


def replace(name: str, old: bytes, new: bytes) -> Harm:
    def harm(place: Path) -> None:
        content = (place / name).read_bytes()
        assert old in content
        (place / name).write_bytes(content.replace(old, new, 1))

    return harm


def put(name: str, at: int, content: bytes) -> Harm:
    def harm(place: Path) -> None:
        old = (place / name).read_bytes()
        (place / name).write_bytes(old[:at] + content + old[at + len(content) :])

    return harm


def params(**changes: Any) -> Harm:
    """Keys with `__` between their parts; None removes one."""

    def harm(place: Path) -> None:
        values = copy.deepcopy(sound_params())
        for key, value in changes.items():
            *sections, last = key.split("__")
            section = values
            for name in sections:
                section = section[name]
            section[last] = value
            if value is None:
                del section[last]
        (place / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")

    return harm


def own(kind: str, name: str, content: str | bytes | None, member: str | None = None, **options: Any) -> Harm:
    """A source's file in data/own/; what else its section says."""

    def harm(place: Path) -> None:
        if content is not None:
            write(f"data/own/{name}", content)(place)
        file = {"path": f"data/own/{name}"} | ({"member": member} if member else {})
        section = {"files": [file]} | ({"labels": ["ham", "spam"]} if kind == "messages" else {}) | options
        params(**{f"sources__mine__{kind}": section})(place)

    return harm


def at_url(url: str, **options: Any) -> Harm:
    return params(sources__mine__corpus={"files": [{"url": url} | options]})


def config(name: str, **changes: Any) -> Harm:
    """Changes values of a JSON file, those of `gpt` in a model folder's config.json too; None removes one."""

    def harm(place: Path) -> None:
        values = json.loads((place / name).read_text())
        for key, value in changes.items():
            section = values["gpt"] if key in values.get("gpt", {}) else values
            section[key] = value
            if value is None:
                del section[key]
        (place / name).write_text(json.dumps(values))

    return harm


def weights(name: str, change: Callable[[dict[str, Tensor]], Any]) -> Harm:
    def harm(place: Path) -> None:
        tensors = load_file(place / name)
        change(tensors)
        save_file(tensors, place / name)

    return harm


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def sharded(place: Path) -> None:
    """Another tool's weights as two files."""
    tensors = load_file(place / THEIRS)
    (place / THEIRS).unlink()
    shards = {shard: sorted(tensors)[i::2] for i, shard in enumerate(SHARDS)}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, place / "theirs" / shard)
    index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (place / f"{THEIRS}.index.json").write_text(json.dumps(index))


def all_of(*harms: Harm) -> Harm:
    return lambda place: [harm(place) for harm in harms]


DEEP = "[" * 5000
LONG_NUMBER = "9" * 5000
PARQUET = io.BytesIO()
pandas.DataFrame({"text": ["hi"], "kind": ["ham"]}).to_parquet(PARQUET)
TEXT = b"The cat sat on the mat. " * 50
ENCRYPTED = bytearray(zipped(**{"a.txt": TEXT}))
ENCRYPTED[ENCRYPTED.index(b"PK\x01\x02") + 8] |= 1  # the flag of the member in the directory
OURS, CONFIG, BPE = (f"models/base/{name}" for name in ("model.safetensors", "config.json", "bpe.json"))
THEIRS, THEIR_CONFIG, THEIR_TOKENIZER = (
    f"theirs/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json")
)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
Q = "blocks.1.attn.q_proj.weight"
THEIR_Q = "model.layers.1.self_attn.q_proj.weight"
GENERATE, SCORE = "llm generate models/base --prompt One", "llm score models/base text.txt"
IMPORT, IMPORT_GGUF = "llm import theirs new", "llm import it.gguf new"

PARAMS: dict[str, Case] = {
    "none": Case(remove("params.yaml"), "download", r"params\.yaml: not found in .*run from the repository's root"),
    "a folder": Case(
        all_of(remove("params.yaml"), write("params.yaml/a", "")), "download", r"params\.yaml: .*directory"
    ),
    "empty": Case(write("params.yaml", ""), "download", r"params\.yaml: expected keys with values, found NoneType"),
    "a text": Case(
        write("params.yaml", "just text"), "download", r"params\.yaml: expected keys with values, found str"
    ),
    "syntax": Case(write("params.yaml", "seed: [1"), "download", r"params\.yaml, line 1, column 9: expected"),
    "tab": Case(
        write("params.yaml", "a:\n\tb: 1"), "download", r"params\.yaml, line 2, column 1: .*cannot start any token"
    ),
    "not UTF-8": Case(write("params.yaml", b"seed: \xff"), "download", r"params\.yaml: .*can't decode byte 0xff"),
    "control characters": Case(write("params.yaml", "seed: \0"), "download", r"params\.yaml: .*not allowed"),
    "deep": Case(write("params.yaml", DEEP), "download", r"params\.yaml: .*recursion"),
    "a day that is none": Case(write("params.yaml", "seed: 2026-13-45"), "download", r"params\.yaml: month must be"),
    "a number of 5,000 digits": Case(
        write("params.yaml", f"seed: {LONG_NUMBER}"), "download", r"params\.yaml: Exceeds"
    ),
    "a Python object": Case(
        write("params.yaml", "seed: !!python/object/apply:os.system [touch owned]"),
        "download",
        r"params\.yaml, line 1, column 7: could not determine a constructor",
    ),
    "a key that is a list": Case(
        write("params.yaml", "? [a]\n: 1"), "download", r"params\.yaml, line 1.*unhashable key"
    ),
    "a key that is a number": Case(write("params.yaml", "1: 2"), "download", r"params\.yaml: "),
    "unknown key": Case(params(surprise=1), "download", r"params\.yaml: surprise: unknown key; remove it or correct"),
    "unknown key inside": Case(
        params(pretrain__learning_rate=0.1), "pretrain", r"params\.yaml: pretrain\.learning_rate: unknown key"
    ),
    "missing key": Case(
        params(pretrain__max_steps=None), "pretrain", r"params\.yaml: pretrain\.max_steps: missing key; add"
    ),
    "unknown shared key": Case(
        params(training__learning_rate=0.1), "pretrain", r"params\.yaml: training\.learning_rate: unknown key; remove"
    ),
    "missing shared key": Case(
        params(training__beta1=None),
        "pretrain",
        r"pretrain\.beta1: missing key; add it here or to the section training",
    ),
    "unknown shared choice": Case(
        params(training__optimizer="sgd"), "pretrain", r"yaml: training\.optimizer: .*'adamw' or 'muon'.*found 'sgd'$"
    ),
    "no shared section": Case(params(training=3), "pretrain", r"yaml: training: expected keys with values, found int"),
    "missing section": Case(params(model=None), "pretrain", r"params\.yaml: model: missing key; add it"),
    "a number as text": Case(
        params(pretrain__lr="1e-3"), "pretrain", r"params\.yaml: pretrain\.lr: .*number.*'1e-3'.*write 0\.001"
    ),
    "a fraction of a step": Case(params(pretrain__max_steps=1.5), "pretrain", r"pretrain\.max_steps: .*found 1\.5"),
    "a truth value": Case(params(pretrain__max_steps=True), "pretrain", r"pretrain\.max_steps: .*found True"),
    "unknown choice": Case(
        params(pretrain__optimizer="sgd"), "pretrain", r"optimizer: .*'adamw' or 'muon'.*found 'sgd'"
    ),
    "a schedule longer than the training": Case(
        params(pretrain__schedule="wsd", pretrain__max_steps=320, pretrain__warmup_steps=30, pretrain__decay_steps=300),
        "pretrain",
        r"params\.yaml: pretrain: schedule wsd: warmup_steps 30 and decay_steps 300 together exceed max_steps 320;",
    ),
    "no decay": Case(params(pretrain__decay_steps=0), "pretrain", r"pretrain\.decay_steps: .*greater.*found 0"),
    "not a number": Case(params(pretrain__lr=float("nan")), "pretrain", r"pretrain\.lr: .*finite.*found nan"),
    "infinite": Case(params(pretrain__weight_decay=float("inf")), "pretrain", r"weight_decay: .*finite.*found inf"),
    "heads that do not divide": Case(
        params(model__n_kv_heads=4), "pretrain", r"model: n_heads 2 must be a multiple of n_kv_heads 4"
    ),
    "odd rotary head": Case(params(model__head_dim=33), "pretrain", r"model: .*even head_dim, found 33"),
    "a layer count that no machine holds": Case(
        params(model__n_layers=10**9), "pretrain", r"model\.n_layers: .*less than or equal to 1000, found 1000000000"
    ),
    "a width that no machine holds": Case(
        params(model__emb_dim=10**12), "pretrain", r"model\.emb_dim: .*less than or equal to 16777216, found"
    ),
    "negative seed": Case(params(seed=-1), "tokenize", r"params\.yaml: seed: .*found -1"),
    "a seed beyond 32 bits": Case(params(seed=2**32), "tokenize", r"params\.yaml: seed: .*less than 4294967296"),
    "half the corpus held out": Case(
        params(tokenize__corpus__val=0.5), "tokenize", r"tokenize\.corpus\.val: .*found 0\.5"
    ),
    "no LoRA targets": Case(params(training__lora__targets=[]), "pretrain", r"training\.lora\.targets: .*at least 1"),
    "no LoRA rank of its own": Case(params(pretrain__lora={"rank": 0}), "pretrain", r"pretrain\.lora\.rank: .*found 0"),
    "unknown source": Case(params(data__corpus="nowhere"), "download", r"data\.corpus: no source 'nowhere'.*sample"),
    "source of another kind": Case(
        params(data__messages="novels"), "download", r"data\.messages: no source 'novels' with messages; there are: "
    ),
    "a licence that is missing": Case(
        params(sources__mine__licence=None), "download", r"sources\.mine\.licence: missing key; add it"
    ),
}

SOURCES: dict[str, Case] = {
    "neither url nor path": Case(
        params(sources__mine__corpus={"files": [{}]}), "download", r"files\.0: a file needs either url or path"
    ),
    "no files": Case(params(sources__mine__corpus={"files": []}), "download", r"corpus\.files: .*at least 1 item"),
    "sha256 cut": Case(
        at_url("https://host.invalid/a.txt", sha256="ab"), "download", r"files\.0\.sha256: .*found 'ab'"
    ),
    "scheme": Case(
        at_url("ftp://host.invalid/a.txt"), "download", r"ftp://host\.invalid/a\.txt: expected one of https://"
    ),
    "URL with half an address": Case(at_url("http://[::1/a.txt"), "download", r"files\.0\.url: Invalid IPv6 URL"),
    "nothing there": Case(
        own("corpus", "b.txt", None), "download", r"data/own/b\.txt: expected a file or a pattern.*correct path:"
    ),
    "a folder": Case(own("corpus", "sub", None), "download", r"data/own/sub: expected a file.*found nothing"),
    "a pattern without files": Case(
        own("corpus", "*.md", None), "download", r"data/own/\*\.md: expected a file or a pattern"
    ),
    "home of nobody": Case(
        params(sources__mine__corpus={"files": [{"path": "~no-such-user/a.txt"}]}),
        "download",
        r"~no-such-user/a\.txt: cannot be",
    ),
    "a name too long": Case(
        own("corpus", "a" * 300, None), "download", r"aaa.* cannot be a path \(.*too long.*correct path:"
    ),
    "a name with a zero": Case(own("corpus", "a\0.txt", None), "download", r"data/own/a\\x00\.txt: expected a file or"),
    "empty file": Case(own("corpus", "b.txt", b""), "download", r"data/own/b\.txt: expected data, found an empty file"),
    "other sha256": Case(
        params(sources__mine__corpus={"files": [{"path": "data/own/a.txt", "sha256": "0" * 64}]}),
        "download",
        r"data/own/a\.txt: expected sha256 0{64}, found \w{64}; if the new content is right, pin that one",
    ),
    "a login page": Case(
        own("corpus", "b.txt", "<!DOCTYPE html><html>log in</html>"),
        "download",
        r"b\.txt: expected data, found an HTML page",
    ),
    "unknown format": Case(
        own("messages", "b.pdf", "%PDF"),
        "download",
        r"b\.pdf: expected a name that ends in \.jsonl .*; convert or rename it",
    ),
    "member without an archive": Case(
        own("corpus", "b.txt", "a", member="x"),
        "download",
        r"b\.txt: expected a \.zip or \.tar, as it has member: x; remove member:",
    ),
}

TEXTS: dict[str, Case] = {
    "not UTF-8": Case(
        own("corpus", "b.txt", b"caf\xe9"),
        "download",
        r"b\.txt: expected UTF-8, found byte 0xe9 at offset 3; write",
    ),
    "half a character": Case(
        own("corpus", "b.txt", b"ab\xf0\x9f"), "download", r"b\.txt: .*found byte 0xf0 at offset 2; write its encoding:"
    ),
    "UTF-16": Case(own("corpus", "b.txt", b"\xff\xfea\x00b"), "download", r"b\.txt: "),
    "blanks only": Case(
        own("corpus", "b.txt", " \n\n"), "download", r"b\.txt: expected text, found none; remove it .* or fill it"
    ),
    "no book in it": Case(
        own("corpus", "b.txt", "a", strip="gutenberg"),
        "download",
        r"b\.txt: expected a line '\*\*\* START OF.*remove strip:",
    ),
    "a book without end": Case(
        own("corpus", "b.txt", "*** START OF THIS PROJECT GUTENBERG EBOOK A ***\n", strip="gutenberg"),
        "download",
        r"b\.txt: expected a line '\*\*\* END OF.*found none; remove strip: gutenberg",
    ),
    "nothing left after cleaning": Case(
        write("data/raw/corpus.jsonl", '{"doc": 0, "text": "\\u0000"}\n'), "tokenize", r"corpus\.jsonl: no text is left"
    ),
    "downloads damaged": Case(
        write("data/raw/messages.jsonl", '{"text": "a"'),
        "tokenize",
        r"messages\.jsonl: line 1: .*run the download stage again",
    ),
    "labels damaged": Case(
        cut("data/raw/labels.json", 3), "tokenize", r"labels\.json: not valid JSON .*run the download stage again"
    ),
    "tokens damaged": Case(
        cut("data/tokens/messages/val.jsonl", 9),
        "finetune-classify",
        r"val\.jsonl: damaged .*run the tokenize stage again",
    ),
    "no tokens of the corpus": Case(None, "pretrain", r"corpus/meta\.json: missing; run tokenize"),
}

TABLES: dict[str, Case] = {
    "no such column": Case(
        own("messages", "b.csv", "text,kind\nhi,ham\n"),
        "download",
        r"b\.csv, line 2: expected 'label', found only text, kind; name",
    ),
    "unknown label": Case(
        own("messages", "b.csv", "text,label\nhi,spma\n"),
        "download",
        r"b\.csv, line 2: expected a label out of ham, spam, found 'spma'; correct it or labels:",
    ),
    "a cell too many": Case(
        own("messages", "b.csv", "text,label\na,b,ham\n"),
        "download",
        r"b\.csv, line 2: expected 2 columns .*found 3; correct",
    ),
    "an open quote": Case(
        own("messages", "b.csv", 'text,label\n"a,ham\nb,ham\n'),
        "download",
        r"b\.csv, line 3: .*closed quotes.*write a quote",
    ),
    "an empty cell": Case(
        own("messages", "b.tsv", "text\tlabel\n \tham\n"), "download", r"b\.tsv, line 2: expected text .*fill it"
    ),
    "unknown split": Case(
        own("messages", "b.csv", "text,label,s\nhi,ham,first\n", split="s"),
        "download",
        r"b\.csv, line 2: expected a split, train",
    ),
    "no tab": Case(
        own("messages", "SMS", "spam b\n", format="tsv"), "download", r"SMS, line 1: expected label TAB text.*correct"
    ),
    "a line end in the name of a column": Case(
        own("messages", "b.csv", '"te\nxt",label\nhi,ham\n'),
        "download",
        r"b\.csv, line 3: expected 'text', found only te\\nxt, label",
    ),
    "a cell of 100,000 characters as label": Case(
        own("messages", "b.csv", f"text,label\nhi,{'h' * 100_000}\n"),
        "download",
        r"expected a label .*h \.\.\. h.*correct it or labels:",
    ),
}

JSON: dict[str, Case] = {
    "cut": Case(
        own("corpus", "b.jsonl", '{"text": "a"}\n{"text": "b"\n'),
        "download",
        r"b\.jsonl, line 2: expected one JSON object.*correct",
    ),
    "a list": Case(
        own("corpus", "b.jsonl", '["b"]'),
        "download",
        r"b\.jsonl, row 1: expected a JSON object, found str; correct",
    ),
    "array cut": Case(
        own("corpus", "b.json", '[{"text": "a"},\n'), "download", r"b\.json, line 2: expected a list of JSON objects"
    ),
    "array of texts": Case(
        own("corpus", "b.json", '["a"]'), "download", r"b\.json, row 1: expected a JSON object, found str; correct"
    ),
    "a value that is none": Case(
        own("corpus", "b.json", '[{"text": b}]'), "download", r"b\.json, line 1: expected a list of JSON"
    ),
    "deep lines": Case(
        own("corpus", "b.jsonl", DEEP), "download", r"b\.jsonl, line 1: .*too many brackets inside one another"
    ),
    "deep array": Case(own("corpus", "b.json", DEEP), "download", r"b\.json, line 1: expected a list of JSON objects"),
    "a number of 5,000 digits in a line": Case(
        own("corpus", "b.jsonl", f'{{"text": {LONG_NUMBER}}}'),
        "download",
        r"b\.jsonl, line 1: expected one JSON object.*digits",
    ),
    "a number of 5,000 digits in an array": Case(
        own("corpus", "b.json", f'[{{"text": {LONG_NUMBER}}}]'),
        "download",
        r"b\.json, line 1: expected a list of JSON.*digits",
    ),
    "half a surrogate pair": Case(
        own("corpus", "b.jsonl", '{"text": "\\ud83d"}'),
        "download",
        r"b\.jsonl, line 1: .*half a character \(\\ud83d\).*remove",
    ),
    "a list for a text": Case(
        own("instructions", "b.jsonl", '{"instruction": ["a"], "output": "b"}'),
        "download",
        r"line 1: .*'instruction', found list; correct",
    ),
    "no output": Case(
        own("instructions", "b.json", '[{"instruction": "c"}]'),
        "download",
        r"b\.json, row 1: expected 'output', found only instruction",
    ),
    "empty output": Case(
        own("instructions", "b.jsonl", '{"instruction": "a", "output": ""}'),
        "download",
        r"b\.jsonl, line 1: expected text in 'output'",
    ),
    "escape codes in a key": Case(
        own("corpus", "b.jsonl", '{"\\u001b[2J\\u202e": 1}'),
        "download",
        r"b\.jsonl, line 1: .*found only \\x1b\[2J\\u202e; name",
    ),
}

PARQUETS: dict[str, Case] = {
    "a text": Case(
        own("corpus", "b.parquet", "text"), "download", r"b\.parquet: expected a parquet file, found an error"
    ),
    "cut": Case(
        own("corpus", "b.parquet", PARQUET.getvalue()[:-9]),
        "download",
        r"b\.parquet: expected a parquet file, found an error",
    ),
    "metadata overwritten": Case(
        own("corpus", "b.parquet", PARQUET.getvalue()[:-200] + b"\xff" * 150 + PARQUET.getvalue()[-50:]),
        "download",
        r"b\.parquet: expected a parquet file, found an error",
    ),
    "no such column": Case(
        own("messages", "b.parquet", PARQUET.getvalue()), "download", r"b\.parquet, row 1: expected 'label', found"
    ),
}

ARCHIVES: dict[str, Case] = {
    "gz that is none": Case(
        own("corpus", "b.txt.gz", TEXT), "download", r"b\.txt\.gz: cannot be unpacked \(.*fetch or pack it again"
    ),
    "gz cut": Case(own("corpus", "b.txt.gz", gzip.compress(TEXT)[:-5]), "download", r"b\.txt\.gz: cannot be unpacked"),
    "gz with another checksum": Case(
        own("corpus", "b.txt.gz", gzip.compress(TEXT)[:-8] + bytes(8)),
        "download",
        r"b\.txt\.gz: cannot be unpacked \(CRC",
    ),
    "zst that is none": Case(own("corpus", "b.txt.zst", TEXT), "download", r"b\.txt\.zst: cannot be unpacked"),
    "zst cut": Case(
        own("corpus", "b.txt.zst", pyarrow.compress(TEXT, "zstd", asbytes=True)[:-5]),
        "download",
        r"b\.txt\.zst: cannot be unpacked",
    ),
    "zip that is none": Case(
        own("corpus", "b.zip", TEXT), "download", r"b\.zip: cannot be unpacked \(File is not a zip"
    ),
    "zip cut": Case(own("corpus", "b.zip", zipped(**{"a.txt": TEXT})[:-20]), "download", r"b\.zip: cannot be unpacked"),
    "zip of nothing": Case(
        own("corpus", "b.zip", zipped()), "download", r"b\.zip: expected one member, found 0.*say which"
    ),
    "zip of several": Case(
        own("corpus", "b.zip", zipped(**{"a.txt": TEXT, "b.txt": TEXT})),
        "download",
        r"b\.zip: expected one member, found 2: a.*say which",
    ),
    "no such member": Case(
        own("corpus", "b.zip", zipped(**{"a.txt": TEXT}), member="c.txt"),
        "download",
        r"b\.zip: expected a member 'c\.txt', found 1",
    ),
    "member above": Case(
        own("corpus", "b.zip", zipped(**{"../a.txt": TEXT})),
        "download",
        r"b\.zip: member '\.\./a\.txt' leads out of the archive; do not",
    ),
    "member at the root": Case(
        own("corpus", "b.zip", zipped(**{"/etc/a.txt": TEXT})), "download", r"'/etc/a\.txt' leads out of"
    ),
    "member with a password": Case(
        own("corpus", "b.zip", bytes(ENCRYPTED)), "download", r"b\.zip:a\.txt: cannot be unpacked \(.*encrypted"
    ),
    "member with a line end in its name": Case(
        own("corpus", "b.zip", zipped(**{"a\nb.pdf": TEXT})),
        "download",
        r"b\.zip:a\\nb\.pdf: expected a name that ends in",
    ),
    "member damaged": Case(
        own("corpus", "b.zip", zipped(**{"a.txt": TEXT}).replace(b"The cat", b"The dog", 1)),
        "download",
        r"a\.txt: cannot be unpacked \(Bad CRC",
    ),
}

MODEL_FOLDERS: dict[str, Case] = {
    "none": Case(
        None,
        "llm score models/none text.txt",
        r"models/none: not a model folder: config\.json is missing; name a folder",
    ),
    "no config": Case(
        remove(CONFIG), SCORE, r"models/base: not a model folder: config\.json is missing; name a folder such as"
    ),
    "config cut": Case(cut(CONFIG, 100), SCORE, r"config\.json: not valid JSON \(.*\); make the model folder again"),
    "config binary": Case(
        write(CONFIG, b"\xff\xfe\0"), SCORE, r"config\.json: not valid JSON \(.*\); make the model folder"
    ),
    "config a list": Case(write(CONFIG, "[]"), SCORE, r"models/base/config\.json: .*found \[\]"),
    "config deep": Case(write(CONFIG, DEEP), SCORE, r"config\.json: not valid JSON \(too many brackets"),
    "unknown key": Case(config(CONFIG, extra=1), SCORE, r"config\.json: extra: unknown key; remove it"),
    "missing key": Case(config(CONFIG, n_heads=None), SCORE, r"config\.json: gpt\.n_heads: missing key; add it"),
    "a number as text": Case(config(CONFIG, n_layers="2"), SCORE, r"config\.json: gpt\.n_layers: .*found '2'"),
    "odd heads": Case(config(CONFIG, n_kv_heads=3), SCORE, r"config\.json: gpt: n_heads 4 must be a multiple"),
    "a width that no machine holds": Case(
        config(CONFIG, emb_dim=2**62), SCORE, r"gpt\.emb_dim: .*less than or equal to 16777216"
    ),
    "layers without end": Case(config(CONFIG, n_layers=10**9), SCORE, r"gpt\.n_layers: .*less than or equal to 1000"),
    "unknown kind": Case(config(CONFIG, kind="chat"), SCORE, r"config\.json: kind: .*found 'chat'"),
    "base with template": Case(
        config(CONFIG, template="alpaca"), SCORE, r"a template goes with kind instruct, found kind base"
    ),
    "base with labels": Case(
        config(CONFIG, labels=["a", "b"], max_length=3), SCORE, r"labels and max_length go with .*found kind base"
    ),
    "classifier without labels": Case(
        config("models/classifier/config.json", labels=None),
        "llm classify models/classifier a",
        r"labels and max_length go with",
    ),
    "classifier without any label": Case(
        config("models/classifier/config.json", labels=[]),
        "llm classify models/classifier a",
        r"labels and max_length go",
    ),
    "classifier without max_length": Case(
        config("models/classifier/config.json", max_length=None),
        "llm classify models/classifier a",
        r"labels and max_length",
    ),
    "classifier that reads nothing": Case(
        config("models/classifier/config.json", max_length=0),
        "llm classify models/classifier a",
        r"max_length: .*found 0",
    ),
    "classifier with a label more": Case(
        config("models/classifier/config.json", labels=["a", "b", "c"]),
        "llm classify models/classifier a",
        r"model\.safetensors: tensor head\.weight has shape \[2, 16\], config\.json asks for \[3, 16\]",
    ),
    "instruct without template": Case(
        config("models/instruct/config.json", template=None),
        "llm chat models/instruct",
        r"a template goes with kind instruct",
    ),
    "no weights": Case(
        remove(OURS), SCORE, r"model\.safetensors: cannot be read as safetensors .*make or copy the file again"
    ),
    "weights cut": Case(cut(OURS, 5000), SCORE, r"model\.safetensors: cannot be read as safetensors"),
    "weights empty": Case(cut(OURS, 0), SCORE, r"model\.safetensors: cannot be read as safetensors"),
    "weights with a header of 2^63 bytes": Case(
        put(OURS, 0, struct.pack("<Q", 2**63)), SCORE, r"cannot be read as safetensors"
    ),
    "weights a pickle": Case(write(OURS, b"\x80\x04cos\nsystem\n"), SCORE, r"cannot be read as safetensors"),
    "tensor missing": Case(
        weights(OURS, lambda w: w.pop(Q)), SCORE, rf"tensor {Q} is missing; config\.json asks for it"
    ),
    "tensor left over": Case(
        weights(OURS, lambda w: w.update(new=w[Q].clone())), SCORE, r"tensor new has no place in the model \(1 left"
    ),
    "tensor of another shape": Case(
        weights(OURS, lambda w: w.update({Q: w[Q][:8].clone()})),
        SCORE,
        rf"tensor {Q} has shape \[8, 16\], config\.json asks for",
    ),
    "tensor of integers": Case(
        weights(OURS, lambda w: w.update({Q: w[Q].to(torch.int32)})),
        "llm export models/base new --format hf",
        rf"tensor {Q} is of torch\.int32, no weights; make",
    ),
    "head of a tied model": Case(
        weights(OURS, lambda w: w.update({"lm_head.weight": w["tok_emb.weight"].clone()})),
        SCORE,
        r"tensor lm_head\.weight has no place",
    ),
    "more layers than weights": Case(config(CONFIG, n_layers=3), SCORE, r"tensor blocks\.2\.\S+ is missing"),
    "a thousand layers in a small file": Case(
        config(CONFIG, n_layers=1000), SCORE, r"\d+ tensors are too few for a model of 1000 layers"
    ),
    "fewer layers than weights": Case(
        config(CONFIG, n_layers=1), SCORE, r"tensor blocks\.1\.\S+ has no place in the model"
    ),
    "tokenizer missing": Case(remove(BPE), SCORE, r"bpe\.json: missing; it is written by the tokenize stage"),
    "tokenizer cut": Case(cut(BPE, 300), SCORE, r"bpe\.json: not valid JSON \(.*written by the tokenize stage"),
    "tokenizer deep": Case(write(BPE, DEEP), SCORE, r"bpe\.json: not valid JSON \(too many brackets"),
    "tokenizer of half the bytes": Case(
        write(BPE, '{"pattern": "a", "special_tokens": {"a": 1}, "end": "a", "begin": null, "ranks": ["YQ=="]}'),
        SCORE,
        r"bpe\.json: the ranks must hold each byte, and nothing twice; write the tokenizer again",
    ),
    "tokenizer with a broken pattern": Case(
        config(BPE, pattern="[a"), SCORE, r"bpe\.json: not a tokenizer \(.*write it again"
    ),
    "tokenizer with a vast id": Case(
        config(BPE, special_tokens={"<|endoftext|>": 10**12}),
        SCORE,
        r"bpe\.json: a special token has the id .*none below 1,000,000",
    ),
    "tokenizer with an infinite id": Case(
        replace(BPE, b": 277", b": 1e999"), SCORE, r"bpe\.json: not a tokenizer \(OverflowError"
    ),
    "tokenizer without its end": Case(
        config(BPE, end="<eos>"), SCORE, r"bpe\.json: the special token <eos> is missing"
    ),
    "tokenizer of a larger vocabulary": Case(
        config(CONFIG, vocab_size=270),
        SCORE,
        r"models/base: the tokenizer has 280 tokens, the model 270; they do not belong together",
    ),
    "tokenizer of a smaller vocabulary": Case(
        config(CONFIG, vocab_size=290),
        SCORE,
        r"tok_emb\.weight has shape \[280, 16\], config\.json asks for \[290, 16\]",
    ),
    "base of a finetuning damaged": Case(
        cut(OURS, 5000), "finetune-classify", r"model\.safetensors: cannot be read as safetensors"
    ),
    "adapter damaged": Case(
        write("models/tuned/adapter/adapter.json", DEEP),
        "llm export models/tuned new --format peft",
        r"adapter\.json: not valid JSON \(too many brackets.*make the adapter again",
    ),
    "adapter without weights": Case(
        cut("models/tuned/adapter/adapter.safetensors", 7),
        "llm export models/tuned new --format peft",
        r"adapter\.safetensors: cannot be read as safetensors",
    ),
}

FOREIGN_FOLDERS: dict[str, Case] = {
    "none": Case(
        None, "llm import nowhere new", r"nowhere: not found; give a model folder, a \.gguf file or a hub name"
    ),
    "a text": Case(None, "llm import text.txt new", r"text\.txt: no folder and no \.gguf file; give a model folder"),
    "no config": Case(
        remove(THEIR_CONFIG), IMPORT, r"config\.json: missing; give a folder with config\.json, weights and tokenizer"
    ),
    "config cut": Case(
        cut(THEIR_CONFIG, 100), IMPORT, r"theirs/config\.json: not valid JSON .*give a folder with config\.json"
    ),
    "config a list": Case(
        write(THEIR_CONFIG, "[]"), IMPORT, r"config\.json: expected a JSON object, found list; give a folder"
    ),
    "config deep": Case(write(THEIR_CONFIG, DEEP), IMPORT, r"config\.json: not valid JSON \(too many brackets"),
    "unknown model": Case(
        config(THEIR_CONFIG, model_type="bert"), IMPORT, r"model_type 'bert' is not known; known are gpt2"
    ),
    "layers without end": Case(
        config(THEIR_CONFIG, num_hidden_layers=10**12), IMPORT, r"num_hidden_layers: .*less than or equal to 1000"
    ),
    "a thousand layers in a small file": Case(
        config(THEIR_CONFIG, num_hidden_layers=1000),
        IMPORT,
        r"theirs: \d+ tensors are too few for a model of 1000 layers",
    ),
    "vocabulary without end": Case(
        config(THEIR_CONFIG, vocab_size=10**18), IMPORT, r"vocab_size: .*less than or equal to 16777216"
    ),
    "quantised": Case(
        config(THEIR_CONFIG, quantization_config={"bits": 4}),
        IMPORT,
        r"quantization_config: quantized weights \(4\) are not read",
    ),
    "a vocabulary larger than the embedding": Case(
        config(THEIR_CONFIG, vocab_size=279),
        IMPORT,
        r"theirs: the tokenizer has 280 tokens, the embedding only 279; they do not",
    ),
    "no weights": Case(
        remove(THEIRS), IMPORT, r"theirs: model\.safetensors is missing; .*take or make the weights as safetensors"
    ),
    "pickles only": Case(
        lambda place: (place / THEIRS).rename(place / "theirs/pytorch_model.bin"),
        IMPORT,
        r"pytorch_model\.bin is not read: unpickling executes code; take or make the weights as safetensors",
    ),
    "weights cut": Case(cut(THEIRS, 20_000), IMPORT, r"theirs/model\.safetensors: cannot be read as safetensors"),
    "tensor missing": Case(
        weights(THEIRS, lambda w: w.pop(THEIR_Q)), IMPORT, rf"tensor {THEIR_Q} is missing; config\.json asks for it"
    ),
    "tensor left over": Case(
        weights(THEIRS, lambda w: w.update(new=w[THEIR_Q].clone())), IMPORT, r"tensor new has no place .*\(1 left"
    ),
    "tensor of another layer": Case(
        weights(THEIRS, lambda w: w.update({THEIR_Q.replace("1", "2"): w[THEIR_Q].clone()})),
        IMPORT,
        r"layers\.2\.\S+ has no place",
    ),
    "tensor of another shape": Case(
        weights(THEIRS, lambda w: w.update({THEIR_Q: w[THEIR_Q][:8].clone()})),
        IMPORT,
        r"has shape \[8, 16\], config\.json asks for",
    ),
    "tensor of integers": Case(
        weights(THEIRS, lambda w: w.update({THEIR_Q: w[THEIR_Q].to(torch.int8)})),
        IMPORT,
        r"is stored as I8; read are F32, F16, BF16",
    ),
    "shard of another folder": Case(
        all_of(remove(THEIRS), write(f"{THEIRS}.index.json", '{"weight_map": {"a": "../text.txt"}}')),
        IMPORT,
        r"index\.json: weight_map must name a file of this folder for each tensor; fetch it again",
    ),
    "shard that is a number": Case(
        all_of(remove(THEIRS), write(f"{THEIRS}.index.json", '{"weight_map": {"a": 5, "b": "c"}}')),
        IMPORT,
        r"index\.json: weight_map must name a file of this folder for each tensor; fetch it again",
    ),
    "shard missing": Case(
        all_of(remove(THEIRS), write(f"{THEIRS}.index.json", '{"weight_map": {"a": "a.safetensors"}}')),
        IMPORT,
        r"theirs: shard a\.safetensors is missing \(1 of 1\); fetch it again",
    ),
    "shard cut": Case(
        all_of(sharded, cut(f"theirs/{SHARDS[1]}", 3000)), IMPORT, rf"{SHARDS[1]}: cannot be read as safetensors"
    ),
    "shard twice": Case(
        all_of(sharded, lambda place: shutil.copy(place / "theirs" / SHARDS[0], place / "theirs" / SHARDS[1])),
        IMPORT,
        rf"{SHARDS[1]}: tensor \S+ is also in {SHARDS[0]}",
    ),
    "index cut": Case(
        all_of(sharded, cut(f"{THEIRS}.index.json", 50)), IMPORT, r"index\.json: not valid JSON .*make or copy"
    ),
    "index without map": Case(
        all_of(sharded, write(f"{THEIRS}.index.json", "{}")),
        IMPORT,
        r"index\.json: weight_map must name a file .*fetch it again",
    ),
    "no tokenizer": Case(
        remove(THEIR_TOKENIZER), IMPORT, r"theirs: no tokenizer\.json, and no vocab\.json with merges\.txt"
    ),
    "SentencePiece": Case(
        all_of(remove(THEIR_TOKENIZER), write("theirs/tokenizer.model", "")),
        IMPORT,
        r"tokenizer\.model: no model of SentencePiece .*fetch it again",
    ),
    "tokenizer cut": Case(cut(THEIR_TOKENIZER, 100), IMPORT, r"tokenizer\.json: not valid JSON .*fetch it again"),
    "tokenizer deep": Case(
        write(THEIR_TOKENIZER, DEEP), IMPORT, r"tokenizer\.json: not valid JSON \(too many brackets"
    ),
    "tokenizer of nothing": Case(
        write(THEIR_TOKENIZER, "{}"), IMPORT, r"theirs/tokenizer\.json: .*fetch it again|no tokenizer"
    ),
    "tokenizer with an infinite id": Case(
        replace(THEIR_TOKENIZER, b": 12,", b": 1e999,"),
        IMPORT,
        r"tokenizer\.json: not a tokenizer \(OverflowError.*fetch it again",
    ),
    "tokenizer with half a surrogate pair": Case(
        config("theirs/tokenizer_config.json", eos_token="\ud800"),
        IMPORT,
        r"tokenizer_config\.json: eos_token: holds half a character \(\\ud800\); ",
    ),
    "chat template that is a number": Case(
        config("theirs/tokenizer_config.json", chat_template=5),
        IMPORT,
        r"tokenizer_config\.json: chat_template: expected text, found 5",
    ),
    "chat template not UTF-8": Case(
        write("theirs/chat_template.jinja", b"\xff"),
        IMPORT,
        r"chat_template\.jinja: .*fetch it again|tokenizer\.json: not a tokenizer",
    ),
}

GGUF: dict[str, Case] = {
    "none": Case(None, "llm import none.gguf new", r"none\.gguf: not found; give a model folder"),
    "another file": Case(
        write("it.gguf", "PK\x03\x04"), IMPORT_GGUF, r"it\.gguf: not a GGUF file \(it does not begin with GGUF\); name"
    ),
    "empty": Case(write("it.gguf", ""), IMPORT_GGUF, r"it\.gguf: not a GGUF file"),
    "old version": Case(
        put("it.gguf", 4, struct.pack("<I", 1)), IMPORT_GGUF, r"GGUF version 1 is not supported, only 2 and 3; convert"
    ),
    "header cut": Case(
        cut("it.gguf", 500), IMPORT_GGUF, r"it\.gguf: truncated: the header goes on .*download or copy the file again"
    ),
    "weights cut": Case(
        cut("it.gguf", 20_000), IMPORT_GGUF, r"it\.gguf: truncated: tensor .*download or copy the file again"
    ),
    "2^63 tensors": Case(
        put("it.gguf", 8, struct.pack("<Q", 2**63)), IMPORT_GGUF, r"it\.gguf: (truncated|damaged): .*copy the file"
    ),
    "2^63 keys": Case(
        put("it.gguf", 16, struct.pack("<Q", 2**63)), IMPORT_GGUF, r"it\.gguf: (truncated|damaged): .*copy the file"
    ),
    "a key of 2^63 bytes": Case(
        put("it.gguf", 24, struct.pack("<Q", 2**63)), IMPORT_GGUF, r"it\.gguf: truncated: .*copy the file again"
    ),
    "a key that is no text": Case(
        put("it.gguf", 32, b"\xff"), IMPORT_GGUF, r"it\.gguf: damaged: a text before byte \d+ is not UTF-8"
    ),
    "another architecture": Case(
        replace("it.gguf", struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"mamba"),
        IMPORT_GGUF,
        r"it\.gguf: general\.architecture 'mamba' is not known; known are gpt2",
    ),
    "layers without end": Case(
        replace("it.gguf", b"llama.block_count\x04\0\0\0\x02\0\0\0", b"llama.block_count\x04\0\0\0\xff\xff\xff\0"),
        IMPORT_GGUF,
        r"it\.gguf: n_layers: .*less than or equal to 1000, found 16777215",
    ),
    "tensor missing": Case(
        replace("it.gguf", b"blk.1.ffn_up", b"blk.9.ffn_up"), IMPORT_GGUF, r"tensor blk\.1\.ffn_up\.weight is missing"
    ),
    "SentencePiece": Case(
        replace("it.gguf", b"model\x08\0\0\0\x04\0\0\0\0\0\0\0gpt2", b"model\x08\0\0\0\x04\0\0\0\0\0\0\0bert"),
        IMPORT_GGUF,
        r"it\.gguf: tokenizer\.ggml\.model: bert; only byte-level BPE \(gpt2\) and SentencePiece's BPE",
    ),
    "unknown cuts": Case(
        replace("it.gguf", b"pre\x08\0\0\0\x05\0\0\0\0\0\0\0gpt-2", b"pre\x08\0\0\0\x05\0\0\0\0\0\0\0gpt-9"),
        IMPORT_GGUF,
        r"it\.gguf: tokenizer\.ggml\.pre: gpt-9 is not known here; known are",
    ),
}

COMMAND_LINES: dict[str, Case] = {
    "no command": Case(None, "llm", r"arguments are required: COMMAND; see python -m llm --help", status=2),
    "unknown command": Case(None, "llm sing", r"invalid choice: 'sing' \(choose from 'generate', .*--help", status=2),
    "no model": Case(None, "llm generate --prompt One", r"arguments are required: MODEL_DIR; see .* --help", status=2),
    "no prompt": Case(None, "llm generate models/base", r"arguments are required: --prompt; see .* --help", status=2),
    "unknown option": Case(None, f"{GENERATE} --colour red", r"unrecognized arguments: --colour red; see", status=2),
    "an option with a line end": Case(None, f"{GENERATE} '--a\nb'", r"unrecognized arguments: --a\\nb; see", status=2),
    "a word for a number": Case(None, f"{GENERATE} --top-k many", r"--top-k: invalid int value: 'many'; see", status=2),
    "unknown form": Case(
        None, "llm export models/base new --format onnx", r"invalid choice: 'onnx' .*--help", status=2
    ),
    "empty prompt": Case(None, "llm generate models/base --prompt ''", r"--prompt is empty; give some text"),
    "prompt not UTF-8": Case(
        None, "llm generate models/base --prompt \udcff", r"--prompt is not valid UTF-8; convert it"
    ),
    "folder not UTF-8": Case(None, "llm generate models/\udcff --prompt One", r"models/\\udcff: not a model folder"),
    "file not UTF-8": Case(None, "llm score models/base \udcff", r"\\udcff: No such file"),
    "folder with a line end": Case(None, "llm score 'a\nb' text.txt", r"a\\nb: not a model folder"),
    "temperature below 0": Case(None, f"{GENERATE} --temperature -1", r"temperature must be 0 .*found -1"),
    "temperature not a number": Case(None, f"{GENERATE} --temperature nan", r"temperature must be .*found nan"),
    "no tokens": Case(None, f"{GENERATE} --max-new-tokens -5", r"max_new_tokens must be 0 or more, found -5"),
    "top-k of none": Case(None, f"{GENERATE} --top-k 0", r"top_k must be 1 or more, found 0"),
    "top-p above 1": Case(None, f"{GENERATE} --top-p 2", r"top_p must be above 0 and at most 1, found 2"),
    "min-p above 1": Case(None, f"{GENERATE} --min-p 2", r"min_p must be between 0 and 1, found 2"),
    "no penalty": Case(None, f"{GENERATE} --repetition-penalty 0", r"repetition_penalty must be .*found 0"),
    "negative seed": Case(None, f"{GENERATE} --seed -1", r"seed must be between 0 and 2\^63, found -1"),
    "a seed of 100 digits": Case(None, f"{GENERATE} --seed {'9' * 100}", r"seed must be between 0 and 2\^63"),
    "a classifier cannot write": Case(
        None,
        "llm generate models/classifier --prompt One",
        r"classifier: wrong kind of model \(expected base or instruct, got classifier\)",
    ),
    "a base model cannot chat": Case(
        None,
        "llm chat models/base",
        r"wrong kind of model \(expected instruct, got base\)",
    ),
    "a base model cannot label": Case(
        None, "llm classify models/base text", r"wrong kind of model \(expected classifier, got base\)"
    ),
    "a classifier cannot score": Case(
        None,
        "llm score models/classifier text.txt",
        r"wrong kind of model \(expected base or instruct, got classifier\)",
    ),
    "no file to score": Case(None, "llm score models/base none.txt", r"none\.txt: No such file"),
    "a folder to score": Case(None, "llm score models/base models", r"models: Is a directory"),
    "an empty text to score": Case(write("text.txt", ""), SCORE, r"text\.txt: empty; give a text to score"),
    "one token to score": Case(write("text.txt", "O"), SCORE, r"text\.txt: a single token; .*needs at least two"),
    "a text to score not UTF-8": Case(
        write("text.txt", b"caf\xe9"),
        SCORE,
        r"text\.txt: not valid UTF-8 \(byte 0xe9 at position 3\); convert it first",
    ),
    "nothing on stdin": Case(None, "llm score models/base -", r"stdin: empty; give a text"),
    "an instruction not UTF-8": Case(
        None, "llm chat models/instruct", r"stdin, line 1: not valid UTF-8 \(byte 0xff", b"\xff\n"
    ),
    "a message not UTF-8": Case(
        None, "llm classify models/classifier -", r"stdin, line 2: not valid UTF-8", b"fine\n\xe9\n"
    ),
    "a dtype that does not belong": Case(
        None, "llm export models/base new --format hf --dtype f16", r"--dtype goes with --format gguf"
    ),
    "a base that does not belong": Case(
        None, "llm export models/base new --format hf --base a", r"--base goes with --format peft"
    ),
    "no adapter": Case(
        None,
        "llm export models/base new --format peft",
        r"models/base: holds no adapter; train it with trainable: lora",
    ),
    "a classifier for other tools": Case(
        None, "llm export models/classifier new --format hf", r"models/classifier: a classifier's head"
    ),
    "a classifier as GGUF": Case(
        None, "llm export models/classifier new.gguf --format gguf", r"a classifier has no form in GGUF"
    ),
    "onto itself": Case(
        None, "llm export models/base models/base --format hf", r"models/base: the source itself; name another folder"
    ),
    "onto something else": Case(
        None, "llm export models/base data --format hf", r"data: exists and is no model folder; name a new"
    ),
    "onto a file": Case(
        None, "llm export models/base text.txt --format hf", r"text\.txt: exists and is no model folder; name a new"
    ),
    "an adapter onto a model": Case(
        None, "llm export models/tuned models/base --format peft", r"models/base: exists and is no adapter"
    ),
    "GGUF onto a folder": Case(
        None, "llm export models/base models --format gguf", r"models: a folder has this name; name a file"
    ),
    "imported onto something else": Case(
        None, "llm import models/base data", r"data: exists and is no model folder; name a new"
    ),
    "imported onto itself": Case(
        None, "llm import models/base models/base", r"models/base: the source itself; name another"
    ),
}

TABLE = {
    f"{section}: {name}": case
    for section, cases in {
        "params": PARAMS,
        "source": SOURCES,
        "text": TEXTS,
        "table": TABLES,
        "JSON": JSON,
        "parquet": PARQUETS,
        "archive": ARCHIVES,
        "model folder": MODEL_FOLDERS,
        "foreign folder": FOREIGN_FOLDERS,
        "GGUF": GGUF,
        "command line": COMMAND_LINES,
    }.items()
    for name, case in cases.items()
}
IN_A_PROCESS = (
    "params: syntax",
    "params: deep",
    "source: other sha256",
    "JSON: escape codes in a key",
    "archive: member above",
    "model folder: weights a pickle",
    "foreign folder: tokenizer deep",
    "GGUF: weights cut",
    "command line: folder not UTF-8",
    "command line: a word for a number",
)
FROM_THE_START = (
    "params: syntax",
    "command line: folder not UTF-8",
)  # Python too; a fork of this process has all loaded


# ---- the table is run ------------------------------------------------------------------------------------------------


@pytest.fixture
def place(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_TRACKING", "off")
    monkeypatch.setenv("LLM_LOG_LEVEL", "error")  # other messages are no part of a case
    return tmp_path


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A stage takes over signals for good, as its process ends with it."""
    before = {number: signal.getsignal(number) for number in stage_run.EXIT_STATUS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", TABLE)
def test_one_line_and_nothing_left_behind(
    place: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = TABLE[name]
    if case.harm:
        case.harm(place)
    before = tree(place)
    program, *argv = shlex.split(case.command)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(case.stdin)))
    try:
        if program == "llm":
            status: Any = llm_main(argv)
        else:
            module = program.replace("-", "_")
            stage_run.main(program, getattr(import_module(f"stages.{module}"), module))
            status = 0
    except SystemExit as stop:  # what Python does with it: a text is told, and the status is 1
        status = stop.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    said = capsys.readouterr()
    check(case, status, said.err)
    assert said.out == "" or case.stdin
    assert tree(place) == before


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_in_a_process_of_its_own(place: Path, name: str) -> None:
    case = TABLE[name]
    assert not case.stdin
    if case.harm:
        case.harm(place)
    before = tree(place)
    program, *argv = shlex.split(case.command)
    module = "llm" if program == "llm" else f"stages.{program.replace('-', '_')}"
    if name in FROM_THE_START:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", module, *argv]
        done: Any = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    else:
        done = forks.run_forked(forks.module(module, *argv))
    check(case, done.returncode, done.stderr)
    assert done.stdout == ""
    assert tree(place) == before


def check(case: Case, status: int, said: str) -> None:
    assert status == case.status, said
    assert said.endswith("\n") and said.removesuffix("\n").isprintable(), said
    assert len(said) < 2500
    program = case.command.split()[0]
    assert re.match("python -m llm( [a-z]+)?: " if program == "llm" else f"{program}: ", said), said
    assert re.search(case.message, said), said


def tree(place: Path) -> dict[str, bytes | None]:
    """All that lies there, but for the stages' own record of what ran."""
    return {
        path.relative_to(place).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(place.rglob("*"))
        if path.relative_to(place).parts[0] != ".work"
    }
