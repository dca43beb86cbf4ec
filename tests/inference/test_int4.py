"""Linear layers with 4-bit weights: the kernel, for every kind of processor, against the plain formula."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llm.common.errors import InputError
from llm.inference import int4
from llm.inference.compiled import CompiledDecoder
from llm.inference.generate import generate
from llm.inference.importance import input_importance
from llm.inference.int4 import GROUP, Int4Linear, build_kernel, load_kernel, pack, round_groups, to_int4, unpack
from llm.model.gpt import GPT
from llm.model.linear import Linear
from tests.helpers import gpt_config
from tests.inference.conftest import MODERN, PROMPTS, make_model
from tests.inference.test_compiled import uncompiled_decoder

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the kernel needs g++")
TARGETS = ["native", "haswell", "x86-64"] if torch.backends.cpu.get_cpu_capability().startswith("AVX") else ["native"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of kernels, with this machine's loaded."""
    path = tmp_path_factory.mktemp("kernels")
    load_kernel(path)
    return path


def rounded_product(x: Tensor, layer: Int4Linear) -> Tensor:
    """Return the product by the plain formula: inputs rounded to 8 bits, each group of a row with its own scale."""
    groups = x.double().unflatten(1, (-1, GROUP))  # [N, G, 32]
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((groups / scale).round() * scale).flatten(1) @ layer.dequantized().double().T


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 70])
@pytest.mark.parametrize(("n_in", "n_out", "has_bias"), [(64, 96, True), (576, 32, False), (40, 7, True)])
def test_the_layer_is_the_plain_formula(folder: Path, rows: int, n_in: int, n_out: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(n_in, n_out, bias=has_bias)
    quantized = Int4Linear(layer)
    x = torch.randn(rows, n_in)
    with torch.inference_mode():
        y = quantized(x)
        bias = 0 if layer.bias is None else layer.bias
        if n_in % GROUP == 0:
            torch.testing.assert_close(y, (rounded_product(x, quantized) + bias).float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(y, x @ quantized.dequantized().T + bias, atol=0.05, rtol=0)
        torch.testing.assert_close(quantized(x.double()), x.double() @ quantized.dequantized().T.double() + bias)
        assert y.dtype == torch.float32
        for row in range(min(rows, 5)):
            assert torch.equal(quantized(x[row : row + 1]), y[row : row + 1]), "whatever the other rows"


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernel_of_every_processor_gives_the_same(folder: Path, target: str) -> None:
    library = f"textmill_{target.replace('-', '_')}"
    torch.ops.load_library(build_kernel(folder, target, library))
    other = getattr(torch.ops, library)
    torch.manual_seed(0)
    layer, importance = nn.Linear(96, 48, bias=False), torch.rand(96)
    quantized = Int4Linear(layer, importance)
    for rows in (1, 4, 6):
        x = torch.randn(rows, 96)
        y = other.int4_product(x, quantized.weight, quantized.scale)
        torch.testing.assert_close(y, rounded_product(x, quantized).float(), atol=1e-5, rtol=1e-5)
    q, pair = torch.empty(48, 3, GROUP, dtype=torch.uint8), torch.empty(48, 3, 2, dtype=torch.float16)
    other.int4_round(layer.weight.detach(), importance, q, pair)
    ours = round_groups(layer.weight, importance)
    errors = [weighted_error(layer.weight, importance, *each) for each in ((q, pair), ours)]
    torch.testing.assert_close(*errors, rtol=1e-4, atol=0)


def weighted_error(weight: Tensor, importance: Tensor, q: Tensor, pair: Tensor) -> Tensor:
    """Return the error [O, G] of each group."""
    numbers = q.double() * pair[..., :1].double() + pair[..., 1:].double()
    return ((numbers - weight.detach().double().unflatten(1, (-1, GROUP))).square() * importance.view(-1, GROUP)).sum(
        -1
    )


def plain_rounding(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return each group in 16 equal steps from its least to its largest weight: llama.cpp's Q4_1."""
    groups = weight.detach().unflatten(1, (-1, GROUP))
    low = groups.amin(-1, keepdim=True).half().float()
    step = ((groups.amax(-1, keepdim=True) - low) / 15).half().float()
    return ((groups - low) / step).round().clamp(0, 15), torch.cat([step, low], -1)


def test_the_search_finds_less_error_than_equal_steps(folder: Path) -> None:
    torch.manual_seed(0)
    weight, importance = torch.randn(64, 128), torch.randn(128).mul(2).exp()
    for given, most in ((torch.ones(128), 0.9), (importance, 0.7)):
        found = weighted_error(weight, given, *round_groups(weight, given)).sum()
        assert found < most * weighted_error(weight, given, *plain_rounding(weight)).sum()


def test_weights_that_were_rounded_before_stay(folder: Path) -> None:
    """A Q4_1 file holds steps between the least and the largest weight of a group already."""
    torch.manual_seed(0)
    q, pair = plain_rounding(torch.randn(32, 64))
    weight = (q * pair[..., :1] + pair[..., 1:]).flatten(1)
    again = round_groups(weight, torch.rand(64) + 0.1)
    assert torch.equal(again[0], q.to(torch.uint8))
    torch.testing.assert_close(again[1].float(), pair, atol=1e-3, rtol=1e-3)


def test_packed_weights_come_back(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(16, (32, 3, GROUP), generator=generator, dtype=torch.uint8)
    pair = torch.randn(32, 3, 2, generator=generator).half()
    weight, scale = pack(q, pair)
    assert weight.shape == (2, 8 * 96) and scale.shape == (2, 3, 2, 16)
    assert all(itertools.starmap(torch.equal, zip(unpack(weight, scale), (q, pair), strict=True)))


def test_zero_and_constant_weights_stay(folder: Path) -> None:
    for value in (0.0, 0.5):
        layer = nn.Linear(64, 32, bias=False)
        nn.init.constant_(layer.weight, value)
        assert torch.equal(Int4Linear(layer).dequantized(), layer.weight)


def test_the_importance_is_the_mean_square_of_an_input() -> None:
    model = make_model(MODERN).float()
    found = input_importance(model)
    block = model.blocks[0]
    assert set(found) == {part for part in model.modules() if isinstance(part, nn.Linear)}
    seen: list[Tensor] = []
    hook = block.ffn.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        again = input_importance(model)
    hook.remove()
    torch.testing.assert_close(found[block.ffn.down_proj], seen[-1].square().flatten(0, 1).mean(0))
    assert all(torch.equal(found[layer], again[layer]) for layer in found), "the same text each time"
    assert not block.ffn.down_proj._forward_pre_hooks


def test_a_quantized_model_predicts_nearly_the_same(folder: Path) -> None:
    torch.manual_seed(0)
    model = GPT(gpt_config(vocab_size=64, context_length=32, emb_dim=64, head_dim=16, ffn_dim=128)).eval()
    idx = torch.randint(64, (4, 20))
    with torch.inference_mode():
        expected = model(idx)
        embeddings = model.tok_emb.weight.clone()
        to_int4(model)
        assert not [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        assert torch.equal(model.tok_emb.weight, embeddings)
        for inputs in (idx, idx[:, :4]):  # many rows, and few
            exact = expected[:, : inputs.shape[1]]
            assert (model(inputs) - exact).norm() < 0.12 * exact.norm(), "a step of 4 bits is a tenth of the spread"


def test_a_compiled_step_takes_4_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(MODERN).float()
    to_int4(model)
    expected = [generate(model, [prompt], max_new_tokens=12) for prompt in PROMPTS]
    decoder, lengths = uncompiled_decoder(model, monkeypatch)
    found = [generate(decoder, [prompt], max_new_tokens=12) for prompt in PROMPTS]
    assert len(lengths) > 20
    same = [a == b for [ours], [theirs] in zip(found, expected, strict=True) for a, b in zip(ours, theirs, strict=True)]
    assert sum(same) > 0.8 * len(same), "attention is summed in another order, and inputs are rounded"


@pytest.mark.slow
def test_a_compiled_model_of_4_bits(folder: Path) -> None:
    model = make_model(MODERN).float()
    to_int4(model)
    expected = [generate(model, [prompt], max_new_tokens=20)[0] for prompt in PROMPTS]
    decoder = CompiledDecoder(model)
    found = [generate(decoder, [prompt], max_new_tokens=20)[0] for prompt in PROMPTS]
    same = [a == b for ours, theirs in zip(found, expected, strict=True) for a, b in zip(ours, theirs, strict=True)]
    assert sum(same) > 0.8 * len(same), "attention is summed in another order, and inputs are rounded"


def test_a_kernel_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_kernel(tmp_path, "x86-64", "textmill_once")
    stamp = first.stat().st_mtime_ns
    assert build_kernel(tmp_path, "x86-64", "textmill_once") == first and first.stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", r"^no-such-compiler: cannot be run \(No such file or directory\); name a C\+\+ compiler"),
        ("false", r"^the kernel of 4-bit weights could not be compiled by false: status 1; use 8 bits$"),
        (None, r"^weights of 4 bits need a C\+\+ compiler such as g\+\+ on a CPU; install one, or use 8 bits$"),
    ],
)
def test_a_compiler_that_fails_is_named_in_one_line(
    compiler: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiler is None:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(int4.shutil, "which", lambda name: None)
    else:
        monkeypatch.setenv("CXX", compiler)
    with pytest.raises(InputError, match=message):
        build_kernel(tmp_path)
    assert not list(tmp_path.iterdir())
