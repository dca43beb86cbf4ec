"""Generation against slower or independent ways to the same tokens: no cache, one row at a time, transformers.

The models are tiny, random and in double precision, with weights large enough that greedy text varies; two ways that
should agree then agree on every token.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.generation import logits_process as warpers

import llm.inference.generate
from llm.common.errors import InputError
from llm.config import GPTConfig
from llm.inference.compiled import compile_step
from llm.inference.generate import generate, stream, stream_text
from llm.inference.int8 import Int8Linear, to_int8
from llm.inference.prefill import PrefixCache
from llm.inference.sampling import GREEDY, Sampling, apply_repetition_penalty, filter_logits, probabilities, sample
from llm.model.gpt import GPT
from llm.model.kv_cache import KVCache
from llm.model.linear import to_packed
from llm.tokenizer.bpe import Tokenizer
from tests.helpers import LLAMA_FORM, gpt_config
from tests.model.test_gpt import gpt2_weights

GPT2 = gpt_config(vocab_size=61, context_length=24, emb_dim=32, head_dim=8, ffn_dim=64)
MODERN = gpt_config(**GPT2.model_dump() | LLAMA_FORM | {"n_kv_heads": 2, "qk_norm": True, "tie_embeddings": False})
NARROW = gpt_config(**MODERN.model_dump() | {"sliding_window": 5})
VOCAB_SIZE = GPT2.vocab_size
PROMPTS = [[5, 17, 3, 44], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [60, 0], [12, 30, 31]]


def make_model(config: GPTConfig) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # random biases would favour the same token everywhere
            torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture(scope="module", params=[GPT2, MODERN], ids=["learned", "rotary"])
def model(request: pytest.FixtureRequest) -> GPT:
    return make_model(request.param)


@torch.no_grad()
def without_cache(model: GPT, prompt: Sequence[int], max_new_tokens: int, stop: Sequence[int] = ()) -> list[int]:
    """Greedy text the slow way: the whole context again for each token, its last half kept when it is full."""
    length = model.config.context_length
    context, new = list(prompt[-length:]), []
    for _ in range(max_new_tokens):
        token = int(model(torch.tensor([context]))[0, -1].argmax())
        if token in stop:
            break
        new.append(token)
        context.append(token)
        if len(context) > length:
            context = context[-length // 2 :]
    return new


class Calls:
    """The shapes of ids that a model is called with while this context is open."""

    def __init__(self, model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, int]] = []
        hidden = model.hidden

        def recorded(idx: Tensor, *args: object) -> Tensor:
            self.shapes.append((idx.shape[0], idx.shape[1]))
            return hidden(idx, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(model, "hidden", recorded)


# ---- cache, batches, contexts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_cache_equals_no_cache(model: GPT, prompt: list[int]) -> None:
    expected = without_cache(model, prompt, 12)
    assert len(set(expected)) > 3  # else the comparison says little
    assert generate(model, [prompt], max_new_tokens=12) == [expected]


def test_batch_of_different_lengths_equals_single_rows(model: GPT) -> None:
    expected = [without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=12) == expected


@pytest.mark.parametrize("prompt_length", [1, 23, 24, 25, 70])
def test_past_the_context_equals_the_naive_way(model: GPT, prompt_length: int) -> None:
    """The model's context holds 24 tokens; a prompt that is longer is read from its last 24."""
    prompt = [(7 * i + 3) % VOCAB_SIZE for i in range(prompt_length)]
    assert generate(model, [prompt], max_new_tokens=60) == [without_cache(model, prompt, 60)]


def test_batch_past_the_context_equals_single_rows(model: GPT) -> None:
    """Rows fill their contexts at different steps, and each is cut at its own."""
    prompts = [*PROMPTS, list(range(24)), list(range(40))]
    expected = [without_cache(model, prompt, 60) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=60) == expected


@pytest.mark.parametrize("context_length", [1, 2, 3])
def test_shortest_contexts(context_length: int) -> None:
    model = make_model(GPT2.model_copy(update={"context_length": context_length}))
    for answer in generate(model, [[1, 2, 3, 4], [5]], max_new_tokens=7):
        assert len(answer) == 7


def test_one_prefill_then_one_token_a_call(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(model, monkeypatch)
    generate(model, [[1, 2, 3], [4]], max_new_tokens=5)
    assert calls.shapes == [(2, 3)] + [(2, 1)] * 4
    calls.shapes.clear()
    generate(model, [[1]], max_new_tokens=50)
    assert [i for i, shape in enumerate(calls.shapes) if shape == (1, 12)] == [24, 37]  # the last half, when it is full
    assert sum(shape == (1, 1) for shape in calls.shapes) == 48


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 99])
def test_the_next_prompt_begins_where_a_row_has_ended(
    model: GPT, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short and long prompts and answers, also past the context, come and go in one batch."""
    prompts = [*PROMPTS, list(range(24)), [7], list(range(40)), *PROMPTS]
    wanted = [(5 * i + 1) % 23 + 40 * (i == 2) for i in range(len(prompts))]
    expected = [without_cache(model, prompt, n) for prompt, n in zip(prompts, wanted, strict=True)]
    calls = Calls(model, monkeypatch)
    assert generate(model, prompts, max_new_tokens=wanted, batch_size=batch_size) == expected
    assert max(rows for rows, _ in calls.shapes) == min(batch_size, sum(n > 0 for n in wanted))
    steps = sum(width == 1 for _, width in calls.shapes)
    assert steps <= sum(wanted) / batch_size + max(wanted), "no place stays empty while a prompt waits"


def test_a_cache_is_allocated_once_and_rows_stay_where_they_are(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    keep = KVCache.keep
    monkeypatch.setattr(KVCache, "keep", lambda cache, rows: (kept.append(rows), keep(cache, rows))[1])
    caches = []
    monkeypatch.setattr(llm.inference.generate, "KVCache", lambda *args: caches.append(args[1]) or KVCache(*args))
    wanted = [2, 9, 9, 4]
    expected = [without_cache(model, prompt, n) for prompt, n in zip(PROMPTS, wanted, strict=False)]
    assert generate(model, PROMPTS[:4], max_new_tokens=wanted) == expected
    assert caches == [4, 4]  # the one that grows, and that of the prompts
    assert kept == [[3, 1, 2], [2, 1]]  # the last row takes the place of one that ended


@pytest.mark.parametrize(
    ("prompts", "common"),
    [([[1, 2, 3, 4, 5], [1, 2, 3], [1, 2, 9, 4]], 2), ([[4, 4, 4]] * 3, 3), ([[7], [7, 1]], 1)],
)
def test_what_prompts_begin_with_is_read_once(
    model: GPT, prompts: list[list[int]], common: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [without_cache(model, prompt, 9) for prompt in prompts]
    calls = Calls(model, monkeypatch)
    assert generate(model, prompts, max_new_tokens=9) == expected
    shared = min(common, min(map(len, prompts)) - 1)  # of each something is left to be read
    assert calls.shapes[:2] == [(1, common), (len(prompts), max(map(len, prompts)) - shared)]


def test_a_prefix_is_read_once_for_all_calls(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    system = [3, 1, 4, 1, 5, 9, 2, 6]
    prefix = PrefixCache()
    calls = Calls(model, monkeypatch)
    read = []
    for prompt in ([*system, 7], [*system, 8, 9], [*system, 8, 9], [2, 7], [2, 7, 1]):
        calls.shapes.clear()
        expected = list(stream(model, prompt, max_new_tokens=30))
        calls.shapes.clear()
        assert list(stream(model, prompt, max_new_tokens=30, prefix=prefix)) == expected
        read.append(calls.shapes[0][1])
    assert read == [9, 2, 1, 2, 1]
    assert generate(model, [[2, 7, 5], [2, 7, 6, 6]], max_new_tokens=5, prefix=prefix) == [
        without_cache(model, [2, 7, 5], 5),
        without_cache(model, [2, 7, 6, 6], 5),
    ]


# ---- drafts ----------------------------------------------------------------------------------------------------------


def make_draft(model: GPT, noise: float) -> GPT:
    """A model that often, and not always, guesses what the other will say."""
    draft = GPT(model.config).double()
    draft.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return draft


@pytest.mark.parametrize("noise", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_the_same_with_a_draft(
    model: GPT, prompt: list[int], noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the context too, and with a stop token and a penalty."""
    draft = make_draft(model, noise)
    for options in ({}, {"stop": {11, 12}}, {"sampling": Sampling(repetition_penalty=1.3)}):
        [expected] = generate(model, [prompt], max_new_tokens=50, **options)  # type: ignore[arg-type]
        calls = Calls(model, monkeypatch)
        found = list(stream(model, prompt, max_new_tokens=50, draft=draft, **options))  # type: ignore[arg-type]
        assert found == expected
        if not noise and len(expected) == 50:
            assert len(calls.shapes) < 25, "the draft is the model itself: every guess is right"


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
def test_samples_with_a_draft_follow_the_models_distribution(noise: float) -> None:
    """Pairs of tokens from a model of five: the second token stands behind a first that was a guess or its repair."""
    model = make_model(GPT2.model_copy(update={"vocab_size": 5, "n_layers": 1}))
    draft = make_draft(model, noise)
    warm = Sampling(temperature=3.0, top_k=4)
    draws = 4000
    counts = torch.zeros(5, 5)
    for seed in range(draws):
        first, second = stream(model, [1, 2], max_new_tokens=2, sampling=warm, seed=seed, draft=draft)
        counts[first, second] += 1
    with torch.no_grad():
        first = probabilities(model(torch.tensor([[1, 2]]))[:, -1], warm)[0]  # [V]
        second = probabilities(model(torch.tensor([[1, 2, token] for token in range(5)]))[:, -1], warm)  # [V, V]
    torch.testing.assert_close(counts.double() / draws, first[:, None] * second, atol=0.03, rtol=0)


def test_a_draft_that_cannot_guess_is_refused(model: GPT) -> None:
    other = make_model(GPT2.model_copy(update={"vocab_size": 60}))
    with pytest.raises(InputError, match="the draft has 60 tokens, the model 61"):
        stream(model, [1], max_new_tokens=3, draft=other)
    short = make_model(GPT2.model_copy(update={"context_length": 8}))
    assert list(stream(model, [1], max_new_tokens=7, draft=short)) == without_cache(model, [1], 7)
    with pytest.raises(InputError, match="the draft reads 8 tokens, and 9 are needed"):
        stream(model, [1], max_new_tokens=8, draft=short)


# ---- the compiled step -----------------------------------------------------------------------------------------------


def as_it_is(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In place of the compiler, what it would compile; returns the lengths of the cache that come to it."""
    lengths: list[int] = []

    def compiled(function: Any, **_: Any) -> Any:
        def call(*arguments: Any) -> Any:
            keys, values = arguments[-2:]
            assert keys.shape == values.shape
            lengths.append(keys.shape[2])
            with monkeypatch.context() as reading:
                reading.setattr(torch.compiler, "is_compiling", lambda: True)
                reading.setattr("llm.inference.generate.while_loop", plain_loop)
                return function(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    return lengths


def plain_loop(is_left: Any, body: Any, carried: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    while is_left(*carried):
        carried = body(*carried)
    return carried


@pytest.mark.parametrize("config", [GPT2, MODERN, NARROW], ids=["learned", "rotary", "sliding window"])
def test_a_compiled_step_is_that_of_a_single_row(config: GPTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens, past the context too; prompts and batches run as before."""
    model = make_model(config)
    alone = [generate(model, [prompt], max_new_tokens=40)[0] for prompt in PROMPTS]
    lengths = as_it_is(monkeypatch)
    compile_step(model)
    lengths.clear()
    assert generate(model, PROMPTS[:1], max_new_tokens=5) == [alone[0][:5]]
    assert lengths == [len(PROMPTS[0]) + n for n in range(1, 5)], "a step for all tokens but the prompt's"
    assert [generate(model, [prompt], max_new_tokens=40)[0] for prompt in PROMPTS] == alone
    lengths.clear()
    assert generate(model, PROMPTS, max_new_tokens=40) == alone
    assert not lengths
    # The last row of a batch goes on alone, with padding before it.
    assert generate(model, PROMPTS[1:3], max_new_tokens=[40, 3]) == [alone[1], alone[2][:3]]
    assert len(lengths) >= 10


@pytest.mark.parametrize("config", [GPT2, MODERN, NARROW], ids=["learned", "rotary", "sliding window"])
@torch.no_grad()
def test_a_compiled_step_has_the_logits_and_the_cache_of_a_plain_one(
    config: GPTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_model(config)
    model = copy.deepcopy(plain)
    lengths = as_it_is(monkeypatch)
    compile_step(model)
    lengths.clear()
    for pad in (None, torch.tensor([2])):
        caches = [KVCache(config, 1, 12, dtype=torch.float64) for _ in range(2)]
        for tokens in ([7, 8, 9], [10], [11], [12], [13], [14]):
            idx = torch.tensor([tokens])
            expected, found = (each(idx, cache, pad) for each, cache in zip((plain, model), caches, strict=True))
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        assert caches[1].length == caches[0].length == 8
        torch.testing.assert_close(caches[1].keys, caches[0].keys, atol=1e-12, rtol=0)
        torch.testing.assert_close(caches[1].values, caches[0].values, atol=1e-12, rtol=0)
    assert lengths == [4, 5, 6, 7, 8] * 2
    full = KVCache(config, 1, 3, dtype=torch.float64)
    model(torch.tensor([[7, 8, 9]]), full)
    with pytest.raises(ValueError, match="the cache holds 3 tokens, 4 were asked for"):
        model(torch.tensor([[10]]), full)
    longer = KVCache(config, 1, config.context_length + 1, dtype=torch.float64)
    longer.length = config.context_length
    with pytest.raises(ValueError, match=f"exceed the context length {config.context_length}"):
        model(torch.tensor([[10]]), longer)


def test_gradients_are_not_those_of_a_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(GPT2)
    lengths = as_it_is(monkeypatch)
    compile_step(model)
    lengths.clear()
    model(torch.tensor([[10]])).sum().backward()
    with torch.no_grad():
        cache = KVCache(GPT2, 1, 12, dtype=torch.float64)
        model(torch.tensor([[7, 8, 9]]), cache)
    model(torch.tensor([[10]]), cache)
    assert not lengths
    assert all(parameter.grad is not None for parameter in model.blocks.parameters())


def test_what_trains_on_is_what_a_compiled_step_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are changed where they lie, as optimizers do it."""
    model = make_model(MODERN)
    as_it_is(monkeypatch)
    compile_step(model)
    before = generate(model, PROMPTS[:1], max_new_tokens=12)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(1.5)
    plain = GPT(MODERN).double()
    plain.load_state_dict(model.state_dict())
    assert generate(model, PROMPTS[:1], max_new_tokens=12) == generate(plain, PROMPTS[:1], max_new_tokens=12) != before


def test_a_compiled_step_multiplies_weights_of_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly those rounded weights, without rounding its inputs."""
    model = make_model(MODERN).float()
    to_int8(model)
    exact = copy.deepcopy(model)
    for part in list(exact.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, Int8Linear):
                layer = torch.nn.Linear(child.weight.shape[1], child.weight.shape[0], bias=child.bias is not None)
                layer.weight.data, layer.bias = child.weight * child.scale.float()[:, None], child.bias
                setattr(part, name, layer)
    as_it_is(monkeypatch)
    compile_step(model)
    for token in range(8):  # of longer prompts the inputs are rounded
        assert generate(model, [[token]], max_new_tokens=12) == generate(exact, [[token]], max_new_tokens=12)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")
def test_the_compiler_compiles_the_step() -> None:
    """Of several models in one process, of equal and of other sizes, for caches of any size and number of rows."""

    def texts(model: GPT) -> list[list[list[int]]]:
        alone = [generate(model, PROMPTS[:1], max_new_tokens=n) for n in (10, 17, 40)]
        last = [generate(model, PROMPTS[:n], max_new_tokens=[2] * (n - 1) + [20]) for n in (2, 3)]  # goes on alone
        return alone + last

    models = [make_model(config).float() for config in (GPT2, NARROW, MODERN)]
    models.append(copy.deepcopy(models[-1]))
    to_int8(models[-1])
    expected = [texts(model) for model in models]
    for model in models:
        compile_step(model)
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert [texts(model) for model in models] == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations, "all was compiled at the call"


def test_a_compiler_that_fails_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the model stays as it was."""

    def failing(function: Any, **_: Any) -> Any:
        def call(*_: Any) -> None:
            raise RuntimeError("no g++ here\nand more")

        return call

    model = make_model(GPT2)
    expected = generate(model, PROMPTS[:1], max_new_tokens=5)
    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(InputError, match=r"^the step could not be compiled, .* is needed: no g\+\+ here$"):
        compile_step(model)
    assert generate(model, PROMPTS[:1], max_new_tokens=5) == expected


def test_a_packed_model_is_not_compiled() -> None:
    """What is packed is in no state of the layers: the first block's would be taken for all."""
    model = make_model(GPT2).float()
    to_packed(model)
    with pytest.raises(InputError, match="the step of a packed model cannot be compiled"):
        compile_step(model)


def test_no_dropout_and_the_mode_is_kept() -> None:
    model = make_model(MODERN)
    model.set_dropout(0.9)
    expected = generate(model, PROMPTS, max_new_tokens=10)
    model.train()
    assert generate(model, PROMPTS, max_new_tokens=10) == expected
    assert model.training


# ---- stop ------------------------------------------------------------------------------------------------------------


def test_each_row_ends_before_its_stop_token_and_leaves_the_batch(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    free = generate(model, PROMPTS, max_new_tokens=40)
    stop = {free[0][2], free[2][9]}
    expected = [without_cache(model, prompt, 40, tuple(stop)) for prompt in PROMPTS]
    assert len({len(answer) for answer in expected}) > 2  # rows end at different steps
    calls = Calls(model, monkeypatch)
    assert generate(model, PROMPTS, max_new_tokens=40, stop=stop) == expected
    running = [sum(len(answer) >= step for answer in expected) for step in range(40)]
    assert [rows for rows, _ in calls.shapes] == [rows for rows in running if rows]


def test_stop_at_once(model: GPT) -> None:
    assert generate(model, [[1, 2], [3]], max_new_tokens=5, stop=range(VOCAB_SIZE)) == [[], []]


def test_nothing_asked(model: GPT) -> None:
    assert generate(model, [[1, 2]], max_new_tokens=0) == [[]]
    assert generate(model, [], max_new_tokens=5) == []


# ---- sampling --------------------------------------------------------------------------------------------------------

PROBABILITIES = torch.tensor([[0.05, 0.4, 0.1, 0.25, 0.2], [0.96, 0.01, 0.01, 0.01, 0.01]])


def kept(**options: float) -> list[list[int]]:
    filtered = filter_logits(PROBABILITIES.log(), Sampling(temperature=1.0, **options))  # type: ignore[arg-type]
    return [row.isfinite().nonzero().flatten().tolist() for row in filtered]


def test_filters_keep_exactly_the_expected_tokens() -> None:
    assert kept(top_k=3)[0] == [1, 3, 4]
    assert kept(top_k=1) == [[1], [0]]
    assert kept(top_k=99) == [[0, 1, 2, 3, 4]] * 2
    assert kept(top_p=0.6) == [[1, 3], [0]]
    assert kept(top_p=0.7) == [[1, 3, 4], [0]]
    assert kept(top_p=0.01) == [[1], [0]]
    assert kept(top_p=1.0) == [[0, 1, 2, 3, 4]] * 2
    assert kept(min_p=0.45) == [[1, 3, 4], [0]]
    assert kept(min_p=1.0) == [[1], [0]]
    assert kept(min_p=0.0) == [[0, 1, 2, 3, 4]] * 2


def test_filters_apply_one_after_the_other() -> None:
    """0.4 and 0.25 are 0.65 of everything, but 0.76 of the three tokens that top-k leaves."""
    assert kept(top_p=0.7)[0] == [1, 3, 4]
    assert kept(top_p=0.7, top_k=3)[0] == [1, 3]


def test_equal_logits_keep_k_tokens() -> None:
    assert filter_logits(torch.zeros(1, 9), Sampling(temperature=1.0, top_k=4)).isfinite().sum() == 4


def test_filters_equal_those_of_transformers() -> None:
    logits = 3 * torch.randn(50, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(VOCAB_SIZE, (50, 20), generator=torch.Generator().manual_seed(2))
    for ours, theirs in [
        (filter_logits(logits, Sampling(top_k=7)), warpers.TopKLogitsWarper(7)),
        (filter_logits(logits, Sampling(top_p=0.83)), warpers.TopPLogitsWarper(0.83)),
        (filter_logits(logits, Sampling(min_p=0.07)), warpers.MinPLogitsWarper(0.07)),
        (
            apply_repetition_penalty(logits, torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True), 1.4),
            warpers.RepetitionPenaltyLogitsProcessor(1.4),
        ),
    ]:
        torch.testing.assert_close(ours, theirs(ids, logits))


def test_samples_follow_the_distribution() -> None:
    """20,000 draws at temperature 0.5: the probabilities are squared and normalised again."""
    rows = 20_000
    generators = [torch.Generator().manual_seed(row) for row in range(rows)]
    logits = PROBABILITIES[:1].log().expand(rows, -1)
    counts = sample(logits, Sampling(temperature=0.5), generators).bincount(minlength=5)
    expected = PROBABILITIES[0].square() / PROBABILITIES[0].square().sum()
    torch.testing.assert_close(counts / rows, expected, atol=0.012, rtol=0)  # more than three standard deviations


def test_temperature_near_zero_is_greedy(model: GPT) -> None:
    greedy = generate(model, PROMPTS, max_new_tokens=10)
    assert generate(model, PROMPTS, max_new_tokens=10, sampling=Sampling(temperature=1e-30)) == greedy
    assert generate(model, PROMPTS, max_new_tokens=10, sampling=Sampling(temperature=5.0, top_k=1)) == greedy


def test_seeds(model: GPT) -> None:
    warm = Sampling(temperature=1.5)
    first = generate(model, PROMPTS, max_new_tokens=10, sampling=warm, seed=1)
    assert generate(model, PROMPTS, max_new_tokens=10, sampling=warm, seed=1) == first
    assert generate(model, PROMPTS, max_new_tokens=10, sampling=warm, seed=2) != first
    equal_prompts = generate(model, [[1, 2]] * 4, max_new_tokens=10, sampling=warm)
    assert len({tuple(answer) for answer in equal_prompts}) == 4  # each row has a seed of its own


def test_a_sample_does_not_depend_on_the_other_rows(model: GPT) -> None:
    sampling = Sampling(temperature=1.2, top_p=0.9)
    together = generate(model, PROMPTS, max_new_tokens=40, sampling=sampling, seed=7, stop={11})
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], max_new_tokens=40, sampling=sampling, seed=7 + row, stop={11})
        assert alone == [together[row]]


def test_repetition_penalty_counts_prompt_and_answer(model: GPT) -> None:
    """A penalty beyond any logit's size: no token comes twice."""
    answers = generate(model, PROMPTS, max_new_tokens=15, sampling=Sampling(repetition_penalty=1e9), stop={11})
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(set(prompt + answer)) == len(prompt + answer)
    assert answers != generate(model, PROMPTS, max_new_tokens=15, stop={11})


def test_stream_gives_the_same_tokens(model: GPT) -> None:
    for sampling in (GREEDY, Sampling(temperature=1.3, top_k=9, min_p=0.01, repetition_penalty=1.2)):
        [expected] = generate(model, [PROMPTS[0]], max_new_tokens=40, sampling=sampling, seed=3, stop={11})
        tokens = stream(model, PROMPTS[0], max_new_tokens=40, sampling=sampling, seed=3, stop={11})
        assert list(tokens) == expected


def test_stream_computes_only_what_is_read(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(model, monkeypatch)
    tokens = stream(model, PROMPTS[0], max_new_tokens=40)
    next(tokens), next(tokens)
    assert len(calls.shapes) == 2


# ---- text ------------------------------------------------------------------------------------------------------------


def test_streamed_text_never_cuts_a_character() -> None:
    tokenizer = Tokenizer.train(["one morning the baker sold bread"] * 3, vocab_size=280)
    text = "a café, 漢字 and 👩‍👦"
    ids = tokenizer.encode(text)
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) and len(pieces) > 10
    assert "".join(stream_text(tokenizer, ids[:-1])).endswith("\ufffd")  # a character that never came whole


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, "temperature must be 0 .* found -0.5"),
        ({"temperature": float("nan")}, "temperature must be 0 .* found nan"),
        ({"top_k": 0}, "top_k must be 1 or more, found 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, found 0.0"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
    ],
)
def test_sampling_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("max_new_tokens", "seed", "message"),
    [(-1, 0, "max_new_tokens must be 0 or more, found -1"), (3, -1, "seed must be between 0")],
)
def test_length_and_seed_out_of_range(model: GPT, max_new_tokens: int, seed: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(model, [[1]], max_new_tokens=max_new_tokens, seed=seed)
    with pytest.raises(InputError, match=message):
        stream(model, [1], max_new_tokens=max_new_tokens, seed=seed)


def test_numbers_for_each_prompt_and_places(model: GPT) -> None:
    with pytest.raises(InputError, match="max_new_tokens: expected a number for each of 2 prompts, found 1"):
        generate(model, [[1], [2]], max_new_tokens=[3])
    with pytest.raises(InputError, match="max_new_tokens must be 0 or more, found -2"):
        generate(model, [[1], [2]], max_new_tokens=[3, -2])
    with pytest.raises(InputError, match="batch_size must be 1 or more, found 0"):
        generate(model, [[1], [2]], max_new_tokens=3, batch_size=0)
    assert generate(model, [[1], [2]], max_new_tokens=[0, 2])[0] == []


def test_empty_prompts(model: GPT) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        generate(model, [[]], max_new_tokens=3)
    with pytest.raises(InputError, match="prompt 2 of 3 is empty"):
        generate(model, [[1], [], [2]], max_new_tokens=3)


# ---- transformers ----------------------------------------------------------------------------------------------------


def test_greedy_text_equals_that_of_transformers() -> None:
    """The same weights in GPT2LMHeadModel: one row, a left-padded batch with an end token, a repetition penalty."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=GPT2.context_length,
            n_embd=GPT2.emb_dim,
            n_layer=GPT2.n_layers,
            n_head=GPT2.n_heads,
            n_inner=GPT2.ffn_dim,
            initializer_range=0.4,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    theirs = theirs.double().eval()
    ours = make_model(GPT2)
    ours.load_state_dict(gpt2_weights(theirs))

    def expected(prompts: list[list[int]], end: int, **options: float) -> list[list[int]]:
        width = max(map(len, prompts))
        idx = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        found = theirs.generate(
            idx, attention_mask=mask, max_new_tokens=14, do_sample=False, eos_token_id=end, pad_token_id=end, **options
        )[:, width:].tolist()
        return [row[: row.index(end)] if end in row else row for row in found]

    free = generate(ours, PROMPTS, max_new_tokens=14)
    end = free[0][5]
    answers = generate(ours, PROMPTS, max_new_tokens=14, stop={end})
    assert {len(answer) for answer in answers} >= {free[0].index(end), 14}
    assert answers == expected(PROMPTS, end)
    assert [generate(ours, [prompt], max_new_tokens=14, stop={end})[0] for prompt in PROMPTS] == answers
    penalised = generate(ours, PROMPTS[:1], max_new_tokens=14, stop={end}, sampling=Sampling(repetition_penalty=1.5))
    assert penalised == expected(PROMPTS[:1], end, repetition_penalty=1.5)
