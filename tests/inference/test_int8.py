"""Linear layers with 8-bit weights by PyTorch's kernel, against the exact ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llm.common.errors import InputError
from llm.inference.int8 import FEW_INT8_ROWS, Int8Linear, to_int8
from llm.model.gpt import GPT
from llm.model.linear import Linear
from tests.helpers import gpt_config


@pytest.mark.parametrize("rows", [0, 1, 3, FEW_INT8_ROWS, FEW_INT8_ROWS + 1, 70])
@pytest.mark.parametrize(
    ("n_in", "n_out", "has_bias"), [(64, 96, True), (64, 96, False), (40, 7, True), (100, 31, True)]
)
def test_quantized_weights_are_within_half_a_step(rows: int, n_in: int, n_out: int, has_bias: bool) -> None:
    """Within half a step of each weight, and the rounding of a few rows to bf16."""
    torch.manual_seed(0)
    layer = Linear(n_in, n_out, bias=has_bias)
    quantized = Int8Linear(layer)
    assert quantized.weight.dtype == torch.int8 and quantized.weight.abs().amax() == 127
    steps = quantized.scale.float()[:, None]  # [O, 1]
    assert ((quantized.weight * steps - layer.weight).abs() <= 0.51 * steps).all()
    x = torch.randn(rows, n_in)
    with torch.inference_mode():
        torch.testing.assert_close(quantized(x), layer(x), atol=0.05, rtol=0.02)
        torch.testing.assert_close(quantized(x[:, None]), quantized(x)[:, None])


def test_zero_weights_stay_zero() -> None:
    layer = nn.Linear(64, 32, bias=False)
    nn.init.zeros_(layer.weight)
    with torch.inference_mode():
        assert not Int8Linear(layer)(torch.randn(2, 64)).any()


def test_without_a_compiler_pytorchs_kernel_computes_8_bits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise InputError("no C++ compiler was found")

    torch.manual_seed(0)
    model = GPT(gpt_config(vocab_size=64, context_length=32, emb_dim=64, head_dim=16, ffn_dim=128)).eval()
    idx = torch.randint(64, (4, 20))
    monkeypatch.setattr("llm.inference.int8.load_kernels", fails)
    with torch.inference_mode(), caplog.at_level("INFO", "llm"):
        expected = model(idx)
        to_int8(model)
        assert [part for part in model.modules() if isinstance(part, Int8Linear)]
        for inputs in (idx, idx[:, :4]):  # many rows, and few
            torch.testing.assert_close(model(inputs), expected[:, : inputs.shape[1]], atol=0.02, rtol=0.05)
    assert caplog.messages == ["8 bits by PyTorch's kernel, which is slower: no C++ compiler was found"]
