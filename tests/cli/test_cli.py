"""`python -m llm` on tiny random model folders: answers on stdout, errors as one line, exit statuses."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import llm
from llm.checkpoint.adapter import save_trained
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, load_checkpoint, save_checkpoint
from llm.cli.main import build_parser, main
from llm.common.errors import InputError
from llm.common.sanitize import CONTROLS, visible
from llm.inference.classify import classify_texts
from llm.inference.generate import generate
from llm.inference.sampling import Sampling
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.prompts import encode_prompt
from llm.training.freeze import freeze
from tests.helpers import LLAMA_FORM, SHIPPED_FORM, gpt_config, randomize, train_params

ROOT = Path(__file__).resolve().parents[2]
TEXT = "One morning the baker sold bread at the harbour. It was cold, and the café was closed.\n"


class Folders(NamedTuple):
    base: Path
    classifier: Path
    instruct: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    path = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.train([TEXT] * 5, vocab_size=300)
    gpt = gpt_config(**SHIPPED_FORM, vocab_size=tokenizer.vocab_size, context_length=256, emb_dim=32, head_dim=8)
    models: list[GPT | GPTClassifier] = [GPT(gpt), GPTClassifier(GPT(gpt), 2), GPT(gpt)]
    configs = [
        CheckpointConfig(kind="base", gpt=gpt),
        CheckpointConfig(kind="classifier", gpt=gpt, labels=["ham", "spam"], max_length=16),
        CheckpointConfig(kind="instruct", gpt=gpt, template="alpaca"),
    ]
    for model, config in zip(models, configs, strict=True):
        randomize(model)  # far from uniform: answers differ
        save_checkpoint(path / config.kind, Checkpoint(model, tokenizer, config))
    return Folders(path / "base", path / "classifier", path / "instruct")


class Result(NamedTuple):
    status: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    def run(*argv: str | Path, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = main([str(argument) for argument in argv])
        return Result(status, *capsys.readouterr())

    return run


# ---- generate --------------------------------------------------------------------------------------------------------


def test_generate_prints_prompt_and_continuation(cli: Cli, folders: Folders) -> None:
    model, tokenizer, _ = load_checkpoint(folders.base)
    prompt = "One morning, a café"
    sampling = Sampling(repetition_penalty=1.2, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01)
    assert isinstance(model, GPT)
    [ids] = generate(
        model, [tokenizer.encode(prompt)], max_new_tokens=90, sampling=sampling, seed=5, stop={tokenizer.eot}
    )
    options = {"max_new_tokens": 90, "seed": 5, **vars(sampling)}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    result = cli("generate", folders.base, "--prompt", prompt, *flags)
    assert result == (0, prompt + visible(tokenizer.decode(ids)) + "\n", "")
    assert len(ids) > 10


def test_generate_is_greedy_by_default_and_seeded(cli: Cli, folders: Folders) -> None:
    command = ["generate", folders.base, "--prompt", "One", "--max-new-tokens", "20"]
    assert cli(*command).out == cli(*command, "--temperature", "0", "--seed", "9").out
    warm = [*command, "--temperature", "1.5", "--seed"]
    assert cli(*warm, "1").out == cli(*warm, "1").out != cli(*warm, "2").out


def test_control_characters_are_made_visible(cli: Cli, folders: Folders, tmp_path: Path) -> None:
    evil = "\x1b]0;title\x07\x9b2J\u202e"
    result = cli("generate", folders.base, "--prompt", f"One{evil}", "--max-new-tokens", "0")
    assert result.out == "One\ufffd]0;title\ufffd\ufffd2J\ufffd\n"
    result = cli("classify", folders.classifier, evil)
    assert json.loads(result.out)["text"] == evil
    assert not CONTROLS.search(result.out)
    result = cli("generate", tmp_path / evil, "--prompt", "One")
    assert result.status == 1 and r"\x1b]0;title\x07\x9b2J\u202e: not a model folder" in result.err
    assert not CONTROLS.search(result.err)


def test_generate_continues_the_raw_prompt_of_an_instruct_model(cli: Cli, folders: Folders) -> None:
    model, tokenizer, _ = load_checkpoint(folders.instruct)
    assert isinstance(model, GPT)
    [ids] = generate(model, [tokenizer.encode("It was")], max_new_tokens=12, stop={tokenizer.eot})
    result = cli("generate", folders.instruct, "--prompt", "It was", "--max-new-tokens", "12")
    assert result.out == "It was" + visible(tokenizer.decode(ids)) + "\n"


def test_prompt_longer_than_the_context_is_told_on_stderr(cli: Cli, folders: Folders) -> None:
    prompt = TEXT * 60
    result = cli("generate", folders.base, "--prompt", prompt, "--max-new-tokens", "3")
    assert result.status == 0
    assert result.out.startswith(prompt)
    assert result.err.endswith("tokens, the model reads the last 256\n")


# ---- chat ------------------------------------------------------------------------------------------------------------


def test_chat_answers_each_line_with_the_template(cli: Cli, folders: Folders) -> None:
    model, tokenizer, config = load_checkpoint(folders.instruct)
    assert isinstance(model, GPT) and config.template is not None
    expected = []
    for instruction in ("Name a trade.", "Où est le café ?"):
        prompt = encode_prompt(tokenizer, config.template, instruction, "the baker")
        [ids] = generate(model, [prompt], max_new_tokens=9, stop={tokenizer.eot})
        expected.append(visible(tokenizer.decode(ids)) + "\n")
    stdin = "Name a trade.\r\n\n  \nOù est le café ?".encode()
    result = cli("chat", folders.instruct, "--input", "the baker", "--max-new-tokens", "9", stdin=stdin)
    assert result == (0, "".join(expected), "")
    assert len(set(expected)) == 2


def test_chat_without_input_prints_nothing(cli: Cli, folders: Folders) -> None:
    assert cli("chat", folders.instruct) == (0, "", "")


def test_chat_in_a_terminal(folders: Folders) -> None:
    """Ctrl-C ends an answer, the next instruction is answered, Ctrl-D ends the chat."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "llm", "chat", str(folders.instruct), "--max-new-tokens", "100000000"]
    env = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=env, preexec_fn=heed_interrupts
    )
    os.close(theirs)
    try:
        assert arrives(ours, b"> ")
        for instruction in (b"One", b"Two"):
            os.write(ours, instruction + b"\n")
            assert arrives(ours, instruction, at_least=200)
            process.send_signal(signal.SIGINT)
            assert arrives(ours, b"\n> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def heed_interrupts() -> None:
    """Tests that were started in the background of a shell ignore SIGINT, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def arrives(file: int, mark: bytes, at_least: int = 0) -> bool:
    """Reads from a terminal until `mark` came and `at_least` bytes behind it; False after a minute without."""
    seen, end = b"", time.monotonic() + 60
    while mark not in seen or len(seen) - seen.index(mark) < at_least:
        if time.monotonic() > end or not select.select([file], [], [], 60)[0]:
            return False
        seen += os.read(file, 4096).replace(b"\r\n", b"\n")
    return True


# ---- classify --------------------------------------------------------------------------------------------------------


def test_classify_prints_json_lines(cli: Cli, folders: Folders) -> None:
    texts = ["7 pm", 'the "café"', "-"]
    stdin = b"from stdin\n?\nthe last line without an end"
    result = cli("classify", folders.classifier, *texts, stdin=stdin)
    assert (result.status, result.err) == (0, "")
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [row["text"] for row in rows] == [*texts[:2], "from stdin", "?", "the last line without an end"]
    probabilities = classify_texts(load_checkpoint(folders.classifier), [row["text"] for row in rows])
    for row, (ham, spam) in zip(rows, probabilities.tolist(), strict=True):
        assert list(row) == ["text", "label", "probabilities"]
        assert row["probabilities"] == pytest.approx({"ham": ham, "spam": spam}, abs=1e-6)
        assert row["label"] == ("ham" if ham > spam else "spam")
    assert len({row["label"] for row in rows}) == 2
    assert "café" in result.out  # readable, not escaped


@pytest.mark.parametrize("text", ["", "  \t ", "\u200b\u200d", "\x07", "\ufffd\ufffd", "\xa0"])
def test_text_with_nothing_to_label_is_unsure(cli: Cli, folders: Folders, text: str) -> None:
    result = cli("classify", folders.classifier, text, "7 pm")
    first, second = map(json.loads, result.out.splitlines())
    expected = {"text": text, "label": "unsure", "probabilities": None, "doubt": "no letter, digit or sign"}
    assert (result.status, first) == (0, expected)
    assert second["label"] in ("ham", "spam") and "doubt" not in second
    model = llm.load(folders.classifier, device="cpu")
    with pytest.raises(InputError, match=r"texts\[1\]: no letter, digit or sign to label, found .*; leave it out"):
        model.classify(["7 pm", text])


def test_classify_reads_files_by_name_and_keeps_their_columns(cli: Cli, folders: Folders, tmp_path: Path) -> None:
    texts = ["7 pm", 'the "café",\nof course', ""]
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbfid,text,label\n1,7 pm,ham\n2,"the ""caf\xc3\xa9"",\nof course",\n3,,spam\n'
    )
    (tmp_path / "a.tsv").write_text('id\ttext\tlabel\n1\t7 pm\tham\n2\t"the ""café"",\nof course"\t\n3\t\tspam\n')
    rows = [{"id": i, "text": text, "label": "ham"} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    expected = [json.loads(line) for line in cli("classify", folders.classifier, *texts).out.splitlines()]
    for name in ("a.csv", "a.tsv", "a.jsonl"):
        result = cli("classify", folders.classifier, tmp_path / name)
        found = [json.loads(line) for line in result.out.splitlines()]
        assert (result.status, result.err) == (0, ""), name
        assert [list(row)[:3] for row in found] == [["id", "text", "given_label"]] * 3
        for row, wanted in zip(found, expected, strict=True):
            assert {key: row.get(key) for key in ("text", "label", "doubt")} == {
                key: wanted.get(key) for key in ("text", "label", "doubt")
            }
            assert (row["probabilities"] is None) == (wanted["probabilities"] is None)
    (tmp_path / "a.txt").write_text("7 pm\r\n\nlast")
    found = [
        json.loads(line)["text"] for line in cli("classify", folders.classifier, tmp_path / "a.txt").out.splitlines()
    ]
    assert found == ["7 pm", "", "last"]
    assert json.loads(cli("classify", folders.classifier, "see a.txt").out)["text"] == "see a.txt", "a text, no file"


def test_classify_writes_csv_and_json_lines_files(cli: Cli, folders: Folders, tmp_path: Path) -> None:
    lines = [f"message {i}" for i in range(70)]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"body": line}) + "\n" for line in [*lines, ""]))
    command = ["classify", folders.classifier, source, "--column", "body", "--out"]
    for out in (tmp_path / "out.csv", tmp_path / "out.jsonl"):
        assert cli(*command, out) == (0, "", "")
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert list(table[0]) == ["body", "label", "probability_ham", "probability_spam", "doubt"]
    assert [row["body"] for row in table] == [row["body"] for row in rows] == [*lines, ""]
    assert [row["label"] for row in table] == [row["label"] for row in rows]
    assert [float(row["probability_ham"]) for row in table[:-1]] == [row["probabilities"]["ham"] for row in rows[:-1]]
    assert table[-1]["label"] == "unsure" and table[-1]["probability_ham"] == "" and table[-1]["doubt"]
    assert cli("classify", folders.classifier, "7 pm", "--format", "csv").out.splitlines()[0].startswith("text,label,")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"id,body\n1,a\n", (), r"a.csv, line 2: no column 'text' \(found id, body\); name the one .* by --column"),
        (b"text\na\n", ("--column", "body"), r"no column 'body' \(found text\)"),
        (b"text,id\na\n", (), r"a.csv, line 2: expected 2 columns as in line 1, got 1"),
        (b'text\n"a\n', (), r"a.csv, line 2: not valid CSV"),
        (b"text\n\xe9\n", (), r"a.csv, line 2: not valid UTF-8"),
        (b"text,text\na,b\n", (), r"a.csv, line 1: expected different column names"),
        (b"text\n", (), r"a.csv: no row to read"),
        (b"", (), r"a.csv: no row to read"),
        (b"text\na\n", ("--out", "out.xlsx"), r"out.xlsx: expected a name that ends in .csv or .jsonl"),
        (b"text\na\n", ("--out", "a.csv"), r"a.csv: the input itself"),
        (b"text\na\n", ("b.csv",), r"b.csv: no such file"),
        (b"text\na\n", ("c.xlsx",), r"c.xlsx: expected a file that ends in .csv .tsv .jsonl .txt, got .xlsx"),
    ],
)
def test_bad_files_are_one_line_and_leave_nothing(
    cli: Cli,
    folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_bytes(content)
    Path("c.xlsx").write_bytes(b"PK")
    before = sorted(Path().iterdir())
    out = () if "--out" in options else ("--out", "out.csv")
    result = cli("classify", folders.classifier, "a.csv", *options, *out)
    assert result.status == 1 and re.search(message, result.err) and result.err.count("\n") == 1
    assert sorted(Path().iterdir()) == before and Path("a.csv").read_bytes() == content


@pytest.mark.parametrize("line", ['"a"', "[1", '{"text": "\\ud800"}', '{"text": ["a"]}', "{}"])
def test_bad_json_lines_are_one_line(cli: Cli, folders: Folders, tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    result = cli("classify", folders.classifier, tmp_path / "a.jsonl")
    assert result.status == 1 and "a.jsonl, line 2: " in result.err and result.err.count("\n") == 1


def test_classify_many_lines(cli: Cli, folders: Folders) -> None:
    lines = [f"message {i}" for i in range(70)]
    result = cli("classify", folders.classifier, "-", stdin="\n".join(lines).encode())
    assert [json.loads(line)["text"] for line in result.out.splitlines()] == lines


# ---- score -----------------------------------------------------------------------------------------------------------


def naive_nats(folder: Path, ids: list[int]) -> float:
    """Nats of a text that fits into the context."""
    model, _, _ = load_checkpoint(folder)
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids]))[0].log_softmax(-1)
    return -sum(float(log_probabilities[t, token]) for t, token in enumerate(ids[1:]))


@pytest.mark.parametrize("kind", ["base", "instruct"])
def test_score(cli: Cli, folders: Folders, tmp_path: Path, kind: str) -> None:
    folder = folders.base.parent / kind
    text = "One café\r\nwas closed."
    ids = Tokenizer.load(folder).encode(text)
    assert 2 < len(ids) <= 256
    nats = naive_nats(folder, ids)
    file = tmp_path / "text.txt"
    file.write_bytes(text.encode())
    result = cli("score", folder, file)
    assert (result.status, result.err) == (0, "")
    n_bytes = len(text) + 1  # é takes two bytes, and the file is read as it is
    assert json.loads(result.out) == pytest.approx(
        {
            "tokens": len(ids) - 1,
            "bytes": n_bytes,
            "loss": nats / (len(ids) - 1),
            "perplexity": math.exp(nats / (len(ids) - 1)),
            "bpb": nats / math.log(2) / n_bytes,
        },
        rel=1e-4,
    )
    assert cli("score", folder, "-", stdin=text.encode()).out == result.out


def test_score_of_a_long_text_counts_every_token_but_the_first(cli: Cli, folders: Folders) -> None:
    text = TEXT * 100
    values = json.loads(cli("score", folders.base, "-", stdin=text.encode()).out)
    assert values["tokens"] == len(Tokenizer.load(folders.base).encode(text)) - 1
    assert values["bytes"] == len(text.encode())
    assert values["bpb"] == pytest.approx(values["loss"] * values["tokens"] / math.log(2) / values["bytes"])


# ---- import and export -----------------------------------------------------------------------------------------------


def saved(path: Path, tokenizer: Tokenizer, kind: str, template: str | None = None, system: str | None = None) -> Path:
    """A model folder of a form that other tools know."""
    form = LLAMA_FORM | {"vocab_size": tokenizer.vocab_size + 2, "context_length": 128}
    model = randomize(GPT(gpt_config(**form))).to(torch.bfloat16)
    assert isinstance(model, GPT)
    config = CheckpointConfig(kind=kind, gpt=model.config, template=template, system=system)  # type: ignore[arg-type]
    save_checkpoint(path, Checkpoint(model, tokenizer, config))
    return path


def test_export_and_import_for_transformers(cli: Cli, folders: Folders, tmp_path: Path) -> None:
    ours = saved(tmp_path / "ours", Tokenizer.load(folders.base), "instruct", "chatml", "Be brief.")
    result = cli("export", ours, tmp_path / "theirs", "--format", "hf")
    assert result == (0, "", f"{tmp_path / 'theirs'}: written\n")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == "llama"

    result = cli("import", tmp_path / "theirs", tmp_path / "again")
    n = sum(p.numel() for p in load_checkpoint(ours).model.parameters())
    assert result == (0, "", f"{tmp_path / 'again'}: llama, {n:,} parameters, bfloat16, template chatml\n")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (ours / name).read_bytes()
    assert cli("export", ours, tmp_path / "theirs", "--format", "hf").status == 0  # a model may be written again


@pytest.mark.parametrize("dtype", [None, "f32"])
def test_export_and_import_of_gguf(cli: Cli, folders: Folders, tmp_path: Path, dtype: str | None) -> None:
    pytest.importorskip("gguf")
    ours = saved(tmp_path / "ours", Tokenizer.load(folders.base), "base")
    options = ["--dtype", dtype] if dtype else []
    assert cli("export", ours, tmp_path / "model.gguf", "--format", "gguf", *options).status == 0
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"
    result = cli("import", tmp_path / "model.gguf", tmp_path / "again")
    assert (result.status, result.out) == (0, "")
    again = load_checkpoint(tmp_path / "again", dtype=None).model.state_dict()
    assert again["blocks.0.attn.q_proj.weight"].dtype == (torch.float32 if dtype else torch.float16)
    for name, tensor in load_checkpoint(ours).model.state_dict().items():
        assert torch.allclose(tensor, again[name].float(), atol=1e-3), name


def test_export_of_an_adapter(cli: Cli, folders: Folders, tmp_path: Path) -> None:
    content = load_checkpoint(saved(tmp_path / "ours", Tokenizer.load(folders.base), "base"))
    params = train_params(trainable="lora")
    freeze(content.model, params)
    save_trained(tmp_path / "tuned", content, params)
    for options, base in (([], None), (["--base", "org/name"], "org/name")):
        result = cli("export", tmp_path / "tuned", tmp_path / "peft", "--format", "peft", *options)
        assert result == (0, "", f"{tmp_path / 'peft'}: written\n")
        values = json.loads((tmp_path / "peft/adapter_config.json").read_text())
        assert (values["base_model_name_or_path"], values["r"]) == (base, 2)


def test_import_of_a_base_with_an_adapter(cli: Cli, folders: Folders, tmp_path: Path) -> None:
    content = load_checkpoint(saved(tmp_path / "ours", Tokenizer.load(folders.base), "base"))
    params = train_params(trainable="lora")
    freeze(content.model, params)
    for name, tensor in content.model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(tensor)
    save_trained(tmp_path / "tuned", content, params)
    adapter = tmp_path / "tuned" / "adapter"
    result = cli("import", tmp_path / "ours", tmp_path / "again", "--adapter", adapter)
    assert (result.status, result.out) == (0, "")
    weights = [load_checkpoint(tmp_path / name).model.state_dict() for name in ("ours", "tuned", "again")]
    for name, tensor in weights[2].items():  # in the dtype of the base, bf16
        torch.testing.assert_close(tensor, weights[1][name], rtol=0.02, atol=0.02)
    assert not torch.allclose(weights[2]["blocks.0.attn.q_proj.weight"], weights[0]["blocks.0.attn.q_proj.weight"])
    result = cli("import", folders.base, tmp_path / "other", "--adapter", adapter)
    assert (result.status, result.out) == (1, "") and "another base model" in result.err
    assert not (tmp_path / "other").exists()


def test_bos_token_precedes_the_prompt(cli: Cli, folders: Folders, tmp_path: Path) -> None:
    plain = Tokenizer.load(folders.base)
    tokenizer = Tokenizer(plain.ranks, plain.pattern, plain.special_tokens, bos_token="<|im_start|>")
    folder = saved(tmp_path / "begin", tokenizer, "base")
    model = load_checkpoint(folder).model
    assert isinstance(model, GPT) and tokenizer.bos is not None
    ids = tokenizer.encode("One morning")
    with_begin, without = generate(model, [[tokenizer.bos, *ids], ids], max_new_tokens=15, stop={tokenizer.eot})
    assert with_begin != without
    result = cli("generate", folder, "--prompt", "One morning", "--max-new-tokens", "15")
    assert result.out == "One morning" + visible(tokenizer.decode(with_begin)) + "\n"


def test_chat_uses_the_system_prompt_and_all_stop_tokens(
    cli: Cli, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.load(folders.base)
    folder = saved(tmp_path / "it", tokenizer, "instruct", "chatml", "Be brief.")
    asked: list[tuple[list[int], set[int]]] = []

    def stream(model: GPT, prompt: list[int], *, stop: set[int], **options: object) -> list[int]:
        asked.append((prompt, stop))
        return []

    monkeypatch.setattr("llm.api.stream", stream)
    cli("chat", folder, stdin=b"Name a trade.")
    cli("generate", folders.base, "--prompt", "One")
    ends = {tokenizer.special_tokens[name] for name in ("<|im_end|>", "<|endoftext|>")}
    assert asked == [
        (encode_prompt(tokenizer, "chatml", "Name a trade.", system="Be brief."), ends),
        (tokenizer.encode("One"), {tokenizer.eot}),
    ]


@pytest.mark.skipif(shutil.which("g++") is None, reason="the kernel needs g++")
def test_weights_of_4_bits_nearly_keep_the_score(cli: Cli, folders: Folders, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One morning the baker sold bread.")
    exact, rounded = (json.loads(cli("score", folders.base, text, *option).out) for option in ((), ("--int4",)))
    assert exact["tokens"] == rounded["tokens"]
    assert 0 < abs(exact["bpb"] - rounded["bpb"]) < 0.05 * exact["bpb"]
    assert cli("generate", folders.base, "--prompt", "One", "--int4").out.startswith("One")
    with pytest.raises(SystemExit):  # two roundings of the same weights
        cli("score", folders.base, text, "--int4", "--int8")


def test_draft_and_compilation_keep_greedy_text_and_int8_nearly_the_score(
    cli: Cli, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare greedy texts, and bits per byte with weights of 8 bits."""
    plain = cli("generate", folders.base, "--prompt", "One")
    for draft in (folders.base, "prompt"):
        assert cli("generate", folders.base, "--prompt", "One", "--draft", draft).out == plain.out
    for option in ("--int8", "--int8-cache"):
        assert cli("generate", folders.base, "--prompt", "One", option).out.startswith("One")
    compiled: list[object] = []
    monkeypatch.setattr("llm.inference.compiled.CompiledDecoder", lambda model: compiled.append(model) or model)
    found = cli("generate", folders.base, "--prompt", "One", "--draft", folders.base, "--compile")
    assert (found.out, found.err) == (plain.out, "compiling the step of a token\n") and len(compiled) == 2
    text = tmp_path / "text.txt"
    text.write_text("One morning the baker sold bread.")
    exact, rounded = (json.loads(cli("score", folders.base, text, *option).out) for option in ((), ("--int8",)))
    assert exact["tokens"] == rounded["tokens"]
    assert 0 < abs(exact["bpb"] - rounded["bpb"]) < 0.01 * exact["bpb"]
    other = saved(tmp_path / "other", Tokenizer.train(["other words"], vocab_size=264), "base")
    refused = cli("generate", folders.base, "--prompt", "One", "--draft", other)
    assert refused.status == 1 and refused.out == ""
    said = f"{other}: the draft has another tokenizer than {folders.base}; choose one that shares it"
    assert refused.err == f"python -m llm generate: {said}\n"


def test_interrupt_ends_with_130(cli: Cli, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llm.api.load_checkpoint", interrupted)
    assert cli("generate", folders.base, "--prompt", "One").status == 130


# ---- device and messages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate --prompt One", "chat", "classify text", "score text.txt"])
def test_device_option_reaches_the_model(
    cli: Cli, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    name, *rest = command.split()
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("One morning.")
    model_dir = {"chat": folders.instruct, "classify": folders.classifier}.get(name, folders.base)
    asked: list[str] = []
    monkeypatch.setattr("llm.api.pick_device", lambda name: asked.append(name) or torch.device("cpu"))
    for options in ((), ("--device", "cuda")):
        assert cli(name, model_dir, *rest, *options, stdin=b"").status == 0
    assert asked == ["auto", "cuda"]


def test_device_that_is_not_there_is_one_line(cli: Cli, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    result = cli("generate", folders.base, "--prompt", "One", "--device", "cuda")
    said = "device: not available here (expected auto, cpu, got cuda); change --device or runtime.device"
    assert result == (1, "", f"python -m llm generate: {said}\n")


def test_quiet_and_verbose_select_messages(cli: Cli, folders: Folders, tmp_path: Path) -> None:
    model = saved(tmp_path / "ours", Tokenizer.load(folders.base), "base")
    export = ["export", model, tmp_path / "theirs", "--format", "hf"]
    assert cli(*export).err == f"{tmp_path / 'theirs'}: written\n"
    assert cli(*export, "-q") == (0, "", "")
    assert cli(*export, "-v").err.endswith(f" INFO {tmp_path / 'theirs'}: written\n")


def test_quiet_counts_before_and_after_the_kind_of_a_benchmark() -> None:
    for words in (["bench", "-q", "train"], ["bench", "train", "-q"]):
        assert build_parser().parse_args(words).log_level == "warning"


def test_log_level_of_the_environment_is_checked(cli: Cli, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_LOG_LEVEL", "loud")
    result = cli("generate", folders.base, "--prompt", "One")
    assert (result.status, result.out) == (1, "") and "generate: LLM_LOG_LEVEL: no such level" in result.err


# ---- the real process ------------------------------------------------------------------------------------------------


def test_help_shows_examples_without_loading_torch() -> None:
    code = (
        "import io, sys\nfrom llm.cli.main import main\n"
        "for command in sys.argv[1:]:\n"
        "    sys.stdout = shown = io.StringIO()\n"
        "    try: main([*command.split(), '--help'])\n"
        "    except SystemExit as ended: assert ended.code == 0\n"
        "    assert f'examples:\\n  python -m llm {command}' in shown.getvalue(), command\n"
        "    assert 'torch' not in sys.modules, command\n"
    )
    kinds = [f"bench {kind}" for kind in ("tokenize", "train", "finetune", "generate", "learn", "scale")]
    commands = ["generate", "chat", "classify", "score", "compare", "import", "export", "bench", *kinds]
    subprocess.run([sys.executable, "-c", code, *commands], cwd=ROOT, check=True)


LATE = ("jinja2", "filelock", "llm.convert.hf", "llm.convert.gguf", "llm.inference.compiled")
NEVER = ("torch._dynamo", "torch._inductor", "sympy", "scipy", "sklearn", "pandas", "pyarrow", "transformers")
NEVER += ("matplotlib", "mlflow", "yaml", "requests", "huggingface_hub", "xllamacpp", "gguf")


def test_generating_imports_only_what_it_needs(folders: Folders) -> None:
    """The first token comes as soon as PyTorch is there."""
    code = "import sys; from llm.cli.main import main; main(sys.argv[1:]); print(*sys.modules, sep='\\n')"
    command = ["generate", str(folders.base), "--prompt", "One", "--max-new-tokens", "2"]
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines())
    assert "torch" in loaded and not loaded & {*LATE, *NEVER}


def test_closed_pipe_ends_with_141_and_output_is_utf8_in_any_locale(folders: Folders) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llm", "generate", str(folders.base), "--prompt", "café", "--max-new-tokens"]
    done = subprocess.run([*command, "2"], cwd=ROOT, capture_output=True, env=env, check=True)
    assert done.stdout.startswith("café".encode())
    process = subprocess.Popen(
        [*command, "100000000"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(10).startswith("café".encode())
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
