"""Every parser of bytes that come from anywhere: what it is fed with, and how inputs are made from sound ones.

A parser may take what it gets or refuse it with `InputError`, in one line; anything else is a crash. An input is one
byte, which chooses a target of the parser (a format, or which file of a folder is replaced), and its content.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import logging
import lzma
import random
import re
import tarfile
import tempfile
import unittest.mock
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import load

from llm.checkpoint.folder import Checkpoint, CheckpointConfig, load_checkpoint, save_checkpoint
from llm.common.errors import InputError
from llm.config import CorpusSource, InstructionsSource, MessagesSource, SourceFile
from llm.convert.gguf import export_gguf, read_gguf
from llm.convert.hf import export_hf
from llm.convert.load import import_model
from llm.download.fetching.fetch import fetch
from llm.download.records.readers import write_records
from llm.model.gpt import GPT
from llm.tokenizer.bpe import FILE_NAME, GPT2_PATTERN, Tokenizer
from llm.tokenizer.chat_template import render_untrusted
from llm.tokenizer.hf import read_tokenizer_json
from llm.training.state import load_state, save_state
from tests.helpers import GPT2_FORM, LLAMA_FORM, gpt_config, randomize

CORPUS = Path(__file__).with_name("corpus")  # by parser, inputs that once reached code which no seed does


class Target(NamedTuple):
    """A file of this name gets the content; then the folder that it is in is parsed."""

    file: str
    seeds: list[bytes]
    parse: Callable[[Path], object]


class Parser(NamedTuple):
    targets: list[Target]
    others: dict[str, bytes]  # files that lie in the folder too


# ---- the parsers -----------------------------------------------------------------------------------------------------


def sources() -> Parser:
    files = [SourceFile(path="unused")]
    corpus = CorpusSource(files=files)
    split = CorpusSource(files=files, strip="gutenberg", document_separator="\n\n\n")
    messages = MessagesSource(files=files, labels=["ham", "spam"], split="split")
    unquoted = MessagesSource(files=files, labels=["ham", "spam"], format="tsv")
    plain = MessagesSource(files=files, labels=["ham", "spam"], skip_invalid=True)
    pairs = InstructionsSource(files=files, task="kind")

    def target(file: str, section: CorpusSource | MessagesSource | InstructionsSource, *seeds: bytes) -> Target:
        def parse(folder: Path) -> None:
            with contextlib.redirect_stderr(io.StringIO()):  # which tells that nothing is pinned
                archive = ".zip" in file or ".tar" in file
            found = fetch(SourceFile(path=str(folder / file), member="*" if archive else None), folder)
            write_records(section, found, folder / "written")

        return Target(file, list(seeds), parse)

    text = "\ufeffGrüße,\r\n\r\rsaid 太郎.\u2028\n\n\n ok 😀".encode()
    book = b"x\n*** START OF THIS PROJECT GUTENBERG EBOOK A ***\nOnce.\n\n\n\nTwice.\nEnd of Project Gutenberg"
    rows = [{"text": 'Hi, "you"\n', "label": "ham", "split": "train"}, {"text": "WIN", "label": "spam", "split": "val"}]
    listed = json.dumps(rows, indent=1).encode()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    table = b'text,label,split\r\n"Hi, ""you""\nthere",ham,train\nWIN,spam,test\n'
    pair = (
        b'[{"instruction": "a", "input": "1", "output": 3, "kind": 1}, {"instruction": "b", "output": "c", "kind": ""}]'
    )
    parquet, archive = io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet, compression="none")
    for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(archive, "a", packing) as file:
            file.writestr(f"{packing}.txt", text)
    return Parser(
        [
            target("a.txt", corpus, text),
            target("b.txt", split, book),
            target("a.csv", messages, table),
            target("a.tsv", messages, table.replace(b", ", b" ").replace(b",", b"\t")),
            target("SMS", unquoted, b'ham\t"Hi\nspam\tWIN, a\tb\n'),
            target("a.jsonl", messages, lines),
            target("a.json", messages, listed, lines),
            target("b.json", pairs, pair),
            target("a.parquet", messages, parquet.getvalue()),
            target("a.txt.gz", corpus, gzip.compress(text, mtime=0)),
            target("a.txt.zst", corpus, pyarrow.compress(text, "zstd", asbytes=True)),
            target("a.zip", corpus, archive.getvalue()),
            target("b", plain, b'ham;"Hi"\nspam;WIN, now\n', lines, b"sep=|\ntext|label|split\na|ham|dev\n"),
            target("a.log", corpus, text, "Grüße\n".encode("utf-16"), "Ja\n".encode("utf-16-le"), listed),
            target("a.txt.bz2", corpus, bz2.compress(text)),
            target("a.txt.xz", corpus, lzma.compress(text)),
            target("a.tar", corpus, tarred(text)),
        ],
        {},
    )


def tarred(text: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("a.txt", "b.md"):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    return buffer.getvalue()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


TOKENIZER = Tokenizer(  # small inputs are fast, and most of their bytes matter
    [*(bytes([byte]) for byte in (97, 98, 32, 195, 169)), b"ab", b" a", "é".encode()],
    GPT2_PATTERN,
    {"<|endoftext|>": 8, "<|im_start|>": 9, "<|im_end|>": 10},
)


def tiny_model(form: dict[str, Any]) -> Checkpoint:
    sizes = {"vocab_size": 11, "emb_dim": 4, "n_heads": 2, "n_kv_heads": 2, "head_dim": 2, "ffn_dim": 4, "n_layers": 1}
    config = gpt_config(**form | sizes)
    model = randomize(GPT(config))
    assert isinstance(model, GPT)
    return Checkpoint(model, TOKENIZER, CheckpointConfig(kind="base", gpt=config))


def model_folder() -> Parser:
    """Ours: config.json and model.safetensors."""
    with tempfile.TemporaryDirectory() as name:
        save_checkpoint(Path(name, "it"), tiny_model(LLAMA_FORM))
        files = files_of(Path(name, "it"))

    def parse(folder: Path) -> None:
        load_checkpoint(folder, dtype=None)

    return Parser([Target(file, [files[file]], parse) for file in ("config.json", "model.safetensors")], files)


def exported(form: dict[str, Any]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        export_hf(tiny_model(form), Path(name, "it"))
        return files_of(Path(name, "it"))


def inside(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def transformers_folder() -> Parser:
    """Another tool's: config.json, and weights in one file or in several."""
    llama, gpt2 = exported(LLAMA_FORM), exported(GPT2_FORM)
    scaled = json.loads(llama["config.json"]) | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    index = json.dumps({"weight_map": dict.fromkeys(load(llama["model.safetensors"]), "a.safetensors")}).encode()
    shards = {name: content for name, content in llama.items() if name != "model.safetensors"}
    shards |= {"a.safetensors": llama["model.safetensors"], "model.safetensors.index.json": index}

    def target(file: str, *seeds: bytes) -> Target:
        return Target(file, list(seeds), lambda folder: import_model(str((folder / file).parent)))

    return Parser(
        [
            target("llama/config.json", llama["config.json"], json.dumps(scaled).encode()),
            target("llama/model.safetensors", llama["model.safetensors"]),
            target("gpt2/config.json", gpt2["config.json"]),
            target("shards/model.safetensors.index.json", index),
        ],
        inside("llama", llama) | inside("gpt2", gpt2) | inside("shards", shards),
    )


def tokenizer_json() -> Parser:
    """Hugging Face's tokenizer.json and the files beside it; GPT-2's two files.

    A foreign chat template is rendered in a process of its own, where nothing searches: once for each is enough.
    """
    answers: dict[str, str | None] = {}

    def render_once(source: str, question: str, names: Mapping[str, str]) -> str | None:
        key = json.dumps([source, question, dict(names)])
        if key not in answers:
            answers[key] = render_untrusted(source, question, names)
        return answers[key]

    files = exported(LLAMA_FORM)
    model = json.loads(files["tokenizer.json"])["model"]
    plain = {name: number for name, number in model["vocab"].items() if name not in TOKENIZER.special_tokens}
    vocab = json.dumps(plain | {TOKENIZER.eot_token: TOKENIZER.eot}).encode()
    merges = ("#version: 0.2\n" + "".join(merge + "\n" for merge in model["merges"])).encode()
    template = b"{% for message in messages %}<|im_start|>{{ message['role'] }}{{ message['content'] }}{% endfor %}"

    def target(file: str, seed: bytes) -> Target:
        def parse(folder: Path) -> None:
            with unittest.mock.patch("llm.tokenizer.build.render_untrusted", render_once):
                read_tokenizer_json((folder / file).parent)

        return Target(file, [seed], parse)

    return Parser(
        [
            target("it/tokenizer.json", files["tokenizer.json"]),
            target("it/tokenizer_config.json", files["tokenizer_config.json"]),
            target("it/special_tokens_map.json", b'{"eos_token": {"content": "<|im_end|>"}, "bos_token": null}'),
            target("it/generation_config.json", files["generation_config.json"]),
            target("it/chat_template.jinja", template),
            target("gpt2/vocab.json", vocab),
            target("gpt2/merges.txt", merges),
        ],
        inside("it", files) | inside("gpt2", {"vocab.json": vocab, "merges.txt": merges}),
    )


def bpe_json() -> Parser:
    """Our own tokenizer."""
    with tempfile.TemporaryDirectory() as name:
        TOKENIZER.save(Path(name))
        content = Path(name, FILE_NAME).read_bytes()
    return Parser([Target(FILE_NAME, [content], Tokenizer.load)], {})


def gguf() -> Parser:
    seeds = []
    for form in (LLAMA_FORM, GPT2_FORM):
        with tempfile.TemporaryDirectory() as name:
            export_gguf(tiny_model(form), Path(name, "it.gguf"), "f16")
            seeds.append(Path(name, "it.gguf").read_bytes())
    return Parser([Target("it.gguf", seeds, lambda folder: read_gguf(folder / "it.gguf", None))], {})


def training_state() -> Parser:
    """Its parser refuses nothing: a damaged state is passed over with a message."""
    state = Path("step-00000007")
    with tempfile.TemporaryDirectory() as name:
        save_state(Path(name), 7, {"a": torch.ones(2, 3), "b": torch.tensor(1)}, {"step": 7, "losses": [0.5]})
        files = {str(state / file): content for file, content in files_of(Path(name) / state).items()}

    def parse(folder: Path) -> None:
        with unittest.mock.patch.object(logging.getLogger("llm"), "warning") as warning:
            found = load_state(folder)
        assert (found is None) == (warning.call_count == 1)

    return Parser([Target(file, [content], parse) for file, content in files.items()], files)


PARSERS: dict[str, Callable[[], Parser]] = {
    parser.__name__.replace("_", "-"): parser
    for parser in (
        sources,
        gguf,
        model_folder,
        transformers_folder,
        tokenizer_json,
        bpe_json,
        training_state,
    )
}


# ---- one execution ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def prepared(parser: Parser) -> Iterator[Callable[[bytes], bool]]:
    """A function that says whether the parser takes an input, and raises what must not be raised."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in parser.others.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(content)

        def execute(data: bytes) -> bool:
            target = parser.targets[data[0] % len(parser.targets)] if data else parser.targets[0]
            (folder / target.file).write_bytes(data[1:])
            try:
                target.parse(folder)
                return True
            except InputError as error:
                assert str(error).isprintable(), f"not one line: {error}"
                return False
            finally:
                if target.file in parser.others:
                    (folder / target.file).write_bytes(parser.others[target.file])
                else:
                    (folder / target.file).unlink()

        yield execute


def seeds(parser: Parser) -> list[bytes]:
    return [bytes([i]) + seed for i, target in enumerate(parser.targets) for seed in target.seeds]


def kept(name: str) -> list[Path]:
    return sorted((CORPUS / name).glob("*"))


TOKEN = re.compile(rb'-?\d+(\.\d+)?|"[^"]*"|true|false|null')
VALUES = [
    *(b"\0", b"\xff", b"\n", b"\r", b"\x1b", b'"', b"\\", b"\xed\xa0\x80", b"\xff" * 7 + b"\x7f", b"\xff" * 4),
    *(b"{", b"[", b"{}", b"[]", b'""', b"null", b"true", b"-1", b"0", b"1.5", b"1e999", b"NaN", b"1000000000"),
    *(b"9" * 20, b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b'"\\ud800"', b"../", b"#"),
]


def mutated(data: bytes, chooser: random.Random) -> bytes:
    """Another input for the same target: changed in one to six places as a fuzzer without feedback does it."""
    content = bytearray(data[1:])
    for _ in range(chooser.choice([1, 1, 1, 2, 3, 6])):
        start = chooser.randrange(len(content) + 1)
        end = start + chooser.choice([0, 1, 1, 2, 4, 8, 50, 300])
        part = bytes(content[start:end])
        words = list(TOKEN.finditer(content))
        kind = chooser.choice(["bit", "cut", "remove", "repeat", "insert", "move", "word", "word"])
        if kind == "bit" and part:
            content[start] ^= 1 << chooser.randrange(8)
        elif kind == "cut":
            del content[start:]
        elif kind == "remove":
            del content[start:end]
        elif kind == "repeat":
            content[start:start] = part * chooser.choice([1, 2, 20])
        elif kind == "insert":
            content[start:end] = chooser.choice(VALUES)
        elif kind == "move" and content:
            at = chooser.randrange(len(content))
            content[at : at + len(part)] = part
        elif kind == "word" and words:
            old, new = chooser.choice(words), chooser.choice([*VALUES, chooser.choice(words).group()])
            content[old.start() : old.end()] = new
    return data[:1] + bytes(content)
