"""Kernels of our own: attention and fp32 products for every kind of processor, and what a compiler may do."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.common.errors import InputError
from llm.inference.grouped import GROUP, GroupedLinear, round_to_4_bits
from llm.inference.kernels import build
from llm.inference.kernels.build import build_kernels
from llm.inference.packed import PackedLinear, to_packed
from llm.inference.prefill import use_prompt_kernels
from llm.inference.rows import cache_table, next_tokens_table
from llm.model.gpt import GPT
from llm.model.kv_cache import KVCache
from llm.model.linear import Linear
from tests.helpers import FORMS, gpt_config, randomize
from tests.inference.test_grouped import rounded_product, weighted_error

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the kernels need g++")
CPU = Path("/proc/cpuinfo").read_text(encoding="utf-8").split() if Path("/proc/cpuinfo").is_file() else []
# Each has products of its own: two bytes at a time in 256 and in 512 bits, four at a time in 256, and plain loops.
NEEDS = {"haswell": "avx2", "skylake-avx512": "avx512bw", "alderlake": "avx_vnni", "x86-64": "sse2"}
TARGETS = ["native", *(target for target, flag in NEEDS.items() if flag in CPU)]


@pytest.fixture(scope="module", params=TARGETS)
def operators(request: pytest.FixtureRequest, kernels: Path) -> object:
    """Return the operators, compiled for a kind of processor."""
    if request.param == "native":
        return torch.ops.textmill
    library = f"textmill_kernels_{request.param.replace('-', '_')}"
    torch.ops.load_library(build_kernels(kernels, request.param, library))
    return getattr(torch.ops, library)


# ---- attention of rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 8), (9, 3, 64), (2, 1, 128), (6, 2, 20)])
def test_rows_attend_to_their_own_caches(operators: object, heads: int, kv_heads: int, width: int) -> None:
    torch.manual_seed(0)
    lengths, begins, windows = [0, 1, 7, 150], [0, 0, 3, 20], torch.tensor([0, 5])
    q, k, v = torch.randn(6, heads, width), torch.randn(6, kv_heads, width), torch.randn(6, kv_heads, width)
    keys, values = ([torch.randn(2, 1, kv_heads, n + 2, width) for n in lengths] for _ in range(2))
    untouched = [part.clone() for part in (*keys, *values)]
    table = torch.tensor(
        [
            [a.data_ptr(), b.data_ptr(), 4 * a.stride(0), 4 * a.stride(2), begin, n]
            for a, b, begin, n in zip(keys, values, begins, lengths, strict=True)
        ]
    )
    for layer in (0, 1):
        y = operators.attend_rows(q, k, v, table, windows, torch.tensor(layer), False)  # type: ignore[attr-defined]
        assert not y[4:].any(), "rows without a cache"
        for row, (begin, n) in enumerate(zip(begins, lengths, strict=True)):
            first = max(begin, n + 1 - windows[layer]) if windows[layer] else begin
            seen = [part[row][layer, :, :, first : n + 1] for part in (keys, values)]
            assert torch.equal(seen[0][0, :, -1], k[row]) and torch.equal(seen[1][0, :, -1], v[row])
            plain = F.scaled_dot_product_attention(q[row][None, :, None], *seen, enable_gqa=True)
            torch.testing.assert_close(y[row], plain.flatten(), atol=2e-6, rtol=1e-5)
            alone = operators.attend_rows(  # type: ignore[attr-defined]
                *(part[row : row + 1] for part in (q, k, v, table)), windows, torch.tensor(layer), False
            )
            assert torch.equal(alone[0], y[row]), "whatever the other rows"
    for before, after, n in zip(untouched, (*keys, *values), lengths * 2, strict=True):
        after[:, :, :, n] = before[:, :, :, n]
        assert torch.equal(before, after), "the place of the new token alone"


def test_rows_of_one_cache_see_each_other(operators: object) -> None:
    """Several next tokens of a row: each sees those before it, whichever thread stored them."""
    generator = torch.Generator().manual_seed(0)
    config = gpt_config(n_heads=8, n_kv_heads=8, head_dim=16)
    for _ in range(20):
        q, k, v = (torch.randn(7, 8, 16, generator=generator) for _ in range(3))
        cache, plain = (KVCache(config, 1, 12) for _ in range(2))
        cache.length = plain.length = 2
        table = next_tokens_table(cache, 7, 1)
        y = operators.attend_rows(q, k, v, table, torch.tensor([0]), torch.tensor(0), False)  # type: ignore[attr-defined]
        keys, values = plain.append(0, *(part.transpose(0, 1)[None] for part in (k, v)))
        mask = torch.arange(9) <= torch.arange(2, 9)[:, None]
        mask[:, 0] = False
        expected = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, attn_mask=mask)
        torch.testing.assert_close(y, expected.transpose(1, 2).flatten(2)[0], atol=2e-6, rtol=1e-5)
        assert torch.equal(cache.keys, plain.keys) and torch.equal(cache.values, plain.values)


@pytest.mark.parametrize("head_dim", [64, 128, 6])
def test_rows_store_the_bytes_of_an_int8_cache(operators: object, head_dim: int) -> None:
    """Keys and values are large, tiny and zero; what was stored is read by the plain formula."""
    config = gpt_config(n_heads=4, n_kv_heads=2, head_dim=head_dim)
    generator = torch.Generator().manual_seed(0)
    cache, plain = (KVCache(config, 1, 5, int8=True) for _ in range(2))
    for length, size in enumerate((1.0, 1e4, 1e-20, 0.0, 1e-35)):
        q, k, v = (torch.randn(1, heads, 1, head_dim, generator=generator) for heads in (4, 2, 2))
        k, v = k * size, v * size
        cache.length = plain.length = length
        tensors = [part.squeeze(2) for part in (q, k, v)]
        found = operators.attend_rows(*tensors, cache_table([cache]), torch.tensor([0, 0]), torch.tensor(1), True)  # type: ignore[attr-defined]
        keys, values = plain.append(1, k, v)
        expected = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        torch.testing.assert_close(found.flatten(), expected.flatten(), atol=1e-6 * (1 + size), rtol=1e-5)
    assert torch.equal(cache.keys, plain.keys) and torch.equal(cache.values, plain.values)
    assert cache.keys[1].any() and not cache.keys[0].any(), "the other layer's are its own"


def test_large_scores_do_not_overflow(operators: object) -> None:
    keys, values = torch.zeros(1, 1, 1, 4, 8), torch.randn(1, 1, 1, 4, 8)
    keys[..., 1, :] = 1e4
    table = torch.tensor([[keys.data_ptr(), values.data_ptr(), 4 * keys.stride(0), 4 * keys.stride(2), 0, 3]])
    q, k = torch.full((1, 1, 8), 1e3), torch.full((1, 1, 8), -1e4)
    y = operators.attend_rows(q, k, k, table, torch.tensor([0]), torch.tensor(0), False)  # type: ignore[attr-defined]
    assert torch.equal(y[0], values[0, 0, 0, 1])


# ---- attention of prompts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "tokens", "earlier"),
    [(4, 4, 8, 5, 0), (9, 3, 64, 70, 0), (2, 1, 128, 33, 50), (6, 2, 20, 32, 7), (2, 2, 16, 2, 100)],
)
def test_prompts_attend_by_the_plain_formula(
    operators: object, heads: int, kv_heads: int, width: int, tokens: int, earlier: int
) -> None:
    """Compare causal masks, sliding windows and padding, with keys and values that are views of a cache."""
    torch.manual_seed(0)
    n_keys = earlier + tokens
    q = torch.randn(2, tokens, heads, width).transpose(1, 2)
    k, v = (torch.randn(3, kv_heads, n_keys + 9, width)[:2, :, 4 : 4 + n_keys] for _ in range(2))
    places, own = torch.arange(n_keys), torch.arange(earlier, n_keys)[:, None]
    causal = (places <= own)[None, None]
    window = causal & (places > own - 6)
    pads = torch.tensor([0, n_keys - 1])  # the second row's first tokens are padding and see themselves
    padded = causal & (places >= pads[:, None, None, None]) | (places == own)
    for given, mask in ((torch.empty(0, dtype=torch.bool), causal), (window, window), (padded, padded)):
        y: Tensor = operators.attend_prompt(q, k, v, given)  # type: ignore[attr-defined]
        plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(y, plain.transpose(1, 2).flatten(2), atol=3e-6, rtol=1e-5)
        fewer = (
            q[:, :, : tokens // 2],
            k[:, :, : n_keys - tokens + tokens // 2],
            v[:, :, : n_keys - tokens + tokens // 2],
        )
        shorter = given if given.numel() == 0 else given[:, :, : tokens // 2, : fewer[1].shape[2]].contiguous()
        part: Tensor = operators.attend_prompt(*fewer, shorter)  # type: ignore[attr-defined]
        assert torch.equal(part, y[:, : tokens // 2]), "whatever comes later"


def test_large_scores_of_a_prompt_do_not_overflow(operators: object) -> None:
    q, v = torch.full((1, 1, 3, 8), 1e3), torch.randn(1, 1, 3, 8)
    k = torch.zeros(1, 1, 3, 8)
    k[..., 0, :], k[..., 2, :] = -1e4, 1e4
    y: Tensor = operators.attend_prompt(q, k, v, torch.empty(0, dtype=torch.bool))  # type: ignore[attr-defined]
    assert torch.equal(y[0, 0], v[0, 0, 0])
    torch.testing.assert_close(y[0, 1:], v[0, 0, 1:])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("int8_cache", [False, True], ids=["fp32", "int8"])
def test_a_model_reads_prompts_by_the_kernel(kernels: Path, form: dict[str, Any], int8_cache: bool) -> None:
    """Compare whole prompts and chunks of them, with padding; with gradients the kernel has no part."""
    model = randomize(GPT(gpt_config(**form))).eval()
    assert isinstance(model, GPT)
    idx, pad = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 9])

    def logits(pieces: list[int]) -> Tensor:
        cache = KVCache(model.config, 3, 16, int8=int8_cache)
        return torch.cat([model(piece, cache, pad) for piece in idx.split(pieces, dim=1)], dim=1)

    with torch.inference_mode():
        expected = logits([16])
        use_prompt_kernels(model)
        for pieces in ([16], [7, 9], [1, 15]):
            torch.testing.assert_close(logits(pieces), expected, atol=0.05 if int8_cache else 3e-5, rtol=1e-5)
        torch.testing.assert_close(model(idx), copy.deepcopy(model).double()(idx).float(), atol=3e-5, rtol=1e-5)
    for block in model.blocks:
        block.attn.prompt_kernel = None if block.attn.prompt_kernel is None else fails  # type: ignore[union-attr, assignment]
    with pytest.raises(AssertionError, match="the kernel"), torch.no_grad():
        model(idx)
    model(idx).sum().backward()


def fails(*_: Tensor | None) -> Tensor:
    raise AssertionError("the kernel has no gradients")


# ---- products with weights of 4 and 8 bits ---------------------------------------------------------------------------


def test_the_products_of_every_processor_are_the_plain_formula(operators: object) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(96, n_out, bias=False) for n_out in (48, 16, 32)]
    for bits, name in ((4, "int4_product"), (8, "int8_product")):
        quantized = [GroupedLinear(layer, bits) for layer in layers]
        parts = [[layer.weight for layer in quantized], [layer.scale for layer in quantized]]
        for rows in (1, 4, 6, 11):
            largest = torch.full((rows, 96), 127.0)  # with it, sums of pairs could overflow 16 bits
            for x, error in ((torch.randn(rows, 96), 1e-5), (largest, 1e-3)):
                y = getattr(operators, name)(x, *parts)
                expected = torch.cat([rounded_product(x, layer) for layer in quantized], 1).float()
                torch.testing.assert_close(y, expected, atol=error, rtol=1e-5)


def test_the_rounding_of_every_processor_is_as_good(operators: object) -> None:
    torch.manual_seed(0)
    weight, importance = torch.randn(48, 96), torch.rand(96)
    q, pair = torch.empty(48, 3, GROUP, dtype=torch.uint8), torch.empty(48, 3, 2, dtype=torch.float16)
    operators.int4_round(weight, importance, q, pair)  # type: ignore[attr-defined]
    ours = round_to_4_bits(weight, importance)
    errors = [weighted_error(weight, importance, *each) for each in ((q, pair), ours)]
    torch.testing.assert_close(*errors, rtol=1e-4, atol=0)


# ---- fp32 products ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 48), (3, 48), (16, 1, 48), (13, 48), (2, 60, 48), (48,), (0, 48)])
@pytest.mark.parametrize(("n_out", "has_bias"), [(31, True), (64, False)])
def test_packed_weights_give_the_plain_formula(
    kernels: Path, size: tuple[int, ...], n_out: int, has_bias: bool
) -> None:
    torch.manual_seed(0)
    layer, x = Linear(48, n_out, bias=has_bias), torch.randn(*size)
    packed = PackedLinear(layer)
    expected = (x.double()[..., None, :] * layer.weight.double()).sum(-1)
    expected = expected + layer.bias.double() if has_bias else expected
    with torch.inference_mode():
        y = packed(x)
        torch.testing.assert_close(y.double(), expected, atol=3e-5, rtol=1e-5)
        for row, own in zip(x.view(-1, 48)[:13], y.view(-1, n_out), strict=False):
            assert torch.equal(packed(row), own), "whatever the other rows"


def test_the_fp32_product_of_every_processor_is_the_plain_formula(operators: object) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 20, 16)
    for rows in (1, 4, 6, 11, 16):
        x = torch.randn(rows, 20)
        expected = (x.double() @ weight.double().transpose(0, 1).flatten(1)).float()
        y: Tensor = operators.float_product(x, weight)  # type: ignore[attr-defined]
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_a_packed_model_predicts_the_same(kernels: Path) -> None:
    torch.manual_seed(0)
    model = GPT(gpt_config(vocab_size=64, context_length=32)).eval()
    idx = torch.randint(64, (3, 20))
    with torch.inference_mode():
        expected = model(idx)
        to_packed(model)
        torch.testing.assert_close(model(idx), expected, atol=3e-5, rtol=1e-5)
    assert not [part for part in model.modules() if isinstance(part, nn.Linear)]
    exact = GPT(gpt_config(vocab_size=64, context_length=32)).double()
    to_packed(exact)
    assert isinstance(exact.lm_head, Linear), "in float64 there is no other way"


# ---- the compiler ----------------------------------------------------------------------------------------------------


def test_kernels_are_compiled_once(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path_factory.mktemp("sources") / "nothing.cpp"
    source.write_text("int nothing;")
    monkeypatch.setattr(build, "SOURCES", [source])
    first = build_kernels(tmp_path, "x86-64", "textmill_once")
    stamp = first.stat().st_mtime_ns
    assert build_kernels(tmp_path, "x86-64", "textmill_once") == first and first.stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", r"^no-such-compiler: cannot be run \(No such file or directory\); name a C\+\+ compiler"),
        ("false", r"^the kernels could not be compiled by false: status 1; name another compiler by CXX$"),
        (
            "sh -c 'echo ld: cannot find -lomp >&2; echo cc: error: linker failed >&2; exit 1'",
            r"^the kernels could not be compiled by sh: ld: cannot find -lomp; name another compiler by CXX$",
        ),
        (None, r"^no C\+\+ compiler was found; install one such as g\+\+, or name it by CXX$"),
    ],
)
def test_a_compiler_that_fails_is_named_in_one_line(
    compiler: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiler is None:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
    else:
        monkeypatch.setenv("CXX", compiler)
    with pytest.raises(InputError, match=message):
        build_kernels(tmp_path)
    assert not list(tmp_path.iterdir())
