"""Linear layers with weights of 4 and 8 bits: the kernels, for every kind of processor, against the plain formula."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llm.inference.generate import generate
from llm.inference.grouped import GROUP, Bits, GroupedLinear, pack, round_to_4_bits, round_to_8_bits, to_int4, unpack
from llm.inference.importance import input_importance
from llm.inference.int8 import to_int8
from llm.model.gpt import GPT
from llm.model.linear import Linear, linears, replace_linears
from tests.helpers import gpt_config
from tests.inference.conftest import MODERN, PROMPTS, make_model
from tests.inference.test_compiled import uncompiled_decoder

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the kernels need g++")


def rounded_product(x: Tensor, layer: GroupedLinear) -> Tensor:
    """Return the product by the plain formula: inputs rounded to 8 bits, each group of a row with its own scale."""
    groups = x.double().unflatten(1, (-1, GROUP))  # [N, G, 32]
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((groups / scale).round() * scale).flatten(1) @ layer.dequantized().double().T


every_width = pytest.mark.parametrize("bits", [4, 8])


@every_width
def test_layers_of_equal_inputs_are_one_product(kernels: Path, bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values are, and gate and up; each output has the bits of its layer alone."""
    torch.manual_seed(0)
    quantized = [GroupedLinear(Linear(40, n_out, bias=n_out == 7), bits) for n_out in (7, 16, 33)]
    x = torch.randn(2, 3, 40)
    for layer, y in zip(quantized, linears(x, *quantized), strict=True):
        assert torch.equal(y, layer(x))
    counts, products = [], GroupedLinear.products

    def counted(self: GroupedLinear, x: Tensor, layers: Sequence[GroupedLinear]) -> list[Tensor]:
        counts.append(len(layers))
        return products(self, x, layers)

    monkeypatch.setattr(GroupedLinear, "products", counted)
    model = make_model(MODERN).float()
    replace_linears(model, lambda layer: GroupedLinear(layer, bits))
    with torch.inference_mode():
        model(torch.tensor([[5, 6]]))
    assert counts == [3, 1, 2, 1] * MODERN.n_layers + [1], "the last one is the head's"


@every_width
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 13, 70])
@pytest.mark.parametrize(("n_in", "n_out", "has_bias"), [(64, 96, True), (576, 32, False), (40, 7, True)])
def test_the_layer_is_the_plain_formula(
    kernels: Path, bits: Bits, rows: int, n_in: int, n_out: int, has_bias: bool
) -> None:
    torch.manual_seed(0)
    layer = Linear(n_in, n_out, bias=has_bias)
    quantized = GroupedLinear(layer, bits)
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


def test_the_search_finds_less_error_than_equal_steps(kernels: Path) -> None:
    torch.manual_seed(0)
    weight, importance = torch.randn(64, 128), torch.randn(128).mul(2).exp()
    for given, most in ((torch.ones(128), 0.9), (importance, 0.7)):
        found = weighted_error(weight, given, *round_to_4_bits(weight, given)).sum()
        assert found < most * weighted_error(weight, given, *plain_rounding(weight)).sum()


def test_weights_that_were_rounded_before_stay(kernels: Path) -> None:
    """A Q4_1 file holds steps between the least and the largest weight of a group already."""
    torch.manual_seed(0)
    q, pair = plain_rounding(torch.randn(32, 64))
    weight = (q * pair[..., :1] + pair[..., 1:]).flatten(1)
    again = round_to_4_bits(weight, torch.rand(64) + 0.1)
    assert torch.equal(again[0], q.to(torch.uint8))
    torch.testing.assert_close(again[1].float(), pair, atol=1e-3, rtol=1e-3)


def test_packed_weights_come_back() -> None:
    generator = torch.Generator().manual_seed(0)
    for bits, n_numbers in ((4, 2), (8, 1)):
        q = torch.randint(2**bits, (32, 3, GROUP), generator=generator, dtype=torch.uint8)
        pair = torch.randn(32, 3, n_numbers, generator=generator).half()
        weight, scale = pack(q, pair, bits)
        assert weight.shape == (2, 2 * bits * 96) and scale.shape == (2, 3, n_numbers, 16)
        assert all(itertools.starmap(torch.equal, zip(unpack(weight, scale, bits), (q, pair), strict=True)))


@every_width
def test_zero_and_constant_weights_stay(kernels: Path, bits: Bits) -> None:
    for value in (0.0, 0.5):
        layer = nn.Linear(64, 32, bias=False)
        nn.init.constant_(layer.weight, value)
        torch.testing.assert_close(GroupedLinear(layer, bits).dequantized(), layer.weight, atol=0, rtol=5e-4)


def test_weights_of_8_bits_are_within_half_a_step() -> None:
    weight = (
        torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-7, 1).repeat(4)[:, None]
    )
    q, step = round_to_8_bits(weight)
    assert int(q.amin()) >= 1 and int(q.amax()) == 255
    found = (q.float() - 128) * step.float()
    assert ((found - weight.unflatten(1, (-1, GROUP))).abs() <= 0.56 * step.float()).all(), "and half precision of it"


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


every_rounding = pytest.mark.parametrize(("quantize", "error"), [(to_int4, 0.12), (to_int8, 0.02)])


@every_rounding
def test_a_quantized_model_predicts_nearly_the_same(
    kernels: Path, quantize: Callable[[GPT], None], error: float
) -> None:
    """A step of 4 bits is a tenth of the spread of random weights."""
    torch.manual_seed(0)
    model = GPT(gpt_config(vocab_size=64, context_length=32, emb_dim=64, head_dim=16, ffn_dim=128)).eval()
    idx = torch.randint(64, (4, 20))
    with torch.inference_mode():
        expected = model(idx)
        embeddings = model.tok_emb.weight.clone()
        quantize(model)
        assert not [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        assert torch.equal(model.tok_emb.weight, embeddings)
        for inputs in (idx, idx[:, :4]):  # many rows, and few
            exact = expected[:, : inputs.shape[1]]
            assert (model(inputs) - exact).norm() < error * exact.norm()


@every_rounding
def test_a_compiled_step_takes_them(
    kernels: Path, monkeypatch: pytest.MonkeyPatch, quantize: Callable[[GPT], None], error: float
) -> None:
    model = make_model(MODERN).float()
    quantize(model)
    expected = [generate(model, [prompt], max_new_tokens=12) for prompt in PROMPTS]
    decoder, lengths = uncompiled_decoder(model, monkeypatch)
    found = [generate(decoder, [prompt], max_new_tokens=12) for prompt in PROMPTS]
    assert len(lengths) > 20
    same = [a == b for [ours], [theirs] in zip(found, expected, strict=True) for a, b in zip(ours, theirs, strict=True)]
    assert sum(same) > 0.8 * len(same), "attention is summed in another order, and inputs are rounded"
