"""Generation against slower or independent ways to the same tokens: no cache, one row at a time, transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

import llm.inference.prefill
from llm.common.errors import InputError
from llm.inference.generate import generate, stream, stream_text
from llm.inference.prefill import PrefixCache
from llm.inference.sampling import GREEDY, Sampling
from llm.model.gpt import GPT
from llm.model.kv_cache import KVCache
from llm.tokenizer.bpe import Tokenizer
from tests.inference.conftest import GPT2, MODERN, PROMPTS, Calls, make_model, without_cache
from tests.model.test_gpt import gpt2_weights

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
def test_text_past_the_context_equals_no_cache(model: GPT, prompt_length: int) -> None:
    """The model's context holds 24 tokens; a prompt that is longer is read from its last 24."""
    prompt = [(7 * i + 3) % GPT2.vocab_size for i in range(prompt_length)]
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
def test_a_waiting_prompt_takes_the_row_of_one_that_ended(
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
    reorder = KVCache.reorder
    monkeypatch.setattr(KVCache, "reorder", lambda cache, rows: (kept.append(rows), reorder(cache, rows))[1])
    caches = []
    monkeypatch.setattr(llm.inference.prefill, "KVCache", lambda *args: caches.append(args[1]) or KVCache(*args))
    wanted = [2, 9, 9, 4]
    expected = [without_cache(model, prompt, n) for prompt, n in zip(PROMPTS, wanted, strict=False)]
    assert generate(model, PROMPTS[:4], max_new_tokens=wanted) == expected
    assert caches == [4, 4]  # the one that grows, and that of the prompts
    assert kept == [[3, 1, 2], [2, 1]]  # the last row takes the place of one that ended


@pytest.mark.parametrize(
    ("prompts", "common"),
    [([[1, 2, 3, 4, 5], [1, 2, 3], [1, 2, 9, 4]], 2), ([[4, 4, 4]] * 3, 3), ([[7], [7, 1]], 1)],
)
def test_a_common_prefix_is_read_once(
    model: GPT, prompts: list[list[int]], common: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [without_cache(model, prompt, 9) for prompt in prompts]
    calls = Calls(model, monkeypatch)
    assert generate(model, prompts, max_new_tokens=9) == expected
    shared = min(common, min(map(len, prompts)) - 1)  # of each something is left to be read
    assert calls.shapes[:2] == [(1, common), (len(prompts), max(map(len, prompts)) - shared)]


def test_the_prefix_cache_is_reused_across_calls(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_stop_token_at_once_gives_no_tokens(model: GPT) -> None:
    assert generate(model, [[1, 2], [3]], max_new_tokens=5, stop=range(GPT2.vocab_size)) == [[], []]


def test_no_new_tokens_and_no_prompts(model: GPT) -> None:
    assert generate(model, [[1, 2]], max_new_tokens=0) == [[]]
    assert generate(model, [], max_new_tokens=5) == []


# ---- sampled text, streams -------------------------------------------------------------------------------------------


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
    ("max_new_tokens", "seed", "message"),
    [(-1, 0, "max_new_tokens must be 0 or more, found -1"), (3, -1, "seed must be between 0")],
)
def test_max_new_tokens_and_seed_out_of_range(model: GPT, max_new_tokens: int, seed: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(model, [[1]], max_new_tokens=max_new_tokens, seed=seed)
    with pytest.raises(InputError, match=message):
        stream(model, [1], max_new_tokens=max_new_tokens, seed=seed)


def test_limits_and_batch_size_out_of_range(model: GPT) -> None:
    with pytest.raises(InputError, match="max_new_tokens: expected a number for each of 2 prompts, found 1"):
        generate(model, [[1], [2]], max_new_tokens=[3])
    with pytest.raises(InputError, match="max_new_tokens must be 0 or more, found -2"):
        generate(model, [[1], [2]], max_new_tokens=[3, -2])
    with pytest.raises(InputError, match="batch_size must be 1 or more, found 0"):
        generate(model, [[1], [2]], max_new_tokens=3, batch_size=0)
    assert generate(model, [[1], [2]], max_new_tokens=[0, 2])[0] == []


def test_empty_prompts_are_refused(model: GPT) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        generate(model, [[]], max_new_tokens=3)
    with pytest.raises(InputError, match="prompt 2 of 3 is empty"):
        generate(model, [[1], [], [2]], max_new_tokens=3)


# ---- transformers ----------------------------------------------------------------------------------------------------


def test_greedy_text_equals_that_of_transformers() -> None:
    """Compare with GPT2LMHeadModel: one row, a left-padded batch with an end token, a repetition penalty."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=GPT2.vocab_size,
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
