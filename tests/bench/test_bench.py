"""The benchmarks at a tiny size: who takes part, what counts, the table. No speed is asserted."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from llm.bench import gpu, learning, precisions, scaling, serving
from llm.bench.decoding import BYTES_PER_WEIGHT, FORMS, requests
from llm.bench.harness import OURS, Cost, Skipped, compare, draw, load_benchmark, markdown, memory, of_limit, serve
from llm.bench.learning import (
    FIRST_LR,
    NANOGPT,
    OURS_IN_FP32,
    TimeToLoss,
    TrainingResult,
    best_of_sweep,
    default_sizes,
    learn,
    our_recipe,
)
from llm.bench.models import Shape, check_shape, gpt_config, transformers_model
from llm.bench.scaling import ScalingSizes, law, recipes, scale
from llm.bench.tokenizing import (
    TokenizeSizes,
    read_documents,
    rustbpe_encoder,
    tiktoken_encoder,
    tokenize_ours,
    tokenizers_encoder,
)
from llm.cli.bench import APART, KINDS, SIZES, TRAININGS, shipped_params
from llm.cli.main import build_parser, main
from llm.common.errors import DivergenceError, InputError
from llm.config import GPTConfig, Params
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from tests.helpers import set_bf16_units

STORY = "The cat sat on the mat, number {}. 'Who's there?', it said;\n\nnobody was: \u00e9t\u00e9 2026.  Done."
TINY = Shape(layers=2, width=16, heads=2, vocab=50, context=16, batch=2, prompt=4, new=4)


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """Sizes for each benchmark."""
    text = tmp_path / "stories.txt"
    text.write_text("\n\n\n".join(STORY.format(i) for i in range(500)), encoding="utf-8")
    return {
        "tokenize": TokenizeSizes(megabytes=0.2, vocab=300, processes=2, text=str(text)),
        "train": TINY,
        "finetune": TINY,
        "generate": TINY._replace(width=32, vocab=300, context=64, batch=3, prompt=9, new=7),
    }


COMPILED = "transformers, compiled"
BENCHMARKS = [kind for kind in KINDS if kind not in (*TRAININGS, *APART)]


@pytest.mark.parametrize("kind", BENCHMARKS)
@pytest.mark.slow
def test_installed_implementations_run_in_rounds(
    kind: str, tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = load_benchmark(kind)
    names = [name for name in benchmark.implementations if "compiled" not in name]  # which would take a minute
    found = compare(benchmark, tiny[kind], rounds=2, least=0.0, only=names)
    assert set(found["results"]) >= {name for name in names if name not in ("litgpt", "the book")}
    said = capsys.readouterr().err.splitlines()
    for name, result in found["results"].items():
        assert len(result["rates"]) == 2 and min(result["rates"]) > 0
        assert result["median"] == pytest.approx(sum(result["rates"]) / 2)
        assert result["memory"] > (100 if kind != "tokenize" else 20) * 2**20, "torch or Python alone takes more"
        assert sum(line.startswith("round") and f" {name}: " in line for line in said) == 2
    for name in set(names) - set(found["results"]):
        assert sum(line.startswith(f"{name}: skipped, ") for line in said) == 1
    table = markdown(found)
    assert table.count("\n|") == 2 + len(found["results"]) and f"| {OURS} |" in table
    assert ("of the limit" in table) == (kind in ("train", "generate")) == (found["limits"] is not None)
    draw(found, tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 1000
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("kind", BENCHMARKS)
def test_workload_returns_its_amount_of_work(kind: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("decoding", "tokenizing"):  # their files are written here, for which no process is started
        monkeypatch.setattr(f"llm.bench.{module}.run_apart", lambda work, *arguments: work(*arguments))
    asked = sum(requests(tiny["generate"]).new)
    expected = {"tokenize": 0.2, "train": 2 * 16, "finetune": 2, "generate": asked}[kind]
    for name, make in load_benchmark(kind).implementations.items():
        if "compiled" in name:
            continue
        try:
            turn = make(tiny[kind])
        except ModuleNotFoundError:
            continue
        assert turn() == pytest.approx(expected, abs=0.05 if kind == "tokenize" else 0), name


def test_rows_of_a_batch_have_different_lengths() -> None:
    shape = TINY._replace(batch=50, prompt=9, new=6)
    prompts, new = requests(shape)
    assert {len(prompt) for prompt in prompts} == set(range(5, 10)) and set(new) == set(range(3, 7))
    assert requests(shape) == (prompts, new), "the same for every contestant"
    [prompt], [n] = requests(shape._replace(batch=1))
    assert (len(prompt), n) == (9, 6)


def test_transformers_is_compiled_if_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    calls: list[int] = []

    def compiled(forward: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            return forward(*arguments, **options)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    make = load_benchmark("generate").implementations[COMPILED]
    shape = TINY._replace(prompt=4, new=4)
    turn = make(shape)
    before = len(calls)
    assert turn() == sum(requests(shape).new)
    assert len(calls) - before == max(requests(shape).new), transformers.__version__

    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no C++ compiler\nmore about it")

    monkeypatch.setattr(torch, "compile", lambda forward: fails)
    with pytest.raises(Skipped, match=r"^torch.compile failed: no C\+\+ compiler$"):
        make(shape)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the kernels need g++")
def test_our_decoding_is_compiled_if_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    implementations = load_benchmark("generate").implementations
    ours = [make for name, make in implementations.items() if name.startswith(OURS) and "compiled" in name]
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr("llm.bench.decoding.CompiledDecoder", lambda model: compiled.append(model) or model)
    shape = TINY._replace(batch=1, width=32, prompt=4, new=4)
    assert [make(shape)() for make in ours] == [4] * 5 and len(compiled) == 5
    assert [make(shape._replace(batch=2))() for make in ours] == [sum(requests(shape._replace(batch=2)).new)] * 5

    def fails(model: torch.nn.Module) -> None:
        raise InputError("no compiler")

    monkeypatch.setattr("llm.bench.decoding.CompiledDecoder", fails)
    for make in ours:
        with pytest.raises(Skipped, match=r"^no compiler$"):
            make(shape)


def test_implementation_that_cannot_take_part_is_skipped_by_name(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizers.py").write_text('raise ModuleNotFoundError("none", name="tokenizers")')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ["rustbpe, one core", "tokenizers, one core"]
    found = compare(load_benchmark("tokenize"), tiny["tokenize"], 1, 0.0, only=names)
    assert list(found["results"]) == names[:1]
    assert capsys.readouterr().err.splitlines()[0] == "tokenizers, one core: skipped, no package tokenizers"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("transformers, continuous", "a single row is no batch"),
        ("llama.cpp, F32", "a GGUF file needs a vocabulary of 258"),
    ],
)
def test_process_of_an_implementation_says_why_it_takes_no_part(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which `serve` replaces
    serve(load_benchmark("generate"), name, list(TINY._replace(batch=1)))
    assert json.loads(capsys.readouterr().out) == reason


def test_forms_have_the_parameters_of_the_open_models() -> None:
    """GPT-2 124M and SmolLM2-135M have so many parameters."""
    expected = {"gpt2": 124_439_808, "llama": 134_515_008}
    for name, shape in FORMS.items():
        check_shape(shape)
        with torch.device("meta"):
            assert sum(p.numel() for p in GPT(gpt_config(shape)).parameters()) == expected[name]


def test_peers_encode_to_the_same_tokens(tiny: dict[str, Any]) -> None:
    documents = read_documents(Path(tiny["tokenize"].text))
    tokenizer = Tokenizer.train(documents, 300)
    expected = [tokenizer.encode(document) for document in documents]
    for encoder in (tiktoken_encoder, tokenizers_encoder, rustbpe_encoder):
        if encoder is tokenizers_encoder:
            pytest.importorskip("tokenizers")
        assert list(encoder(tokenizer, documents)(documents)) == expected, encoder.__name__


def test_our_workload_encodes_every_document_in_every_pass(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep the shards that a run removes: their tokens decode to all the text."""
    monkeypatch.setattr("shutil.rmtree", lambda path: None)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    sizes = tiny["tokenize"]
    amount = tokenize_ours(sizes, processes=1)()
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    ids = np.concatenate([np.fromfile(path, "<u2") for path in (tmp_path / "shards").glob("*.bin")]).tolist()
    documents = read_documents(Path(sizes.text))
    passes = ids.count(tokenizer.eot) / len(documents)
    assert passes == sizes.passes(documents) and amount == pytest.approx(
        passes * sum(len(document.encode()) for document in documents) / 1e6
    )
    assert sum(map(len, documents)) * passes == len(tokenizer.decode([i for i in ids if i != tokenizer.eot]))


def test_memory_counts_the_child_processes(tiny: dict[str, Any]) -> None:
    benchmark = load_benchmark("tokenize")
    one = f"{OURS}, one process"
    found = compare(benchmark, tiny["tokenize"], 1, 0.0, only=[OURS, one])["results"]
    assert found[OURS]["memory"] > found[one]["memory"] + 2 * 20 * 2**20, "two more processes with numpy and tiktoken"
    assert found[one]["memory"] < memory(), "it holds no torch, as this process does, which starts it"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text": "nowhere.txt"}, "nowhere.txt: not found; name a text file with --text"),
        ({"vocab": 100_000}, "vocab_size: the training text is too small for 100000 tokens"),
    ],
)
def test_input_error_of_an_implementation_is_one_line(
    changed: dict[str, Any], message: str, tiny: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=message):
        compare(load_benchmark("tokenize"), tiny["tokenize"]._replace(**changed), 1, 0.0, only=[OURS])


def test_downloaded_corpus_is_read_as_documents(tmp_path: Path) -> None:
    records = [(0, "One.\n\n\n"), (0, "Still one."), (1, " \n"), (2, "Two.")]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"doc": doc, "text": text}) + "\n" for doc, text in records))
    assert read_documents(path) == ["One.\n\n\nStill one.", "Two."]
    path.write_text('{"doc": 0}\n')
    with pytest.raises(InputError, match=r"corpus.jsonl: at byte 0: .*'text'"):
        read_documents(path)
    with pytest.raises(InputError, match=r"other.jsonl: not found; name a text file with --text"):
        read_documents(tmp_path / "other.jsonl")


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff", "not valid UTF-8"), (b" \n", "empty; name a file with text")]
)
def test_unreadable_text_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_documents(tmp_path / "text")


def test_another_implementation_is_first_each_round(tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load_benchmark("tokenize")
    names = ["rustbpe, one core", "tiktoken, one core"]
    compare(benchmark, tiny["tokenize"], 2, 0.0, only=names)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0].split(", ", 1)[1] for line in said] == [*names, *reversed(names)]


def test_implementations_train_models_of_one_size() -> None:
    for shape in (TINY, TINY._replace(heads=4, kv_heads=2, ffn=24, form="llama")):
        sizes = {
            "ours": sum(p.numel() for p in GPT(gpt_config(shape)).parameters()),
            "transformers": sum(p.numel() for p in transformers_model(shape).parameters()),
        }
        assert len(set(sizes.values())) == 1, sizes


def test_share_of_the_limit_follows_from_the_cost() -> None:
    """A layer of width 16 has 12 * 256 weights in its matrices; the vocabulary 50 * 16."""
    weights = 2 * 12 * 256 + 50 * 16
    limit = Cost(flop=1e6, n_bytes=2e6)
    train, decode = load_benchmark("train").cost, load_benchmark("generate").cost
    assert train is not None and decode is not None
    assert of_limit(train(TINY, OURS), 10.0, limit) == pytest.approx(10 * 6 * (weights + 2 * 16 * 16) / 1e6)
    assert of_limit(decode(TINY._replace(batch=1), OURS), 10.0, limit) == pytest.approx(10 * 4 * weights / 2e6)
    assert of_limit(decode(TINY, OURS), 10.0, limit) is None
    one, quantised = (decode(TINY._replace(batch=1), name) for name in (OURS, "llama.cpp, Q8_0"))
    assert one is not None and quantised is not None
    assert quantised.n_bytes / one.n_bytes == pytest.approx((32 + 2) / 128), "32 bytes and a half-precision scale"
    few = decode(TINY._replace(batch=1), "llama.cpp, Q4_0")
    assert few is not None and few.n_bytes == 2 * 12 * 256 * 18 / 32 + 50 * 16 * 34 / 32, (
        "the output layer keeps 8 bits"
    )
    assert set(BYTES_PER_WEIGHT) <= set(load_benchmark("generate").implementations)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heads": 3}, "width 16 must be a multiple of heads 3"),
        ({"new": 13}, "must fit into context 16"),
        ({"kv_heads": 1}, "kv_heads and ffn are sizes of the form llama"),
        ({"form": "llama", "heads": 4, "kv_heads": 3}, "n_heads 4 must be a multiple of n_kv_heads 3"),
        ({"vocab": 10**8}, "vocab_size: input should be less than or equal to 16777216"),
    ],
)
def test_impossible_shape_is_one_line(changed: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(load_benchmark("train"), TINY._replace(**changed), 1, 0.01)


@pytest.mark.parametrize("part", [gpu.TRAIN_GPT2, gpu.DECODE], ids=lambda part: part.kind)
def test_what_a_gpu_is_measured_by_does_its_work_on_a_cpu_too(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled training takes a minute: what is compiled is looked at, and not compiled."""
    compiled: list[object] = []

    def compile_nothing(function: Any, *arguments: Any, **options: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_nothing)
    shape = TINY._replace(batch=2)
    worked = set()
    for name, make in part.implementations.items():
        n = len(compiled)
        try:
            assert make(shape)() == (2 * 16 if part is gpu.TRAIN_GPT2 else 4), name
        except (ModuleNotFoundError, Skipped):
            continue
        worked.add(name)
        if part is gpu.TRAIN_GPT2:
            assert (len(compiled) > n) == name.endswith("compiled"), name
        assert part.cost(shape, name).flop + part.cost(shape, name).n_bytes > 0
    assert worked >= {OURS, "transformers"}


def test_a_gpu_is_told_in_one_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="PyTorch sees no CUDA device here; on a CPU run `bench train`"):
        gpu.measure(gpu.GPT2, 1, 0.0)
    part: dict[str, Any] = {
        "kind": "gpu train",
        "unit": "tokens/s",
        "shape": gpu.GPT2._asdict(),
        "machine": {"processor": "x", "threads": 1, "gpu": "NVIDIA H200"},
        "versions": {"python": "3.12.1", "torch": "2.11.0"},
        "limits": {"flop_per_s": 7e14, "bytes_per_s": 4e12},
        "results": {
            OURS: {"rates": [3.0, 5.0], "median": 4.0, "of_limit": 0.5, "memory": 2**30},
            "transformers": {"rates": [2.0], "median": 2.0, "of_limit": 0.25, "memory": 2**30},
        },
    }
    found = {"kind": "gpu", "parts": [part, part | {"kind": "gpu decode"}]}
    table = gpu.markdown(found)
    assert f"| train | {OURS} | 4.0 (3.0 to 5.0) | 2.00 | 50 % | 1,024 MB |" in table
    assert "| decode | transformers | 2.0 (2.0 to 2.0) | 1.00 | 25 % | 1,024 MB |" in table
    assert table.count("\n|") == 2 + 4 - 1 and "Limits: 700,000 GFLOP/s, 4,000 GB/s." in table
    assert "NVIDIA H200; Python 3.12.1, torch 2.11.0; training at 16 x 1,024 tokens" in table
    gpu.draw(found, tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 1000


def test_every_size_of_a_kind_is_an_option_of_it() -> None:
    """The command line names the sizes itself, so that its help needs no torch."""
    types = {kind: type(load_benchmark(kind).sizes) for kind in BENCHMARKS}
    types |= {"learn": TimeToLoss, "scale": ScalingSizes}
    for kind, sizes in types.items():
        options = set(KINDS[kind].sizes)
        beyond = {"form"} if kind == "generate" else {"form", "prompt", "new", "kv_heads", "ffn"}  # Shape's
        assert set(sizes._fields) - beyond == options, kind
        words = [word for size in options for word in (f"--{size.replace('_', '-')}", "3")]
        args = build_parser().parse_args(["bench", kind, *words])
        assert {getattr(args, size) for size in options} <= {3, "3"}
    assert set(SIZES) == {size for kind in KINDS.values() for size in kind.sizes}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --rounds=0", "argument --rounds: invalid"),
        ("train --batch=-1", "argument --batch: invalid"),
        ("train --seconds=soon", "argument --seconds: invalid"),
        ("train --form llama", "unrecognized arguments: --form llama"),
        ("train --prompt 3", "unrecognized arguments: --prompt 3"),
        ("train -S pretrain.lr=1", "unrecognized arguments: -S pretrain.lr=1"),
        ("tokenize --layers 2", "unrecognized arguments: --layers 2"),
        ("learn --rounds 3", "unrecognized arguments: --rounds 3"),
        ("learn --megabytes 3", "unrecognized arguments: --megabytes 3"),
        ("scale --steps 3", "unrecognized arguments: --steps 3"),
    ],
)
def test_option_of_another_kind_is_refused_by_the_parser(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = command.split()[0]
    with pytest.raises(SystemExit) as ended:
        main(["bench", *command.split()])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"python -m llm bench {kind}: {message}")
    assert said.endswith(f"; see python -m llm bench {kind} --help\n")


def test_only_named_implementations_take_part(tiny: dict[str, Any]) -> None:
    found = compare(load_benchmark("tokenize"), tiny["tokenize"], 1, 0.0, only=["rustbpe, one core"])
    assert list(found["results"]) == ["rustbpe, one core"]
    with pytest.raises(InputError, match="nobody: takes no part in finetune; those who do: this project, transformers"):
        compare(load_benchmark("finetune"), TINY, 1, 0.0, only=["nobody"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate --form llama --heads 5", "width 576 must be a multiple of heads 5"),
        ("generate --heads 5", "width 768 must be a multiple of heads 5"),
        ("scale --width 100", "width 100 must be a multiple of 16 times heads"),
        ("scale --vocab 20000000", "vocab_size: input should be less than or equal to 16777216"),
        ("learn --heads 3", "width 128 must be a multiple of heads 3"),
        ("learn -S pretrain.rate=1", "--set-param pretrain.rate=1: expected KEY=VALUE with a key of params.yaml"),
        ("learn -S pretrain.lr.x=1", "--set-param pretrain.lr.x=1: expected KEY=VALUE"),
        ("learn -S pretrain.lr", "--set-param pretrain.lr: expected KEY=VALUE"),
        ("learn -S pretrain.lr=[", "--set-param pretrain.lr=[: the value is not valid YAML"),
        ("learn -S pretrain.lr=fast", "pretrain.lr: input should be a valid number"),
        ("learn --vocab 20000000", "vocab_size: input should be less than or equal to 16777216"),
        ("learn --width 2 --heads 1 --layers 100", "our model differs by"),
        ("learn --text nowhere.txt", "nowhere.txt: not found"),
    ],
)
def test_impossible_sizes_and_params_are_one_line(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *command.split()]) == 1
    assert message in capsys.readouterr().err


# ---- bench learn -----------------------------------------------------------------------------------------------------


@pytest.fixture
def time_to_loss(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> TimeToLoss:
    monkeypatch.setattr(learning, "matrix_limit", lambda: 1e11)  # which takes longer than the trainings
    set_bf16_units(monkeypatch)
    text = tiny["tokenize"].text
    return TimeToLoss(steps=10, our_steps=100, layers=1, width=32, heads=2, vocab=300, context=16, batch=4, text=text)


@pytest.fixture
def params() -> Params:
    """Return the params of the clone, with short evaluations."""
    params = shipped_params()
    return params.model_copy(update={"pretrain": params.pretrain.model_copy(update={"eval_tokens": 256})})


def test_our_training_ends_at_the_target(
    time_to_loss: TimeToLoss, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that a step moves by one second and an evaluation by a thousand, which do not count."""
    now = [0.0]

    def moves(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def moved(*arguments: Any) -> Any:
            now[0] += seconds
            return function(*arguments)

        return moved

    batches = learning.window_batches
    monkeypatch.setattr(learning, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(learning, "lm_metrics", moves(1000, learning.lm_metrics))
    monkeypatch.setattr(learning, "window_batches", lambda *arguments: moves(1, batches(*arguments)))
    found = learn(time_to_loss, params)

    ours, theirs = found["results"][OURS], found["results"][NANOGPT]
    assert (ours["optimizer"], theirs["optimizer"], theirs["schedule"]) == ("muon", "adamw", "cosine")
    assert theirs["step"] == 10 and found["target"] == theirs["bpb"]
    assert theirs["lr"] == found["sweep"][0]["lr"] and len(found["sweep"]) >= 3
    assert found["target"] == min(each["bpb"] for each in found["sweep"])
    assert ours["step"] < 100
    for result in (ours, theirs):
        assert [row["seconds"] for row in result["curve"]] == [row["step"] for row in result["curve"]]
        assert all(row["tokens"] == row["step"] * 4 * 16 for row in result["curve"])
        assert result["curve"][0]["bpb"] > result["bpb"]
    *before, last = [row["bpb"] for row in ours["curve"]]
    assert last <= found["target"] < min(before), "it went on until then, and no further"
    assert found["ratios"] == {OURS: dict.fromkeys(("tokens", "seconds"), ours["step"] / 10)}
    assert abs(ours["parameters"] - theirs["parameters"]) <= 0.03 * theirs["parameters"]

    assert json.loads(json.dumps(found)) == found
    table = learning.markdown(found)
    assert f"| {NANOGPT} | " in table and f"{OURS}: {ours['step'] / 10:.2f} of the tokens" in table
    learning.draw(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_training_short_of_the_target_has_no_ratios(time_to_loss: TimeToLoss, params: Params) -> None:
    found = learn(time_to_loss._replace(our_steps=1), params)
    assert found["ratios"] == {} and found["results"][OURS]["step"] == 1
    assert f"{OURS}: did not get as far" in learning.markdown(found)


def test_our_recipe_trains_in_bf16_and_in_fp32_on_a_cpu_with_units_for_it(
    time_to_loss: TimeToLoss, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_bf16_units(monkeypatch, "avx512_bf16")
    autocast: list[tuple[str, bool]] = []
    hidden = GPT.hidden_states

    def seen(model: GPT, *arguments: Any, **more: Any) -> torch.Tensor:
        autocast.append((model.config.activation, model.training and torch.is_autocast_enabled("cpu")))
        assert model.training or not torch.is_autocast_enabled("cpu"), "evaluated in fp32"
        return hidden(model, *arguments, **more)

    monkeypatch.setattr(GPT, "hidden_states", seen)
    found = learn(time_to_loss, params)
    assert list(found["results"]) == [OURS, OURS_IN_FP32, NANOGPT]
    assert {activation for activation, mixed in autocast if mixed} == {params.model.activation}, "nanoGPT's in fp32"
    mixed, plain = (found["results"][name]["curve"] for name in (OURS, OURS_IN_FP32))
    assert mixed[1:] and mixed[1]["bpb"] != plain[1]["bpb"]
    assert mixed[1]["bpb"] == pytest.approx(plain[1]["bpb"], rel=0.01)


def test_our_recipe_equals_the_params_but_for_the_feed_forward_width() -> None:
    """But for the width of the feed-forward layers, which makes up for what GPT-2's block has more."""
    params = shipped_params()
    time_to_loss = default_sizes(params)
    config, section = our_recipe(time_to_loss, params)
    expected = params.model.model_dump() | {"ffn_dim": config.ffn_dim, "vocab_size": time_to_loss.vocab}
    assert config.model_dump(exclude_none=True) == expected
    changed = {key for key, value in params.pretrain if getattr(section, key) != value}
    assert changed <= {"eval_interval", "keep"}
    reference = learning.nanogpt_recipe(time_to_loss, params, 0.001).config
    ours, theirs = learning.n_parameters(config), learning.n_parameters(reference)
    assert abs(ours - theirs) <= 0.03 * theirs


def test_params_change_as_in_an_experiment() -> None:
    params = shipped_params(["pretrain.lr=0.004", "tokenize.corpus.split=book"])
    assert (params.pretrain.lr, params.tokenize.corpus.split) == (0.004, "book")
    shared = shipped_params(["training.optimizer=adamw", "+pretrain.optimizer=muon"])
    assert (shared.pretrain.optimizer, shared.finetune_classify.optimizer) == ("muon", "adamw")
    changed = params.model_copy(update={"pretrain": shipped_params().pretrain, "tokenize": shipped_params().tokenize})
    assert changed == shipped_params() != params


@pytest.mark.parametrize(("best", "tried"), [(4.0, [1, 2, 4, 8]), (1.0, [1, 2, 0.5]), (0.5, [1, 2, 0.5, 0.25])])
def test_sweep_ends_when_the_loss_rises(best: float, tried: list[float]) -> None:
    asked: list[float] = []

    def learned(lr: float) -> TrainingResult:
        asked.append(lr / FIRST_LR)
        if asked[-1] == 8:
            raise DivergenceError("step 3: the loss exploded: lower lr")
        recipe = learning.Recipe(gpt_config(TINY), shipped_params().pretrain.model_copy(update={"lr": lr}))
        return TrainingResult(recipe, [{"bpb": abs(np.log(asked[-1] / best))}], 1.0)

    found = best_of_sweep(learned)
    assert asked == tried and found[0].recipe.params.lr == best * FIRST_LR
    assert len(found) == len([lr for lr in tried if lr != 8])


def test_sweep_that_only_diverges_is_one_line() -> None:
    def explodes(lr: float) -> TrainingResult:
        raise DivergenceError("step 3: the loss exploded: lower lr")

    with pytest.raises(InputError, match="diverged at every learning rate"):
        best_of_sweep(explodes)

    def fails(lr: float) -> TrainingResult:
        raise InputError("corpus: too small")

    with pytest.raises(InputError, match="too small"):
        best_of_sweep(fails)


# ---- bench scale -----------------------------------------------------------------------------------------------------


@pytest.fixture
def scaling_sizes(time_to_loss: TimeToLoss) -> ScalingSizes:
    values = {name: value for name, value in time_to_loss._asdict().items() if name in ScalingSizes._fields}
    return ScalingSizes(tokens=1, **values)._replace(batch=16, width=32)


def test_law_of_four_models_is_told_before_the_fifth(
    scaling_sizes: ScalingSizes, params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = scale(scaling_sizes, params)
    rows = found["results"]
    assert [row["width"] for row in rows] == [8, 12, 16, 24, 32]
    for row in rows:
        assert row["tokens"] == math.ceil(row["parameters"] / 256) * 256, "whole steps of 16 rows of 16"
    logarithms = np.log([[row["parameters"], row["bpb"]] for row in rows[:4]])
    errors = logarithms[:, 1] - np.log([row["law"] for row in rows[:4]])
    assert abs(errors.sum()) < 1e-9 and abs(errors @ logarithms[:, 0]) < 1e-9, "least squares"
    said = [line for line in capsys.readouterr().err.splitlines() if "bits per byte" in line]
    order = [line.split(" bits")[0] for line in said]
    assert order[-2] == f"width 32: {rows[-1]['law']:.4f}" and "predicted" in said[-2]
    assert order[-1] == f"width 32: {rows[-1]['bpb']:.4f}" and "predicted" not in said[-1]
    assert json.loads(json.dumps(found)) == found
    assert f"{rows[-1]['law']:.4f} was said before" in scaling.markdown(found)
    for epochs, told in ((1.0, False), (2.5, True)):  # of the largest model
        rows[-1]["epochs"] = epochs
        assert ("It read the text 2.5 times" in scaling.markdown(found)) == told
    scaling.draw(found, tmp_path / "law.png")
    assert (tmp_path / "law.png").stat().st_size > 1000


def test_known_power_law_is_recovered(
    scaling_sizes: ScalingSizes, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(recipe: learning.Recipe, shards: Path, *more: Any) -> TrainingResult:
        size = learning.n_parameters(recipe.config)
        end = {"step": 1, "tokens": 64, "seconds": 1.0, "val_loss": 1.0, "bpb": 9 * size**-0.25}
        return TrainingResult(recipe, [end], 1.0)

    monkeypatch.setattr(scaling, "train", trained)
    found = scale(scaling_sizes, params)
    assert found["exponent"] == pytest.approx(-0.25)
    assert law(found["exponent"], found["logarithm"], 10**6) == pytest.approx(9 * 10**-1.5)
    assert "what it reached is +0.0 % off" in scaling.markdown(found).replace("-0.0", "+0.0")


def test_largest_model_is_that_of_the_params() -> None:
    params = shipped_params()
    scaling_sizes = scaling.default_sizes(params)
    *smaller, last = recipes(scaling_sizes, params)
    assert last.config == GPTConfig(**params.model.model_dump(), vocab_size=scaling_sizes.vocab)
    sizes = [learning.n_parameters(recipe.config) for recipe in (*smaller, last)]
    assert sizes == sorted(sizes) and all(
        recipe.params.max_steps == math.ceil(size / (scaling_sizes.batch * scaling_sizes.context))
        for recipe, size in zip((*smaller, last), sizes, strict=True)
    )


# ---- servers ---------------------------------------------------------------------------------------------------------

SMALL = Shape(
    layers=1, width=32, heads=2, vocab=300, context=64, batch=2, prompt=4, new=8, kv_heads=1, ffn=32, form="llama"
)


class Completions(BaseHTTPRequestHandler):
    """A server of OpenAI's completions that streams a letter for each token, and refuses odd prompts."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body["prompt"][0] % 2:
            self.send_response(429)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        for _ in range(body["max_tokens"]):
            self.wfile.write(b'data: {"choices": [{"text": "a"}]}\n\n')
        self.wfile.write(b'data: {"choices": []}\n\ndata: [DONE]\n\n')

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def completions() -> Iterator[serving.Address]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Completions) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield serving.Address("127.0.0.1", server.server_port, psutil.Process())
        server.shutdown()


def test_every_request_is_counted_as_what_it_came_to(completions: serving.Address) -> None:
    counts = serving.Counts()
    for seed in range(20):
        serving.stream(completions, SMALL, seed, counts, lambda n: True)
    assert counts.answers.keys() == {"complete", "429"} and counts.answers.total() == 20
    assert len(counts.chunks) == SMALL.new * counts.answers["complete"]
    assert len(counts.first) == counts.answers["complete"]
    left = serving.Counts()
    even = next(seed for seed in range(20) if random.Random(seed).randrange(256, SMALL.vocab - 1) % 2 == 0)
    serving.stream(completions, SMALL, even, left, lambda n: n < 3)
    assert left.answers == {"left": 1} and len(left.chunks) == 3
    serving.stream(completions._replace(port=1), SMALL, 0, left, lambda n: True)
    assert left.answers["ConnectionRefusedError"] == 1


def test_a_server_that_refuses_ends_the_measurement(completions: serving.Address) -> None:
    with pytest.raises(InputError, match=r"requests failed: .'429'"):
        serving.measure(completions, SMALL, 2, 0.2, seed=1)


def test_the_tables_of_servers() -> None:
    one, many = {"rate": 10.0, "first": 0.1}, {"rate": 45.0, "first": 1.25}
    shape = {"layers": 30, "batch": 16}
    found = {"kind": "serve", "shape": shape, "results": {"this project": {"one": one, "many": many, "memory": 2**21}}}
    assert "| this project | 10.0 | 0.10 | 45.0 | 1.25 | 4.5 | 2 MB |" in serving.markdown(found)
    memory = [(float(i), (100 + i) * 2**20) for i in range(8)]
    held = {"answers": {"complete": 5, "429": 1}, "errors": 0, "swap": [200], "memory": memory, "held": 0.0}
    text = serving.markdown({"kind": "load", "shape": shape, **held})
    assert "| answers: 429 | 1 |" in text and "| 102 MB, 106 MB |" in text and "| requests left over | 0 |" in text


@pytest.mark.slow
def test_servers_stream_side_by_side_and_under_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("xllamacpp")
    sizes = (
        "--layers 1 --width 32 --heads 2 --kv-heads 1 --ffn 32 --vocab 300 --context 64 --clients 2 --prompt 4 --new 8"
    )
    assert main(["bench", "serve", *sizes.split(), "--rounds", "1", "--seconds", "0.5", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "serve.json").read_text())
    assert set(found["results"]) == {*serving.OURS, *serving.LLAMA_CPP}
    for result in found["results"].values():
        assert result["one"]["rate"] > 0 and result["many"]["first"] < 10 and result["memory"] > 0
    assert main(["bench", "load", *sizes.split(), "--seconds", "3", "--out", str(tmp_path)]) == 0
    load = json.loads((tmp_path / "load.json").read_text())
    assert load["errors"] == 0 and load["held"] == 0 and load["swap"] == [200]
    assert load["answers"]["complete"] > 0 and load["answers"]["429"] > 0 and load["answers"]["left"] > 0
    assert "requests left over" in capsys.readouterr().out and (tmp_path / "load.png").is_file()


# ---- precisions ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_model_in_every_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("xllamacpp")
    serving.write_model(
        SMALL._replace(vocab=400, context=128, width=64, heads=2, kv_heads=2, ffn=64), tmp_path / "model"
    )
    (tmp_path / "text.txt").write_text(STORY.format(1) * 3)
    options = ["--text", str(tmp_path / "text.txt"), "--new", "8", "--out", str(tmp_path)]
    assert main(["bench", "precisions", str(tmp_path / "model"), *options]) == 0
    found = json.loads((tmp_path / "precisions.json").read_text())["results"]
    assert set(found) == {*precisions.OURS, *precisions.GGUF}
    disk = [found[name]["disk"] for name in precisions.GGUF]
    assert disk == sorted(disk, reverse=True) and len(set(disk)) == 5
    exact = found["this project, fp32"]["bpb"]
    assert found["llama.cpp, F32"]["bpb"] == pytest.approx(exact, rel=1e-5)
    for result in found.values():
        assert result["bpb"] == pytest.approx(exact, rel=0.05) and result["rate"] > 0 and result["memory"] > 2**20
    assert "| llama.cpp, Q8_0 |" in capsys.readouterr().out


def test_a_precision_that_the_form_does_not_have_is_told() -> None:
    found = {"results": {"llama.cpp, F16": {"skipped": "no architecture"}}}
    assert "| llama.cpp, F16 | skipped: no architecture | - | - | - |" in precisions.markdown(found)


def test_the_process_of_a_worker_names_the_command_for_people() -> None:
    done = subprocess.run([sys.executable, "-m", "llm.bench", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "llm.bench is the process of one implementation: run `python -m llm bench --help`"
    ]
