"""Compiled decoding of a single row against the plain model, in float64."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.common.errors import InputError
from llm.config import GPTConfig
from llm.inference import aot, compiled
from llm.inference.aot import Code
from llm.inference.compiled import CompiledDecoder
from llm.inference.generate import generate, stream
from llm.inference.int8 import to_int8
from llm.inference.prefill import new_kv_cache
from llm.inference.request import Decoder
from llm.model.gpt import GPT
from llm.model.kv_cache import KVCache
from tests.helpers import gpt_config
from tests.inference.conftest import GPT2, MIXED, MODERN, NARROW, PROMPTS, make_model

every_config = pytest.mark.parametrize(
    "config", [GPT2, MODERN, NARROW, MIXED], ids=["learned", "rotary", "sliding window", "several kinds of layers"]
)


def uncompiled_decoder(model: GPT, monkeypatch: pytest.MonkeyPatch) -> tuple[CompiledDecoder, list[int]]:
    """Return a decoder with the plain Python of its step, and a list of the cache lengths that it is called with."""
    lengths: list[int] = []

    def compile_nothing(function: Code, tensors: list[Tensor], *_: Any) -> Code:
        n_inputs = 3 + (4 if model.int8_cache else 2)

        def call(given: list[Tensor]) -> Tensor:
            assert len(given) == len(tensors)
            lengths.append(len(given[-n_inputs:][2]))
            with monkeypatch.context() as tracing:
                tracing.setattr(torch.compiler, "is_compiling", lambda: True)
                tracing.setattr(compiled, "while_loop", plain_loop)
                return function(given)

        return call

    monkeypatch.setattr(compiled, "compile_ahead", compile_nothing)
    return CompiledDecoder(model), lengths


def graph_decoder(model: GPT, monkeypatch: pytest.MonkeyPatch) -> tuple[CompiledDecoder, list[int]]:
    """Return a decoder with the CUDA graph's step, on a CPU, and a list of the cache lengths that it is called with."""
    lengths: list[int] = []
    decode_at = compiled._decode_at

    def recorded(model: GPT, idx: Tensor, pad: Tensor, position: Tensor, cache: KVCache) -> Tensor:
        lengths.append(int(position) + 1)
        return decode_at(model, idx, pad, position, cache)

    monkeypatch.setattr(compiled, "_CompiledStep", compiled._CudaGraphStep)
    monkeypatch.setattr(compiled, "_capture_graph", lambda work: work)
    monkeypatch.setattr(compiled, "_decode_at", recorded)
    return CompiledDecoder(model), lengths


every_step = pytest.mark.parametrize("make_decoder", [uncompiled_decoder, graph_decoder], ids=["loop", "graph"])


def plain_loop(is_left: Any, body: Any, carried: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    while is_left(*carried):
        carried = body(*carried)
    return carried


@every_config
@every_step
def test_only_single_rows_take_the_compiled_step(
    make_decoder: Any, config: GPTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens are equal, past the context too; prompts and batches run the model itself."""
    model = make_model(config)
    alone = [generate(model, [prompt], max_new_tokens=30)[0] for prompt in PROMPTS]
    decoder, lengths = make_decoder(model, monkeypatch)
    assert generate(decoder, PROMPTS[:1], max_new_tokens=5) == [alone[0][:5]]
    assert lengths == [len(PROMPTS[0]) + n for n in range(1, 5)], "a step for all tokens but the prompt's"
    assert [list(stream(decoder, prompt, max_new_tokens=30)) for prompt in PROMPTS[1:4]] == alone[1:4]
    lengths.clear()
    assert generate(decoder, PROMPTS, max_new_tokens=30) == alone
    assert not lengths
    # The last row of a batch goes on alone, with padding before it.
    assert generate(decoder, PROMPTS[1:3], max_new_tokens=[30, 3]) == [alone[1], alone[2][:3]]
    assert len(lengths) >= 10


@every_config
@every_step
@pytest.mark.parametrize("int8_cache", [False, True], ids=["fp64", "int8"])
@torch.no_grad()
def test_compiled_logits_and_cache_equal_plain_ones(
    make_decoder: Any, config: GPTConfig, int8_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_model(config)
    plain.int8_cache = int8_cache
    decoder, lengths = make_decoder(copy.deepcopy(plain), monkeypatch)
    for pad in (None, torch.tensor([2])):
        caches = [new_kv_cache(plain, 1, 12) for _ in range(2)]
        for tokens in ([7, 8, 9], [10], [11], [12], [13], [14]):
            idx = torch.tensor([tokens])
            expected, found = (each(idx, cache, pad) for each, cache in zip((plain, decoder), caches, strict=True))
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        assert caches[1].length == caches[0].length == 8
        for part in ("keys", "values"):
            ours, theirs = (cache.decode(getattr(cache, part)) for cache in caches)
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    assert lengths == [4, 5, 6, 7, 8] * 2
    full = KVCache(config, 1, 3, dtype=torch.float64)
    decoder(torch.tensor([[7, 8, 9]]), full)
    with pytest.raises(ValueError, match="the cache holds 3 tokens, 4 were asked for"):
        decoder(torch.tensor([[10]]), full)
    longer = KVCache(config, 1, config.context_length + 1, dtype=torch.float64)
    longer.length = config.context_length
    with pytest.raises(ValueError, match=f"exceed the context length {config.context_length}"):
        decoder(torch.tensor([[10]]), longer)


def test_the_model_and_gradients_do_not_use_the_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(GPT2)
    decoder, lengths = uncompiled_decoder(model, monkeypatch)
    assert "forward" not in vars(model)
    assert generate(model, PROMPTS[:1], max_new_tokens=5) and not lengths
    with torch.no_grad():
        cache = KVCache(GPT2, 1, 12, dtype=torch.float64)
        decoder(torch.tensor([[7, 8, 9]]), cache)
    decoder(torch.tensor([[10]]), cache)
    decoder(torch.tensor([[10]])).sum().backward()
    assert not lengths
    assert all(parameter.grad is not None for parameter in model.blocks.parameters())


def test_a_draft_may_be_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(MODERN)
    expected = generate(model, PROMPTS[:1], max_new_tokens=40)[0]
    [(decoder, _), (draft, drafted)] = [uncompiled_decoder(each, monkeypatch) for each in (model, copy.deepcopy(model))]
    assert list(stream(decoder, PROMPTS[0], max_new_tokens=40, draft=draft)) == expected
    assert len(drafted) > 20


def test_trained_weights_reach_the_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are changed in place, as optimizers do it."""
    model = make_model(MODERN)
    decoder, _ = uncompiled_decoder(model, monkeypatch)
    before = generate(decoder, PROMPTS[:1], max_new_tokens=12)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(1.5)
    plain = GPT(MODERN).double()
    plain.load_state_dict(model.state_dict())
    found = generate(decoder, PROMPTS[:1], max_new_tokens=12)
    assert found == generate(plain, PROMPTS[:1], max_new_tokens=12) != before


@pytest.mark.skipif(shutil.which("g++") is None, reason="the name of kept code holds the compiler's")
@pytest.mark.parametrize(
    ("sizes", "int8_cache"),
    [
        ({"emb_dim": 576, "n_heads": 9, "n_kv_heads": 3, "head_dim": 64, "ffn_dim": 1536}, False),  # SmolLM2-135M's
        ({"emb_dim": 128, "n_heads": 2, "n_kv_heads": 2, "head_dim": 64, "ffn_dim": 512, "n_layers": 4}, True),
        ({"emb_dim": 704, "n_heads": 11, "n_kv_heads": 11, "head_dim": 64, "ffn_dim": 1408, "n_layers": 3}, False),
    ],
)
def test_the_code_takes_caches_of_any_size(
    sizes: dict[str, int], int8_cache: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Run the checks of what is compiled; sizes of its example that are equal by chance would become such checks."""
    programs, export = [], torch.export.export

    def recorded(*arguments: Any, **options: Any) -> Any:
        programs.append(export(*arguments, **options))
        return programs[-1]

    monkeypatch.setenv("LLM_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.export, "export", recorded)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda _, package_path: Path(package_path).touch())
    monkeypatch.setattr(aot, "_load", lambda _: None)
    model = GPT(gpt_config(**MODERN.model_dump() | sizes | {"context_length": 64})).eval()
    model.int8_cache = int8_cache
    weights = compiled._CompiledStep(model).step.weights
    run = programs[0].module()
    for rows, length, max_length in ((2, 2, 5), (5, 30, 33), (3, 64, 100)):
        cache, plain = new_kv_cache(model, rows, max_length), new_kv_cache(model, 1, max_length)
        idx = torch.tensor([[7]])
        cache.length = plain.length = length - 1
        with torch.no_grad():
            found = run([*weights, idx, torch.tensor([0]), torch.arange(length), *compiled._stored_parts(cache)])
            torch.testing.assert_close(found, model(idx, plain), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")
@pytest.mark.slow
@pytest.mark.parametrize("by_kernel", [True, False], ids=["kernel", "loops"])
def test_several_models_are_compiled_in_one_process(
    by_kernel: bool, tmp_path: Path, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models of several forms, one of other weights that shares the code, and caches of any size and number of rows."""
    if not by_kernel:
        monkeypatch.setattr(compiled, "has_row_kernels", lambda model: False)

    def texts(model: Decoder) -> list[list[list[int]]]:
        alone = [generate(model, PROMPTS[:1], max_new_tokens=n) for n in (10, 17, 40)]
        last = [generate(model, PROMPTS[:n], max_new_tokens=[2] * (n - 1) + [20]) for n in (2, 3)]  # goes on alone
        return alone + last

    monkeypatch.setenv("LLM_CACHE", str(tmp_path))
    # Sizes that an example for the compiler could have too, if it did not avoid them.
    three_to_five = gpt_config(**NARROW.model_dump() | {"n_layers": 3, "n_heads": 5, "n_kv_heads": 5})
    models = [make_model(config).float() for config in (GPT2, GPT2, three_to_five, MODERN)]
    for parameter in models[1].parameters():
        parameter.data *= 1.3
    to_int8(models[-1])
    models[-1].int8_cache = True
    expected = [texts(model) for model in models]
    decoders = [CompiledDecoder(model) for model in models]
    assert [texts(decoder) for decoder in decoders] == expected
    forms = len(decoders) - 1
    files = sorted((tmp_path / "compiled").iterdir())
    several = sum(compiled._has_fast_rows(model) for model in models)
    assert len(files) == forms + several, "at the call, and at the first batch"
    assert several == by_kernel

    with monkeypatch.context() as loading:
        loading.setattr(torch.export, "export", None)
        assert texts(CompiledDecoder(models[-1])) == expected[-1], "from what was kept"
    for path in files:
        path.write_bytes(path.read_bytes()[:1000])
    assert generate(CompiledDecoder(models[0]), PROMPTS[:1], max_new_tokens=10) == expected[0][0], "damaged: made again"
    assert sum(path.stat().st_size > 1000 for path in files) == 1


def test_a_compiler_that_fails_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("no g++ here\nand more")

    monkeypatch.setenv("LLM_CACHE", str(tmp_path))
    model = make_model(GPT2)
    expected = generate(model, PROMPTS[:1], max_new_tokens=5)
    monkeypatch.setattr(torch.export, "export", failing)
    with pytest.raises(InputError, match=r"^the step could not be compiled, .* is needed: no g\+\+ here$"):
        CompiledDecoder(model)
    assert generate(model, PROMPTS[:1], max_new_tokens=5) == expected
    assert not list((tmp_path / "compiled").iterdir())
