"""The engine against single requests: the same tokens, whatever runs beside them and whenever they came."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from llm.common.errors import InputError
from llm.inference.generate import generate
from llm.inference.rows import decode_rows, invariant_rows
from llm.inference.sampling import Sampling
from llm.model.gpt import GPT
from llm.serving import engine as engine_module
from llm.serving.engine import ClosedError, QueueFullError
from llm.serving.generation import Choice
from tests.helpers import gpt_config, tiny_tokenizer
from tests.inference.conftest import Calls
from tests.serving.conftest import GPT2, MODERN, Client, engine, finish, prompts
from tests.serving.conftest import make_model as double_model


def test_32_prompts_arriving_at_random_get_their_single_answers(model: GPT) -> None:
    chooser = random.Random(1)
    clients = [Client(prompt, chooser.randint(1, 30)) for prompt in prompts(32)]
    expected = [generate(model, [c.generation.prompt], max_new_tokens=c.generation.max_new_tokens)[0] for c in clients]
    assert len({tuple(answer[:3]) for answer in expected}) > 16  # else the comparison says little
    server = engine(model)
    ahead, most = list(clients), 0
    while ahead or server.busy:
        for _ in range(min(len(ahead), chooser.randint(0, 3))):
            server.submit([ahead.pop().generation])
        server.step()
        most = max(most, len(server.running))
    assert most == 8, "requests share the batch"
    assert [client.answer for client in clients] == expected
    assert [client.text for client in clients] == [tiny_tokenizer().decode(answer) for answer in expected]
    assert {client.finish_reason for client in clients} == {"length"}


def test_a_long_prompt_does_not_stop_the_others(model: GPT) -> None:
    server = engine(model, chunk=16)
    short, long = Client([1, 2, 3], 30), Client(prompts(1, 100)[0][:1] * 100, 2)
    server.submit([short.generation])
    server.step()
    server.submit([long.generation])
    for step in range(1, 7):
        before = len(short.answer)
        server.step()
        assert len(short.answer) == before + 1 and not long.answer, step
    server.step()
    assert long.answer


def test_a_client_that_leaves_frees_its_place() -> None:
    server = engine(double_model(GPT2), batch_size=1)
    first, second = Client([1, 2], 100), Client([3, 4], 3)
    server.submit([first.generation, second.generation])
    for _ in range(3):
        server.step()
    assert not second.answer
    server.cancel([first.generation])
    server.step()
    assert second.answer and server.running == [second.generation]
    n = len(first.pieces)
    while server.busy:
        server.step()
    assert len(first.pieces) == n, "nobody is told"
    waiting = Client([5], 3)
    server.submit([waiting.generation])
    server.cancel([waiting.generation])
    server.step()
    assert not server.busy


def test_a_deadline_ends_an_answer_with_what_there_is() -> None:
    server = engine(double_model(GPT2), batch_size=1)
    late, never = Client([1, 2], 100), Client([3], 5)
    server.submit([late.generation, never.generation])
    for _ in range(4):
        server.step()
    late.generation.deadline = never.generation.deadline = 0.0
    server.step()
    assert late.answer and late.finish_reason == "length"
    assert not never.answer and never.finish_reason == "expired"
    assert not server.busy


def test_sampled_answers_have_their_own_settings_and_seeds(model: GPT) -> None:
    choices = [
        Choice(Sampling(temperature=1.3, top_k=9), seed=3),
        Choice(Sampling(temperature=1.3, top_k=9), seed=4),
        Choice(Sampling(temperature=0.7, top_p=0.9, min_p=0.01), seed=5),
        Choice(Sampling(repetition_penalty=1e9)),
        Choice(),
    ]
    clients = [Client([5, 17, 3, 44], 20, choice=choice) for choice in choices]
    answers = finish(engine(model), *clients)
    for client, answer in zip(clients, answers, strict=True):
        choice, prompt = client.generation.choice, client.generation.prompt
        assert generate(model, [prompt], max_new_tokens=20, sampling=choice.sampling, seed=choice.seed) == [answer]
    assert len({tuple(answer) for answer in answers}) == 5


def test_penalties_and_biases() -> None:
    server = engine(double_model(GPT2))
    penalised = Client([5, 17], 20, choice=Choice(presence_penalty=1e6))
    counted = Client([5, 17], 20, choice=Choice(frequency_penalty=1e6))
    biased = Client([5, 17], 4, choice=Choice(logit_bias={7: 1e6}))
    for answer in finish(server, penalised, counted):
        assert len(set(answer)) == 20
    assert finish(server, biased) == [[7] * 4]


def test_log_probabilities_are_those_of_the_model() -> None:
    model = double_model(MODERN)
    client = Client([5, 17, 3], 6, choice=Choice(logprobs=2, logit_bias={9: 5.0}))
    [answer] = finish(engine(model), client)
    idx = torch.tensor([[5, 17, 3, *answer]])
    with torch.no_grad():
        expected = model(idx)[0].log_softmax(-1)[2:]
    infos = [info for piece in client.pieces for info in piece.tokens]
    assert [info.token for info in infos] == answer
    for info, row in zip(infos, expected, strict=False):
        assert info.logprob == pytest.approx(float(row[info.token]), abs=1e-5)
        assert info.top == tuple((int(i), pytest.approx(float(v), abs=1e-5)) for v, i in zip(*row.topk(2), strict=True))


def test_stop_tokens_and_stop_strings() -> None:
    model, tokenizer = double_model(GPT2), tiny_tokenizer()
    [free] = generate(model, [[5, 17, 3]], max_new_tokens=40)
    text = tokenizer.decode(free)
    by_token = Client([5, 17, 3], 40, stop_ids=frozenset(free[6:7]))
    stop = text[9:11]
    by_text = Client([5, 17, 3], 40, stop_texts=["never", stop])
    finish(engine(model), by_token, by_text)
    assert by_token.answer == free[: free.index(free[6])] and by_token.finish_reason == "stop"
    assert by_text.text == text[: text.index(stop)] and by_text.finish_reason == "stop"
    assert len(by_text.answer) < 40, "it ends at once"


# ---- prefix cache ----------------------------------------------------------------------------------------------------


def test_common_beginnings_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, system = double_model(MODERN), prompts(1, 90, seed=3)[0][:40] or [1]
    system = (system * 40)[:40]
    clients = [Client([*system, 100 + i, 7], 5) for i in range(4)]
    expected = [generate(model, [c.generation.prompt], max_new_tokens=5)[0] for c in clients]
    calls = Calls(model, monkeypatch)
    server = engine(model, chunk=16)
    assert finish(server, *clients) == expected
    read = sum(width for _, width in calls.shapes)
    assert read == 42 + 3 * 2, "also by prompts that came at once"
    calls.shapes.clear()
    turn = Client([*clients[0].generation.prompt, *expected[0], 9], 5)  # the next turn of a conversation
    finish(server, turn)
    assert calls.shapes == [(1, 2)]


def test_the_prefix_cache_is_bounded(model: GPT) -> None:
    server = engine(model, cache_tokens=300)
    for prompt in prompts(12):
        finish(server, Client(prompt, 3))
        assert server.prefixes.n_tokens <= 150
        assert server.prefixes.n_tokens == sum(map(len, server.prefixes.entries))
    assert server.prefixes.entries


def test_requests_wait_for_cache_memory(model: GPT) -> None:
    server = engine(model, cache_tokens=100)
    clients = [Client([i] * 30, 20) for i in range(4)]
    expected = [generate(model, [c.generation.prompt], max_new_tokens=20)[0] for c in clients]
    server.submit([client.generation for client in clients])
    while server.busy:
        server.step()
        caches = [each.cache for each in (*server.running, *server.entering) if each.cache is not None]
        assert len(caches) <= 2
    assert [client.answer for client in clients] == expected
    with pytest.raises(InputError, match="exceed the cache"):
        server.submit([Client([1] * 90, 20).generation])


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_the_queue_is_bounded_and_takes_all_or_none() -> None:
    server = engine(double_model(GPT2), batch_size=2, queue=1)
    server.submit([Client([1]).generation for _ in range(3)])
    with pytest.raises(QueueFullError):
        server.submit([Client([1]).generation])
    server.step()
    with pytest.raises(QueueFullError):
        server.submit([Client([1]).generation] * 2)
    assert len(server.waiting) == 1


@pytest.mark.parametrize(("prompt", "n", "message"), [([], 5, "is empty"), ([1] * 120, 9, "exceed the context")])
def test_requests_that_can_never_run_are_refused(prompt: list[int], n: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine(double_model(GPT2)).submit([Client(prompt, n).generation])


def test_a_failed_step_ends_its_requests_and_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double_model(GPT2)
    server, client = engine(model), Client([1, 2], 5)

    def fail(*args: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "decode_rows", fail)
        finish(server, client)
    assert client.finish_reason == "error"
    assert finish(server, Client([1, 2], 5)) == generate(model, [[1, 2]], max_new_tokens=5)


def test_a_failed_choice_ends_its_own_request_alone() -> None:
    class Broken:
        def mask(self, logits: torch.Tensor) -> torch.Tensor:
            return logits

        def accept(self, token: int) -> bool:
            raise RuntimeError("too complex")

    model = double_model(GPT2)
    broken, other = Client([1, 2], 5, constraint=Broken()), Client([1, 2], 5)
    finish(engine(model), broken, other)
    assert broken.finish_reason == "error"
    assert other.answer == generate(model, [[1, 2]], max_new_tokens=5)[0]


def test_a_closed_engine_answers_what_it_has() -> None:
    model = double_model(GPT2)
    server, client, done = engine(model), Client([1, 2], 30), threading.Event()
    emit = client.generation.emit
    client.generation.emit = lambda piece: (emit(piece), done.set() if piece.finish_reason else None)[0]  # type: ignore[func-returns-value]
    server.submit([client.generation])
    server.start()
    server.close()
    assert done.is_set() and client.answer == generate(model, [[1, 2]], max_new_tokens=30)[0]
    with pytest.raises(ClosedError):
        server.submit([Client([1]).generation])


# ---- deterministic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", [GPT2, MODERN, MODERN.model_copy(update={"ffn_dim": 37})], ids=["gpt2", "modern", "odd"]
)
def test_deterministic_logits_are_equal_bits_whatever_runs_beside_them(
    form: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In single precision, where every order of summation gives other bits."""
    torch.manual_seed(1)
    model = double_model(form).float()  # type: ignore[arg-type]
    shared = [3, 1, 4, 1, 5, 9, 2, 6] * 5
    wanted = [(shared + prompt)[:60] if i % 3 == 0 else prompt for i, prompt in enumerate(prompts(9))]
    logits = recorded(monkeypatch)
    alone = []
    for prompt in wanted:
        logits.clear()
        finish(engine(model, deterministic=True), Client(prompt, 12))
        alone.append([row for rows in logits.values() for row in rows])
    server = engine(model, deterministic=True)
    assert max(server.rows) in (1, 8)
    logits.clear()
    chooser = random.Random(2)
    clients = [Client(prompt, 12) for prompt in wanted]
    ahead = list(clients)
    while ahead or server.busy:
        for _ in range(min(len(ahead), chooser.randint(0, 2))):
            server.submit([ahead.pop(chooser.randrange(len(ahead))).generation])
        server.step()
    for client, expected in zip(clients, alone, strict=True):
        found = logits[id(client.generation.prompt)]
        assert len(found) == len(expected) == 12
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[torch.Tensor]]:
    """The logits that each prompt's tokens are chosen from."""
    logits: dict[int, list[torch.Tensor]] = {}
    monkeypatch.setattr(Choice, "plain", False)
    choose = engine_module.Generation.choose

    def spy(self: engine_module.Generation, row: torch.Tensor) -> object:
        logits.setdefault(id(self.prompt), []).append(row.clone())
        return choose(self, row)

    monkeypatch.setattr(engine_module.Generation, "choose", spy)
    return logits


def test_rows_that_depend_on_their_neighbours_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double_model(gpt_config(vocab_size=61, emb_dim=32, head_dim=8, ffn_dim=64)).float()
    assert invariant_rows(model, 1) == [1]
    decode = decode_rows

    def noisy(model: GPT, tokens: list[int], caches: list[object], rows: int, step: None) -> torch.Tensor:
        logits = decode(model, tokens, caches, rows)  # type: ignore[arg-type]
        return logits if rows == 1 else logits + torch.arange(len(logits))[:, None] * 1e-6

    monkeypatch.setattr("llm.inference.rows.decode_rows", noisy)
    assert invariant_rows(model, 4) == [1]
