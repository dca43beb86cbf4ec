"""Precision of matrix products."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm.common.errors import InputError
from llm.model.gpt import RMSNorm
from llm.model.linear import Linear
from llm.training.precision import autocast, base_dtype
from tests.helpers import GPT2_FORM, SHIPPED_FORM, set_bf16_units, train_params
from tests.training.tiny import (
    new_gpt,
    random_batch,
    train,
)


@pytest.mark.parametrize("form", [GPT2_FORM, SHIPPED_FORM], ids=["gpt2", "shipped"])
def test_products_in_bf16_train_as_those_in_fp32(form: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    set_bf16_units(monkeypatch, "avx512_bf16")
    batches = [random_batch(seed) for seed in range(3)]
    seen: list[tuple[str, torch.dtype]] = []

    def losses(asked: str) -> list[float]:
        model = new_gpt(**form)
        for name, module in model.named_modules():
            if isinstance(module, Linear | RMSNorm):
                module.register_forward_hook(lambda m, args, out, name=name: seen.append((name, out.dtype)))
        result = train(
            model,
            train_params(max_steps=20, eval_interval=5, optimizer="muon", precision=asked),
            batches=lambda step: [batches[step % 3]],
            val_batches=lambda: batches,
        )
        assert all(p.dtype == torch.float32 for p in model.parameters())
        return [row["val/loss"] for row in result.history]

    plain = losses("fp32")
    assert {dtype for _, dtype in seen} == {torch.float32}
    seen.clear()
    mixed = losses("bf16")
    assert all(dtype == torch.bfloat16 for name, dtype in seen if name.endswith(("_proj", "q_norm", "k_norm")))
    assert mixed != plain
    assert mixed == pytest.approx(plain, rel=0.01)
    assert mixed[-1] < mixed[0] - 0.5
    assert losses("auto") == mixed
    set_bf16_units(monkeypatch)
    assert losses("auto") == plain


@pytest.mark.parametrize(("asked", "device"), [("bf16", "cpu"), ("bf16", "mps"), ("tf32", "cpu"), ("tf32", "mps")])
def test_a_precision_without_units_for_it_is_an_error(asked: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_bf16_units(monkeypatch)
    with pytest.raises(
        InputError, match=rf"^training.precision: {asked} was .* this {device} device has no units for it"
    ):
        autocast(torch.device(device), train_params(precision=asked))
    assert torch.get_float32_matmul_precision() == "highest", "nothing is set for the process"


def test_tf32_is_used_only_where_it_is_asked_for() -> None:
    try:
        for asked, found in (("tf32", "high"), ("fp32", "highest"), ("tf32", "high"), ("auto", "highest")):
            autocast(torch.device("cpu" if asked == "auto" else "cuda"), train_params(precision=asked))
            assert torch.get_float32_matmul_precision() == found
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("device", "units", "asked", "mixed"),
    [
        ("cpu", "avx512_bf16", "auto", True),
        ("cpu", "amx_bf16", "auto", True),
        ("cpu", "bf16", "auto", False),  # ARM's, which were not tried
        ("cpu", "bf16", "bf16", True),
        ("cpu", "avx2", "auto", False),
        ("cpu", "avx512_bf16", "fp32", False),
        ("cuda", "avx2", "auto", True),
        ("cuda", "avx512_bf16", "fp32", False),
        ("cuda", "avx512_bf16", "tf32", False),
        ("mps", "avx512_bf16", "auto", False),
    ],
)
def test_under_bf16_autocast_a_base_keeps_its_dtype(
    device: str, units: str, asked: str, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_bf16_units(monkeypatch, units)
    found = base_dtype(torch.device(device), train_params(precision=asked))
    assert found == (None if mixed else torch.float32)
