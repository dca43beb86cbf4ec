"""A decode step of many rows: by kernels, by PyTorch and compiled, against each row by the model itself."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.config import GPTConfig
from llm.inference import compiled, rows
from llm.inference.aot import Code
from llm.inference.compiled import CompiledDecoder, CompiledRows
from llm.inference.generate import generate
from llm.inference.int8 import to_int8
from llm.inference.packed import to_packed
from llm.inference.prefill import new_kv_cache
from llm.inference.rows import Step, decode_rows, has_row_kernels, invariant_rows
from llm.model.gpt import GPT
from llm.model.kv_cache import KVCache
from tests.inference.conftest import GPT2, MIXED, MODERN, NARROW, PROMPTS, make_model
from tests.inference.test_compiled import plain_loop

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the kernels need g++"),
    pytest.mark.usefixtures("kernels"),
]
every_config = pytest.mark.parametrize(
    "config", [GPT2, MODERN, NARROW, MIXED], ids=["learned", "rotary", "sliding window", "several kinds of layers"]
)
LENGTHS, TOKENS = [3, 1, 9, 6], [7, 8, 9, 10]


every_cache = pytest.mark.parametrize("int8_cache", [False, True], ids=["fp32", "int8"])


def single_model(config: GPTConfig, int8_cache: bool = False) -> GPT:
    model = make_model(config).float()
    model.int8_cache = int8_cache
    return model


def caches_of(model: GPT) -> list[KVCache]:
    """Return caches with prompts of different lengths."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in LENGTHS:
        cache = new_kv_cache(model, 1, length + 3)
        with torch.inference_mode():
            model(torch.randint(61, (1, length), generator=generator), cache)
        found.append(cache)
    return found


def uncompiled(monkeypatch: pytest.MonkeyPatch, make: Callable[[GPT], Any], model: GPT) -> Any:
    """Return what `make` makes of the model, with the plain Python of its compiled step."""

    def compile_nothing(function: Code, *_: Any) -> Code:
        def call(tensors: list[Tensor]) -> Tensor:
            with monkeypatch.context() as tracing:
                tracing.setattr(compiled, "while_loop", plain_loop)
                return function(tensors)

        return call

    with monkeypatch.context() as making:
        making.setattr(compiled, "compile_ahead", compile_nothing)
        return make(model)


def uncompiled_rows(model: GPT, monkeypatch: pytest.MonkeyPatch) -> CompiledRows:
    step: CompiledRows = uncompiled(monkeypatch, CompiledRows, model)
    return step


def check(model: GPT, step: Step | None, n_products: int = 0) -> None:
    """Compare two steps of all rows with the model's own, in logits and caches."""
    mine, plain = caches_of(model), caches_of(model)
    for tokens in (TOKENS, TOKENS[::-1]):
        logits = decode_rows(model, tokens, mine, n_products, step)
        with torch.inference_mode():
            expected = torch.cat([model(torch.tensor([[t]]), c)[:, 0] for t, c in zip(tokens, plain, strict=True)])
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    for ours, theirs in zip(mine, plain, strict=True):
        assert ours.length == theirs.length
        for part in ("keys", "values"):
            mine_now, plain_now = (cache.decode(getattr(cache, part)) for cache in (ours, theirs))
            # Equal up to rounding; in 8 bits a number between two steps may go to either.
            torch.testing.assert_close(mine_now, plain_now, atol=0.05 if ours.int8 else 1e-4, rtol=1e-4)


@every_config
@every_cache
@pytest.mark.parametrize("way", ["kernel", "PyTorch", "step"])
def test_rows_are_each_by_itself(
    config: GPTConfig, int8_cache: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = single_model(config, int8_cache)
    assert has_row_kernels(model) and not has_row_kernels(make_model(config))
    monkeypatch.setattr(rows, "_by_kernel" if way == "PyTorch" else "_one_by_one", None)  # the other way is not taken
    if way == "PyTorch":
        monkeypatch.setattr(rows, "has_row_kernels", lambda model: False)
    step = uncompiled_rows(copy.deepcopy(model), monkeypatch) if way == "step" else None
    check(model, step)
    check(model, step, n_products=8)


@every_config
@every_cache
def test_a_single_row_takes_the_kernels_step(
    config: GPTConfig, int8_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare logits and caches with the model's, up to the cache's last place, with padding too."""
    plain, n_calls = single_model(config, int8_cache), 0
    decoder = uncompiled(monkeypatch, CompiledDecoder, copy.deepcopy(plain))
    assert isinstance(decoder._decode, compiled._KernelStep)
    step = decoder._decode.step

    def counted(*inputs: Tensor) -> Tensor:
        nonlocal n_calls
        n_calls += 1
        found: Tensor = step(*inputs)
        return found

    decoder._decode.step = counted
    for pad in (None, torch.tensor([2])):
        caches = [new_kv_cache(plain, 2, 8) for _ in range(2)]  # of whose two rows the first is used
        with torch.inference_mode():
            for tokens in ([7, 8, 9], [10], [11], [12], [13], [14]):
                idx = torch.tensor([tokens])
                expected, found = (each(idx, cache, pad) for each, cache in zip((plain, decoder), caches, strict=True))
                torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
            with pytest.raises(ValueError, match="the cache holds 8 tokens, 9 were asked for"):
                decoder(torch.tensor([[15]]), caches[1], pad)
        assert caches[1].length == caches[0].length == 8
        keys, plain_keys = (cache.decode(cache.keys[:, :1]) for cache in caches)
        torch.testing.assert_close(keys, plain_keys, atol=0.05 if int8_cache else 1e-4, rtol=1e-4)
    assert n_calls == 10


def test_a_cache_of_another_kind_does_not_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the bytes for other numbers."""
    model = single_model(MODERN)
    decoder = uncompiled(monkeypatch, CompiledDecoder, copy.deepcopy(model))
    decoder._decode = None
    caches = [KVCache(MODERN, 1, 9, int8=True) for _ in range(2)]
    with torch.inference_mode():
        for idx in (torch.tensor([[7, 8]]), torch.tensor([[5]])):
            assert torch.equal(*(each(idx, cache) for each, cache in zip((model, decoder), caches, strict=True)))
    with pytest.raises(ValueError, match=r"takes a cache in fp32 or of 8 bits, not torch\.float64"):
        decode_rows(model, [7], [KVCache(MODERN, 1, 2, dtype=torch.float64)])


def test_a_single_row_takes_the_step_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    model = single_model(MODERN)
    step = uncompiled_rows(copy.deepcopy(model), monkeypatch)
    one, other = caches_of(model)[:1], caches_of(model)[:1]
    logits = decode_rows(model, [5], one, step=step)
    assert logits.shape == (1, 61)
    torch.testing.assert_close(logits, decode_rows(model, [5], other), atol=2e-4, rtol=1e-4)


@every_cache
def test_packed_weights_have_equal_bits_whatever_runs_beside_a_row(int8_cache: bool) -> None:
    model = single_model(MODERN, int8_cache)
    to_packed(model)
    caches = caches_of(model)
    together = decode_rows(model, TOKENS, caches)
    for row, cache in enumerate(caches_of(model)):
        assert torch.equal(decode_rows(model, TOKENS[row : row + 1], [cache])[0], together[row])
    assert invariant_rows(model, 8) == [1, 2, 4, 8]


@every_config
@every_cache
def test_a_batch_takes_the_compiled_step(config: GPTConfig, int8_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the logits of rows with padding in one cache."""
    model = single_model(config, int8_cache)
    to_packed(model)
    monkeypatch.setattr(compiled, "_KernelStep", lambda model: None)
    decoder = CompiledDecoder(model)
    calls, step = [], uncompiled_rows(copy.deepcopy(model), monkeypatch)
    decoder._decode_rows = lambda *inputs: calls.append(len(inputs[0])) or step(*inputs)  # type: ignore[assignment, func-returns-value]
    pad = torch.tensor([2, 0, 1])
    ours, theirs = (new_kv_cache(model, 4, 9) for _ in range(2))
    idx = torch.randint(61, (3, 4), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for cache in (ours, theirs):
            model(idx, cache, pad)
        for tokens in ([5, 6, 7], [8, 9, 10]):
            expected = model(torch.tensor(tokens)[:, None], theirs, pad)
            found = decoder(torch.tensor(tokens)[:, None], ours, pad)
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert ours.length == theirs.length == 6 and calls == [3, 3]


@every_config
@every_cache
@pytest.mark.parametrize("pad", [None, torch.tensor([1])], ids=["whole", "padded"])
def test_a_few_tokens_of_a_row_take_the_compiled_step(
    config: GPTConfig, int8_cache: bool, pad: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speculative decoding verifies them so, and takes some of them back."""
    model = single_model(config, int8_cache)
    to_packed(model)
    monkeypatch.setattr(compiled, "_KernelStep", lambda model: None)
    monkeypatch.setattr(compiled, "FEW_TOKENS", 3)
    decoder = CompiledDecoder(model)
    calls, step = [], uncompiled_rows(copy.deepcopy(model), monkeypatch)
    decoder._decode_rows = lambda *inputs: calls.append(len(inputs[0])) or step(*inputs)  # type: ignore[assignment, func-returns-value]
    ours, theirs = (new_kv_cache(model, 1, 12) for _ in range(2))
    with torch.inference_mode():
        for kept, tokens in ((0, [3, 1, 4]), (3, [1, 5, 9]), (4, [2, 6]), (6, [5, 3, 5, 8]), (9, [9, 7, 9])):
            ours.length = theirs.length = kept
            expected, found = (each(torch.tensor([tokens]), c, pad) for each, c in ((model, theirs), (decoder, ours)))
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
            assert ours.length == theirs.length == kept + len(tokens)
        assert calls == [3, 2, 3], "neither a prompt nor more tokens than a few"
        ours.length = 11
        with pytest.raises(ValueError, match="13 "):
            decoder(torch.tensor([[5, 6]]), ours, pad)


def test_plain_weights_stay_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their products of a few rows are faster there."""
    model = single_model(MODERN)
    monkeypatch.setattr(compiled, "_KernelStep", lambda model: None)
    monkeypatch.setattr(compiled, "CompiledRows", None)
    decoder, caches = CompiledDecoder(model), [new_kv_cache(model, 2, 9) for _ in range(2)]
    with torch.inference_mode():
        for idx in (torch.tensor([[7, 8], [9, 7]]), torch.tensor([[5], [6]])):
            assert torch.equal(*(each(idx, cache) for each, cache in zip((model, decoder), caches, strict=True)))
        caches = [new_kv_cache(model, 1, 9) for _ in range(2)]
        for idx in (torch.tensor([[7, 8]]), torch.tensor([[5, 6, 7]])):
            assert torch.equal(*(each(idx, cache) for each, cache in zip((model, decoder), caches, strict=True)))


def test_a_full_cache_is_an_error() -> None:
    """The kernel would write behind it."""
    model, cache = single_model(MODERN), KVCache(MODERN, 1, 2)
    for token in (5, 6):
        decode_rows(model, [token], [cache])
    with pytest.raises(ValueError, match="the cache holds 2 tokens, 3 were asked for"):
        decode_rows(model, [7], [cache])


def test_a_batch_and_a_row_share_the_stacked_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights trained in place reach both, and are in memory once."""
    model, made = single_model(MODERN), []

    def compile_nothing(function: Code, tensors: list[Tensor], *_: Any) -> Code:
        made.append(tensors[:-3])
        return lambda _: torch.zeros(3, 1)

    to_packed(model)
    monkeypatch.setattr(compiled, "compile_ahead", compile_nothing)
    decoder = CompiledDecoder(model)
    with torch.inference_mode():
        cache = KVCache(MODERN, 2, 4)
        cache.length = 1
        decoder(torch.tensor([[5], [6]]), cache)
    assert len(made) == 2 and len(made[0]) == len(made[1]) > 10
    assert all(one is other for one, other in zip(*made, strict=True))


def test_without_kernels_a_batch_runs_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(MODERN)  # in fp64
    monkeypatch.setattr(compiled, "_CompiledStep", lambda model: model)
    decoder = CompiledDecoder(model)
    assert generate(decoder, PROMPTS[:3], max_new_tokens=9) == generate(model, PROMPTS[:3], max_new_tokens=9)
    assert decoder._decode_rows is None


@pytest.mark.slow
def test_compiled_rows_are_the_models_own() -> None:
    """Compile once for any number of rows, plain weights and rounded ones."""
    for config, change, int8_cache in ((GPT2, to_packed, False), (MIXED, to_int8, True)):
        model = single_model(config, int8_cache)
        change(model)
        plain = copy.deepcopy(model)
        step = CompiledRows(model)
        for n in (1, 2, 4):
            ours, theirs = caches_of(plain)[:n], caches_of(plain)[:n]
            found = decode_rows(model, TOKENS[:n], ours, step=step)
            expected: Tensor = decode_rows(plain, TOKENS[:n], theirs)
            torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
