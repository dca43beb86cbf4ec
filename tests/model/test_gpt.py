"""The model against transformers, and the properties of every architecture."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from llm.config import GPTConfig, LayerKind, ModelParams
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.model.kv_cache import KVCache
from tests.helpers import FORMS, LLAMA_FORM, SHIPPED_FORM, gpt_config, randomize

every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def model_of(form: dict[str, Any], **changes: Any) -> GPT:
    model = randomize(GPT(gpt_config(**(form | changes))))
    assert isinstance(model, GPT)
    return model


def ids(*shape: int, seed: int = 0, vocab_size: int = 61) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ---- against transformers --------------------------------------------------------------------------------------------


def gpt2_weights(theirs: transformers.GPT2LMHeadModel) -> dict[str, Tensor]:
    """GPT-2's weights under our names: its Conv1D is transposed and holds queries, keys and values side by side."""
    names = {
        "ln_1": "norm1",
        "ln_2": "norm2",
        "attn.c_proj": "attn.out_proj",
        "mlp.c_fc": "ffn.up_proj",
        "mlp.c_proj": "ffn.down_proj",
    }
    state = theirs.state_dict()
    ours = {
        "tok_emb.weight": state["transformer.wte.weight"],
        "pos_emb.weight": state["transformer.wpe.weight"],
        "final_norm.weight": state["transformer.ln_f.weight"],
        "final_norm.bias": state["transformer.ln_f.bias"],
        "lm_head.weight": state["lm_head.weight"],
    }
    for i in range(theirs.config.n_layer):
        for part in ("weight", "bias"):
            fused = state[f"transformer.h.{i}.attn.c_attn.{part}"]
            for name, piece in zip("qkv", fused.chunk(3, dim=-1), strict=True):
                ours[f"blocks.{i}.attn.{name}_proj.{part}"] = piece.t()
            for their_name, our_name in names.items():
                tensor = state[f"transformer.h.{i}.{their_name}.{part}"]
                ours[f"blocks.{i}.{our_name}.{part}"] = tensor.t() if "c_" in their_name else tensor
    return ours


def llama_weights(theirs: transformers.PreTrainedModel) -> dict[str, Tensor]:
    renamed = (
        ("model.", ""),
        ("layers.", "blocks."),
        ("embed_tokens", "tok_emb"),
        ("self_attn", "attn"),
        ("o_proj", "out_proj"),
        ("mlp", "ffn"),
        ("input_layernorm", "norm1"),
        ("post_attention_layernorm", "norm2"),
    )
    ours = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in renamed:
            name = name.replace(old, new)
        ours["final_norm.weight" if name == "norm.weight" else name] = tensor
    return ours


def assert_same_logits(config: GPTConfig, weights: dict[str, Tensor], theirs: transformers.PreTrainedModel) -> None:
    ours = GPT(config).eval()
    ours.load_state_dict(weights)
    idx = ids(3, config.context_length, vocab_size=config.vocab_size)
    with torch.no_grad():
        expected = theirs(idx).logits
        assert expected.std() > 0.5  # the weights are large enough that a wrong model would show
        torch.testing.assert_close(ours(idx), expected, atol=1e-5, rtol=0)


def test_gpt2_equals_transformers() -> None:
    shape = transformers.GPT2Config(vocab_size=97, n_positions=24, n_embd=32, n_layer=3, n_head=4)
    theirs = randomize(transformers.GPT2LMHeadModel(shape), std=0.2)
    config = gpt_config(
        vocab_size=97, context_length=24, emb_dim=32, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=8, ffn_dim=128
    )
    assert_same_logits(config, gpt2_weights(theirs), theirs)


LLAMA_SHAPE = {
    "vocab_size": 97,
    "max_position_embeddings": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
OUR_LLAMA_SHAPE = LLAMA_FORM | {
    "vocab_size": 97,
    "context_length": 24,
    "emb_dim": 32,
    "ffn_dim": 48,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "tie_embeddings": False,
}


def test_llama_equals_transformers() -> None:
    theirs = randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_SHAPE)), std=0.2)
    assert_same_logits(gpt_config(**OUR_LLAMA_SHAPE, head_dim=8), llama_weights(theirs), theirs)


def test_qwen3_equals_transformers() -> None:
    shape = transformers.Qwen3Config(**LLAMA_SHAPE, head_dim=12)  # wider heads than emb_dim / n_heads
    theirs = randomize(transformers.Qwen3ForCausalLM(shape), std=0.2)
    assert_same_logits(gpt_config(**OUR_LLAMA_SHAPE, head_dim=12, qk_norm=True), llama_weights(theirs), theirs)


def test_relu2_is_the_square_of_relu() -> None:
    ffn = model_of(SHIPPED_FORM).blocks[0].ffn
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    expected = (x @ ffn.up_proj.weight.T).clamp(min=0) ** 2 @ ffn.down_proj.weight.T
    torch.testing.assert_close(ffn(x), expected)


# ---- size and start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tied", "parameters"), [(False, 163_009_536), (True, 124_412_160)])
def test_gpt2_124m_has_its_parameters(tied: bool, parameters: int) -> None:
    """The book's 163,009,536 has query, key and value projections without bias, as here."""
    config = gpt_config(
        vocab_size=50257,
        context_length=1024,
        emb_dim=768,
        n_layers=12,
        n_heads=12,
        n_kv_heads=12,
        head_dim=64,
        ffn_dim=3072,
        qkv_bias=False,
        tie_embeddings=tied,
    )
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


@every_form
def test_the_initial_loss_is_near_the_log_of_the_vocabulary(form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = GPT(gpt_config(**form, vocab_size=500)).eval()
    idx = ids(8, 17, vocab_size=500)
    loss = torch.nn.functional.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(500), abs=0.05)


def test_projections_into_the_residual_stream_start_smaller() -> None:
    torch.manual_seed(0)
    model = GPT(gpt_config(emb_dim=64, ffn_dim=256, n_heads=16, n_kv_heads=16, n_layers=8))
    for name, p in model.named_parameters():
        if name.endswith(("out_proj.weight", "down_proj.weight")):
            assert p.std().item() == pytest.approx(0.02 / 4, rel=0.1)  # 2 x 8 additions
        elif p.ndim == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.1)


@every_form
def test_the_gradient_reaches_every_parameter(form: dict[str, Any]) -> None:
    model = model_of(form).train()
    model(ids(2, 16)).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_a_tied_head_is_the_token_embedding() -> None:
    tied, untied = GPT(gpt_config()), GPT(gpt_config(tie_embeddings=False))
    assert tied.lm_head.weight is tied.tok_emb.weight
    assert untied.lm_head.weight is not untied.tok_emb.weight


def test_dropout_acts_in_training_only() -> None:
    model = model_of({})
    model.set_dropout(0.5)
    idx = ids(2, 8)
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.allclose(model(idx), model(idx))


def test_dropout_acts_on_embeddings_attention_and_both_branches() -> None:
    idx = ids(2, 8)
    for part in ("drop", "blocks.1.attn", "blocks.1.drop"):
        model = model_of({}).train()
        model.set_dropout(0.5)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout) and module is not model.get_submodule(part):
                module.p = 0.0
        if part != "blocks.1.attn":
            for block in model.blocks:
                block.attn.dropout = 0.0
        assert not torch.allclose(model(idx), model(idx)), part


# ---- causality, cache, padding ---------------------------------------------------------------------------------------


@every_form
def test_a_changed_token_leaves_earlier_logits_equal(form: dict[str, Any]) -> None:
    model, idx, t = model_of(form), ids(2, 16), 9
    changed = idx.clone()
    changed[:, t] = (changed[:, t] + 1) % 61
    with torch.no_grad():
        before, after = model(idx), model(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.isclose(before[:, t:], after[:, t:]).all(-1).any()  # each later position sees the change


@every_form
def test_cache_equals_no_cache(form: dict[str, Any]) -> None:
    model, idx = model_of(form), ids(3, 16)
    with torch.no_grad():
        expected = model(idx)
        for pieces in ([1] * 16, [16], [7, 9], [5, 1, 1, 6, 3], [1, 15]):
            cache = KVCache(model.config, 3, 16)
            logits = torch.cat([model(piece, cache) for piece in idx.split(pieces, dim=1)], dim=1)
            assert cache.length == 16
            torch.testing.assert_close(logits, expected, atol=3e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_left_padding_does_not_change_logits(data: st.DataObject) -> None:
    """Rows of any lengths, right-aligned, in pieces of any lengths, equal each row alone without padding."""
    form = data.draw(st.sampled_from(list(FORMS.values())))
    lengths = data.draw(st.lists(st.integers(1, 16), min_size=1, max_size=4))
    pieces, left = [], max(lengths)
    while left:
        pieces.append(data.draw(st.integers(1, left)))
        left -= pieces[-1]
    use_cache = data.draw(st.booleans())

    model = model_of(form)
    width = max(lengths)
    rows = [ids(1, length, seed=i) for i, length in enumerate(lengths)]
    idx = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=7) for row in rows])
    pad = torch.tensor([width - length for length in lengths])
    with torch.no_grad():
        if use_cache:
            cache = KVCache(model.config, len(rows), width)
            logits = torch.cat([model(piece, cache, pad) for piece in idx.split(pieces, dim=1)], dim=1)
        else:
            logits = model(idx, pad=pad)
        for b, row in enumerate(rows):
            torch.testing.assert_close(logits[b : b + 1, pad[b] :], model(row), atol=1e-5, rtol=1e-5)
    assert logits.isfinite().all()


def test_a_reordered_cache_gives_the_logits_of_its_rows() -> None:
    model, idx = model_of(SHIPPED_FORM), ids(4, 16)
    kept = [3, 1]
    with torch.no_grad():
        cache = KVCache(model.config, 4, 16)
        model(idx[:, :10], cache)
        cache.reorder(kept)
        logits = model(idx[kept, 10:], cache)
        torch.testing.assert_close(logits, model(idx[kept])[:, 10:], atol=1e-5, rtol=1e-5)


def test_a_shifted_cache_gives_equal_logits() -> None:
    """Only padding leaves at the left, so that positions stay equal."""
    model, idx = model_of(SHIPPED_FORM), ids(2, 16)
    with torch.no_grad():
        expected = model(idx[:, :6], pad=torch.tensor([2, 3]))
        cache = KVCache(model.config, 2, 9)
        model(idx[:, :5], cache, torch.tensor([2, 3]))
        cache.shift(3)
        cache.shift(-5)
        assert cache.length == 3
        logits = model(idx[:, 5:6], cache, torch.tensor([0, 1]))
        torch.testing.assert_close(logits, expected[:, 5:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [8, 6, 2])
def test_an_int8_cache_is_near_and_small(head_dim: int) -> None:
    """Logits do not depend on the pieces that a text is read in: all read what was stored."""
    model, idx = model_of(LLAMA_FORM, head_dim=head_dim).double(), ids(3, 16)
    pad = torch.tensor([0, 2, 5])
    with torch.no_grad():
        plain = model(idx, KVCache(model.config, 3, 16, dtype=torch.float64), pad)
        results = []
        for pieces in ([16], [1] * 16, [7, 9]):
            cache = KVCache(model.config, 4, 20, dtype=torch.float64, int8=True)
            results.append(torch.cat([model(piece, cache, pad) for piece in idx.split(pieces, dim=1)], dim=1))
            torch.testing.assert_close(results[-1], results[0], atol=1e-10, rtol=0)
        assert not torch.equal(results[0], plain)
        assert (results[0] - plain).std() < 0.02 * plain.std()
        cache.reorder([2, 0])
        cache.shift(3)
        cache.write(3, 1, *cache.slice(1, 3, 19))
        cache.shift(-1)
        moved = [cache.slice(row, start, start + 16) for row, start in ((0, 2), (1, 2), (3, 0))]
        fresh = KVCache(model.config, 4, 20, dtype=torch.float64, int8=True)
        model(idx, fresh, pad)
        for parts, row in zip(moved, (2, 0, 0), strict=True):
            assert all(torch.equal(*pair) for pair in zip(parts, fresh.slice(row, 0, 16), strict=True))
    numbers = KVCache(gpt_config(**LLAMA_FORM | {"head_dim": 64}), 1, 10, int8=True).keys
    assert numbers.nbytes * 256 == KVCache(gpt_config(**LLAMA_FORM | {"head_dim": 64}), 1, 10).keys.nbytes * 68


def test_the_error_of_an_int8_cache_is_half_a_step() -> None:
    cache = KVCache(gpt_config(head_dim=64), 1, 1, int8=True)
    vectors = (
        torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3, 1, 1e4, 0, 1e-38]]).T
    )
    error = (cache.decode(cache.encode(vectors)) - vectors).abs()
    assert (error <= vectors.abs().amax(-1, keepdim=True) * 0.5001 / 127 + 1e-30).all()
    assert (error[:3].amax(-1) > vectors[:3].abs().amax(-1) * 0.4 / 127).all()


def test_too_many_tokens_for_the_context_or_the_cache_are_refused() -> None:
    model = model_of({})
    with pytest.raises(ValueError, match="17 tokens exceed the context length 16"):
        model(ids(1, 17))
    cache = KVCache(model.config, 1, 4)
    model(ids(1, 3), cache)
    with pytest.raises(ValueError, match="the cache holds 4 tokens, 5 were asked for"):
        model(ids(1, 2), cache)
    cache = KVCache(model.config, 1, 32)
    model(ids(1, 16), cache)
    with pytest.raises(ValueError, match="17 tokens exceed the context length 16"):
        model(ids(1, 1), cache)


@every_form
def test_upper_blocks_continue_from_cached_hidden_states(form: dict[str, Any]) -> None:
    model = model_of(form, n_layers=3)
    idx = ids(2, 9)
    with torch.no_grad():
        whole = model.hidden_states(idx)
        for n in range(4):
            lower = model.run_blocks(idx, n)
            assert torch.equal(model.hidden_states(torch.zeros_like(idx), cached_hidden=lower, start_layer=n), whole), (
                "the ids are not read"
            )
        assert torch.equal(model.final_norm(lower), whole)
        assert not torch.equal(model.run_blocks(idx, 1), model.run_blocks(idx, 2))


# ---- classifier ------------------------------------------------------------------------------------------------------


@every_form
def test_the_classifier_reads_the_last_real_token_only(form: dict[str, Any]) -> None:
    classifier = GPTClassifier(GPT(gpt_config(**form)), n_labels=3)
    randomize(classifier)
    lengths = torch.tensor([4, 9, 1, 16])
    idx = ids(4, 16)
    other_padding = torch.where(torch.arange(16) < lengths[:, None], idx, ids(4, 16, seed=1))
    with torch.no_grad():
        together = classifier(idx, lengths)
        torch.testing.assert_close(classifier(other_padding, lengths), together, atol=1e-6, rtol=0)
        for b, length in enumerate(lengths.tolist()):
            alone = classifier(idx[b : b + 1, :length], lengths[b : b + 1])
            torch.testing.assert_close(alone, together[b : b + 1], atol=1e-6, rtol=1e-6)
            changed = idx[b : b + 1, :length].clone()
            changed[0, -1] = (changed[0, -1] + 1) % 61
            assert not torch.allclose(classifier(changed, lengths[b : b + 1]), alone)


def test_options_of_open_weights_leave_no_trace_where_they_are_off() -> None:
    """The config.json of a model that uses none is what it was before they came: byte for byte, and so its digest."""
    config = gpt_config(**SHIPPED_FORM)
    written = json.loads(config.model_dump_json(exclude_none=True))
    assert list(written) == [*ModelParams.model_fields, "vocab_size"]
    assert GPT(config).kinds == [LayerKind(None, 10000.0, None)]
    assert GPTConfig.model_validate(written) == config
    mixed = gpt_config(**FORMS["local and full layers, norms before and after"])
    again = GPTConfig.model_validate(json.loads(mixed.model_dump_json(exclude_none=True)))
    assert again == mixed and again.layer_kind(1) == LayerKind(None, 10000.0, None)
    assert again.layer_kind(0) == LayerKind(3, 50.0, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full_layers": (0,)}, "full_layers has no place without the option that it changes"),
        ({"local_rope_theta": 5.0}, "local_rope_theta has no place"),
        ({"joint_qk_norm": True}, "joint_qk_norm has no place"),
        ({"positions": "learned", "nope_layers": (0,)}, "nope_layers has no place"),
        ({"nope_layers": (2,)}, r"layers \[2\]: expected numbers below 2, in order"),
        ({"nope_layers": (1, 0)}, r"layers \[1, 0\]: expected numbers below 2, in order"),
        ({"rotary_dim": 3}, "rotary_dim 3 must be even and less than head_dim 4"),
        ({"rotary_dim": 4}, "rotary_dim 4 must be even and less than head_dim 4"),
        ({"ffn_bias": False}, "ffn_bias is that of bias"),
        ({"norm": "layernorm", "unit_offset_norm": True}, "unit_offset_norm has no place"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        gpt_config(**(LLAMA_FORM | changes))
