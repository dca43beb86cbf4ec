"""`import llm`: the library on tiny models that have learned one sentence by heart."""

from __future__ import annotations

import doctest
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import llm
from llm import api
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, load_checkpoint, save_checkpoint
from llm.common.errors import InputError
from llm.inference.generate import generate
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.prompts import encode_prompt
from tests.helpers import SHIPPED_FORM, gpt_config

ROOT = Path(__file__).resolve().parents[2]
SENTENCE = "One morning the baker sold bread at the harbour."
QUESTION, ANSWER = "Name a trade.", "A baker."
SPAM = "You have won a prize!"


def overfit(model: torch.nn.Module, loss: Callable[[], torch.Tensor], below: float = 0.02) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        if value.item() < below:
            return
    raise AssertionError("the model did not learn its sentence")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models/base, models/instruct and models/classifier."""
    path = tmp_path_factory.mktemp("library")
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([f"{SENTENCE} {QUESTION} {ANSWER} {SPAM} "] * 5, vocab_size=300)
    form = {"vocab_size": tokenizer.vocab_size, "context_length": 256, "emb_dim": 32, "head_dim": 8}
    config = gpt_config(**SHIPPED_FORM, **form)
    texts = {
        "base": tokenizer.encode(SENTENCE),
        "instruct": encode_prompt(tokenizer, "alpaca", QUESTION) + tokenizer.encode(ANSWER),
    }
    for kind, ids in texts.items():
        idx = torch.tensor([[*ids, tokenizer.eot]])
        gpt = GPT(config)
        overfit(gpt, lambda gpt=gpt, idx=idx: F.cross_entropy(gpt(idx[:, :-1])[0], idx[0, 1:]))  # type: ignore[misc]
        values = {"kind": kind, "template": "alpaca" if kind == "instruct" else None}
        save_checkpoint(path / "models" / kind, Checkpoint(gpt, tokenizer, CheckpointConfig(gpt=config, **values)))
    classifier = GPTClassifier(GPT(config), 2)
    idx = torch.tensor([tokenizer.encode(SPAM)])
    lengths = torch.tensor([idx.shape[1]])
    overfit(classifier, lambda: F.cross_entropy(classifier(idx, lengths), torch.tensor([1])))
    values = CheckpointConfig(kind="classifier", gpt=config, labels=["ham", "spam"], max_length=32)
    save_checkpoint(path / "models/classifier", Checkpoint(classifier, tokenizer, values))
    return path


def test_docstrings_run_as_shown(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names = {"llm": llm} | {kind: llm.load(f"models/{kind}", device="cpu") for kind in ("base", "classifier")}
    names["model"] = names["base"]
    found = doctest.testmod(api, extraglobs=names)
    assert found.failed == 0 and found.attempted >= 10


def test_import_loads_no_torch_and_shows_its_names() -> None:
    code = (
        "import llm, sys\n"
        "print([name for name in ('torch', 'numpy', 'pydantic', 'tqdm') if name in sys.modules])\n"
        "print(llm.load.__module__, llm.Sampling.__module__, sorted(llm.__all__) == llm.__all__)\n"
        "try: llm.lode\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "[]",
        "llm.api llm.inference.sampling True",
        "module 'llm' has no attribute 'lode'",
    ]


def test_generate_and_stream_give_the_text_of_the_decoder(place: Path) -> None:
    model = llm.load(place / "models/base", device="cpu")
    gpt, tokenizer, _ = load_checkpoint(place / "models/base")
    assert isinstance(gpt, GPT)
    for sampling in (llm.Sampling(), llm.Sampling(temperature=5.0, top_k=20)):
        [ids] = generate(
            gpt, [tokenizer.encode("the")], max_new_tokens=20, sampling=sampling, seed=3, stop={tokenizer.eot}
        )
        pieces = list(model.stream("the", max_new_tokens=20, sampling=sampling, seed=3))
        text = model.generate("the", max_new_tokens=20, sampling=sampling, seed=3)
        assert text == "".join(pieces) == tokenizer.decode(ids)
    assert len(pieces) > 1


def test_batch_gives_each_prompt_its_own_seed(place: Path) -> None:
    model = llm.load(place / "models/base", device="cpu")
    warm = llm.Sampling(temperature=2.0)
    texts = model.generate_batch(["the", "One", "the"], max_new_tokens=12, sampling=warm, seed=4)
    assert texts == [
        model.generate(prompt, max_new_tokens=12, sampling=warm, seed=4 + i)
        for i, prompt in enumerate(["the", "One", "the"])
    ]
    assert texts[0] != texts[2]


def test_system_message_replaces_that_of_the_model(place: Path, tmp_path: Path) -> None:
    gpt, tokenizer, config = load_checkpoint(place / "models/base")
    config = CheckpointConfig(kind="instruct", gpt=config.gpt, template="chatml", system="Be brief.")
    model = api.Model(Checkpoint(gpt, tokenizer, config))
    user = {"role": "user", "content": QUESTION}
    for system in (None, "Be long."):
        messages = [user] if system is None else [{"role": "system", "content": system}, user]
        prompt = encode_prompt(tokenizer, "chatml", QUESTION, system=system or "Be brief.")
        assert isinstance(gpt, GPT)
        [ids] = generate(gpt, [prompt], max_new_tokens=10, stop={tokenizer.eot})
        assert model.chat(messages, max_new_tokens=10) == tokenizer.decode(ids)


def test_chat_reads_the_turns_that_fit(place: Path) -> None:
    gpt, tokenizer, config = load_checkpoint(place / "models/base")
    model = api.Model(Checkpoint(gpt, tokenizer, CheckpointConfig(kind="instruct", gpt=config.gpt, template="chatml")))
    assert isinstance(gpt, GPT)
    messages = turns("system", "user", "assistant", "user", "assistant", "user")
    ids = model.encode_conversation(messages)
    assert model.fit_messages(messages, max_new_tokens=256 - len(ids)) == (messages, ids)
    [answer] = generate(gpt, [ids], max_new_tokens=10, stop=model.stop_ids)
    assert model.chat(messages, max_new_tokens=10) == tokenizer.decode(answer)
    long = [dict(message) for message in messages]
    long[1]["content"] = "Hello" * 50
    kept, ids = model.fit_messages(long, max_new_tokens=10)
    assert (kept, ids) == ([long[0], *long[3:]], model.encode_conversation([long[0], *long[3:]]))
    long[0]["content"] = "Hello" * 80
    with pytest.raises(InputError, match=r"the last turn has \d+ tokens .*expected at most 256"):
        model.chat(long)


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "Hello"} for role in roles]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"messages: none \(expected system, if any, then user and assistant in turn\)"),
        (turns("user", "assistant"), "no question at the end .*got assistant"),
        (turns("user", "system", "user"), "message 2 has the role system .only as the first message"),
        (turns("user", "tool", "user"), "message 2 has the role tool .not one of system, user, assistant"),
        (turns("system", "user"), "alpaca has no place for a system message"),
        ([{"content": "Hello"}], "message 1 has no role"),
        ([{"role": "user"}], "the user message has no text as its content"),
    ],
)
def test_messages_that_cannot_be_rendered_are_one_line(
    place: Path, messages: list[dict[str, str]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        llm.load(place / "models/instruct", device="cpu").chat(messages)


def test_wrong_kind_of_model_is_one_line(place: Path) -> None:
    base, classifier = (llm.load(place / f"models/{kind}", device="cpu") for kind in ("base", "classifier"))
    for call, expected in (
        (lambda: base.classify(["text"]), "classifier, got base"),
        (lambda: base.chat(turns("user")), "instruct, got base"),
        (lambda: classifier.score("One text"), "base or instruct, got classifier"),
        (lambda: classifier.stream("One"), "base or instruct, got classifier"),
    ):
        with pytest.raises(InputError, match=rf"wrong kind of model \(expected {expected}\); use models/"):
            call()


def test_package_ships_its_types() -> None:
    assert (ROOT / "llm/py.typed").is_file()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text()
