"""Generation against slower or independent ways to the same tokens: no cache, one row at a time, transformers.

The models are tiny, random and in double precision, with weights large enough that greedy text varies; two ways that
should agree then agree on every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import transformers
from torch import Tensor
from transformers.generation import logits_process as warpers

from llm.config import GPTConfig, InputError
from llm.generate import GREEDY, Sampling, filter_logits, generate, penalise, sample, stream, stream_text
from llm.model import GPT
from llm.tokenizer import Tokenizer
from tests.helpers import LLAMA_FORM, gpt_config
from tests.test_model import gpt2_weights

GPT2 = gpt_config(vocab_size=61, context_length=24, emb_dim=32, head_dim=8, ffn_dim=64)
MODERN = gpt_config(**GPT2.model_dump() | LLAMA_FORM | {"n_kv_heads": 2, "qk_norm": True, "tie_embeddings": False})
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
            penalise(logits, torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True), 1.4),
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
