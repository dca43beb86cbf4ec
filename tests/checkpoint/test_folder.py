"""Model folders: exact, whole or not at all, and strict about what they read."""

from __future__ import annotations

import base64
import errno
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm.checkpoint.folder import Checkpoint, CheckpointConfig, load_checkpoint, save_checkpoint, write_tensors
from llm.common.files import replaced_folder
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.tokenizer.bpe import GPT2_PATTERN, Tokenizer
from tests.forks import run_forked
from tests.helpers import FORMS, gpt_config, randomize, tiny_tokenizer


def content(kind: str = "base", seed: int = 0, **changes: Any) -> Checkpoint:
    tokenizer = tiny_tokenizer()
    gpt = GPT(gpt_config(**{"vocab_size": tokenizer.vocab_size} | changes))
    model: GPT | GPTClassifier = gpt
    config = CheckpointConfig(kind="base", gpt=gpt.config)
    if kind == "classifier":
        model = GPTClassifier(gpt, 2)
        config = CheckpointConfig(kind="classifier", gpt=gpt.config, labels=["ham", "späm"], max_length=12)
    elif kind == "instruct":
        config = CheckpointConfig(kind="instruct", gpt=gpt.config, template="chatml")
    randomize(model, seed)
    return Checkpoint(model, tokenizer, config)


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- model folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("kind", ["base", "classifier", "instruct"])
def test_a_model_folder_reads_back_exactly(tmp_path: Path, kind: str, form: dict[str, Any]) -> None:
    saved = content(kind, **form)
    save_checkpoint(tmp_path / "models" / "it", saved)
    loaded = load_checkpoint(tmp_path / "models" / "it")

    assert loaded.config == saved.config
    assert type(loaded.model) is type(saved.model)
    assert not loaded.model.training
    expected = saved.model.state_dict()
    assert expected.keys() == loaded.model.state_dict().keys()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    text = "the cat sat on ß"
    assert loaded.tokenizer.encode(text) == saved.tokenizer.encode(text)
    assert loaded.tokenizer.special_tokens == saved.tokenizer.special_tokens
    idx = torch.tensor([[1, 5, 250, 9]])
    more = [torch.tensor([3])] if kind == "classifier" else []
    assert torch.equal(loaded.model(idx, *more), saved.model(idx, *more))


def test_a_model_folder_holds_three_files_and_always_the_same_bytes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", content())
    save_checkpoint(tmp_path / "b", content())
    assert set(file_bytes(tmp_path / "a")) == {"config.json", "model.safetensors", "bpe.json"}
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")


def test_all_files_of_a_model_folder_can_be_read_by_the_same_users(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "it", content())
    assert len({path.stat().st_mode for path in (tmp_path / "it").iterdir()}) == 1


def test_a_model_that_is_loaded_draws_no_weights_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even on the meta device, where PyTorch needs more than a second and 75 MB for it."""
    save_checkpoint(tmp_path / "it", content("classifier"))

    def drawn(*_: object, **__: object) -> None:
        raise AssertionError("random numbers are drawn")

    monkeypatch.setattr(torch.Tensor, "normal_", drawn)
    load_checkpoint(tmp_path / "it")
    with pytest.raises(AssertionError, match="drawn"):
        content()


@pytest.mark.parametrize("kind", ["base", "classifier"])
def test_a_tied_head_is_stored_once_and_stays_tied(tmp_path: Path, kind: str) -> None:
    save_checkpoint(tmp_path / "it", content(kind))
    assert not any(name.endswith("lm_head.weight") for name in load_file(tmp_path / "it" / "model.safetensors"))
    model = load_checkpoint(tmp_path / "it").model
    gpt = model.gpt if isinstance(model, GPTClassifier) else model
    assert gpt.lm_head.weight is gpt.tok_emb.weight


def test_a_model_folder_is_read_in_the_dtype_asked_for(tmp_path: Path) -> None:
    saved = content()
    saved.model.bfloat16()
    save_checkpoint(tmp_path / "it", saved)
    for dtype in (None, torch.float32, torch.float16):
        loaded = load_checkpoint(tmp_path / "it", dtype=dtype).model
        for name, tensor in loaded.state_dict().items():
            assert tensor.dtype == (dtype or torch.bfloat16)
            assert torch.equal(tensor, saved.model.state_dict()[name].to(tensor.dtype)), name


def test_a_model_folder_of_an_earlier_version_loads(tmp_path: Path) -> None:
    """The files are written by hand: their keys and the names of the tensors are a promise."""
    gpt = {"context_length": 8, "emb_dim": 4, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 2, "ffn_dim": 6}
    gpt |= {"positions": "rotary", "rope_theta": 10000.0, "norm": "rmsnorm", "norm_eps": 1e-5, "activation": "swiglu"}
    gpt |= {"qk_norm": True, "qkv_bias": False, "bias": False, "tie_embeddings": True, "vocab_size": 260}
    config = {"kind": "instruct", "gpt": gpt, "template": "chatml", "system": "Be brief."}
    ranks = [base64.b64encode(token).decode() for token in [*(bytes([byte]) for byte in range(256)), b"ab"]]
    tokens = {"<|endoftext|>": 257, "<|im_start|>": 258, "<|im_end|>": 259}
    bpe = {"pattern": GPT2_PATTERN, "special_tokens": tokens, "end": "<|endoftext|>", "begin": None, "ranks": ranks}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "bpe.json").write_text(json.dumps(bpe))
    shapes = {"attn.q_proj": (4, 4), "attn.k_proj": (2, 4), "attn.v_proj": (2, 4), "attn.out_proj": (4, 4)}
    shapes |= {"attn.q_norm": (2,), "attn.k_norm": (2,), "norm1": (4,), "norm2": (4,)}
    shapes |= {"ffn.gate_proj": (6, 4), "ffn.up_proj": (6, 4), "ffn.down_proj": (4, 6)}
    named = {f"blocks.0.{name}.weight": shape for name, shape in shapes.items()}
    named |= {"tok_emb.weight": (260, 4), "final_norm.weight": (4,)}
    save_file({name: torch.ones(shape) for name, shape in named.items()}, tmp_path / "model.safetensors")

    model, tokenizer, found = load_checkpoint(tmp_path)
    assert found.model_dump(exclude_none=True) == config
    assert tokenizer.encode("abc") == [256, 99] and tokenizer.eot == 257 and tokenizer.bos is None
    assert model(torch.tensor([[1, 256]])).shape == (1, 2, 260)


# ---- whole or not at all ---------------------------------------------------------------------------------------------


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "it", content(seed=0))
    (tmp_path / "it" / "left over").write_text("from before")
    save_checkpoint(tmp_path / "it", content(seed=1))
    save_checkpoint(tmp_path / "other", content(seed=1))
    assert file_bytes(tmp_path / "it") == file_bytes(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it", "other"]


@pytest.mark.parametrize("failing", ["Tokenizer.save", "the last rename"])
def test_a_failure_in_the_middle_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    folder = tmp_path / "it"
    save_checkpoint(folder, content(seed=0))
    before = file_bytes(folder)
    rename = Path.rename

    def disk_full(self: Any, *arguments: Any) -> Any:
        if failing == "the last rename" and self.name != "it.partial":
            return rename(self, *arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((Tokenizer, "save") if failing == "Tokenizer.save" else (Path, "rename")), disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(folder, content(seed=1))
    assert file_bytes(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["it"]

    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder) as new:
        (new / "config.json").write_text("half")
        raise KeyboardInterrupt
    assert file_bytes(folder) == before


def test_a_full_disk_is_called_so_whoever_writes(tmp_path: Path) -> None:
    """safetensors has an error of its own for it."""

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_tensors(tmp_path / "a", {"a": torch.zeros(10_000)})
        except OSError as error:
            print(error.errno == errno.EFBIG, error.filename == str(tmp_path / "a"))

    assert run_forked(write) == (0, "True True\n", "")


def test_what_a_kill_left_behind_is_cleared_away(tmp_path: Path) -> None:
    for name in ("it.partial", "it.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half a file").write_text("?")
    save_checkpoint(tmp_path / "it", content())
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    assert "half a file" not in file_bytes(tmp_path / "it")
