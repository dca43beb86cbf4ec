"""Other tools' models that are used directly, through the cache of imports."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import llm
import llm.convert.cache as cache
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, load_checkpoint, save_checkpoint
from llm.cli.main import main
from llm.common.errors import InputError
from llm.common.sanitize import visible
from llm.convert.gguf import export_gguf
from llm.convert.hf import export_hf
from llm.model.gpt import GPT
from tests.helpers import LLAMA_FORM, gpt_config, randomize, tiny_tokenizer

PROMPT = "the cat sat on"


def model(seed: int = 0, **more: Any) -> Checkpoint:
    gpt = randomize(GPT(gpt_config(**LLAMA_FORM, vocab_size=280, context_length=64)), seed)
    assert isinstance(gpt, GPT)
    config = CheckpointConfig(**({"kind": "base", "gpt": gpt.config} | more))
    return Checkpoint(gpt, tiny_tokenizer(), config)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def no_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise AssertionError("imported again")

    monkeypatch.setattr("llm.convert.load.import_model", fails)


def kept(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and path.name != "digests")


@pytest.mark.parametrize("form", ["hf", "gguf", "hub"])
def test_another_tools_model_is_used_as_it_is(
    form: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All commands and `llm.load` take it; it is imported at its first use alone, and one line says so."""
    ours = model(kind="instruct", template="chatml")
    save_checkpoint(tmp_path / "ours", ours)
    source = tmp_path / ("model.gguf" if form == "gguf" else "theirs")
    if form == "gguf":
        export_gguf(ours, source, "f32")
    else:
        export_hf(ours, source)
    name = str(source)
    if form == "hub":
        huggingface_hub = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(source))
        monkeypatch.chdir(tmp_path)
        name = "some-org/some-model"
    expected = llm.load(tmp_path / "ours").generate(PROMPT, max_new_tokens=12)
    assert not root.exists()  # a model folder is used where it is

    assert main(["generate", name, "--prompt", PROMPT, "--max-new-tokens", "12"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{PROMPT}{visible(expected)}\n"
    [folder] = kept(root)
    assert folder.startswith({"hf": "theirs-", "gguf": "model.gguf-", "hub": "some-org--some-model-"}[form])
    assert said.err == f"{name}: imported once, to {root / folder} (LLM_CACHE names another place)\n"

    no_import(monkeypatch)
    assert llm.load(name).generate(PROMPT, max_new_tokens=12) == expected
    (tmp_path / "text.txt").write_text(PROMPT)
    assert main(["score", name, str(tmp_path / "text.txt")]) == 0
    assert main(["export", name, str(tmp_path / "again.gguf"), "--format", "gguf", "--dtype", "f32"]) == 0
    assert main(["generate", name, "--prompt", PROMPT, "--draft", name, "--max-new-tokens", "3"]) == 0
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: PTH123, SIM115
    assert main(["chat", name]) == 0
    assert capsys.readouterr().err == f"{tmp_path / 'again.gguf'}: written\n"
    assert main(["classify", name, "a text"]) == 1
    assert "wrong kind of model (expected classifier, got instruct)" in capsys.readouterr().err


def test_other_content_is_another_import(root: Path, tmp_path: Path) -> None:
    """Also where size and time of the changed file are those of before."""
    export_hf(model(seed=0), tmp_path / "theirs")
    first = cache.model_folder(tmp_path / "theirs")
    assert cache.model_folder(tmp_path / "theirs") == first
    weights = tmp_path / "theirs/model.safetensors"
    before = weights.stat()
    export_hf(model(seed=1), tmp_path / "other")
    with weights.open("r+b") as file:
        file.write((tmp_path / "other/model.safetensors").read_bytes())
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    second = cache.model_folder(tmp_path / "theirs")
    assert second != first and len(kept(root)) == 2
    assert torch.equal(load_checkpoint(second).model.state_dict()["lm_head.weight"], model(1).model.lm_head.weight)  # type: ignore[union-attr]
    shutil.copytree(tmp_path / "theirs", tmp_path / "copy" / "theirs")
    assert cache.model_folder(tmp_path / "copy" / "theirs") == second  # the content counts, not the place


def test_a_half_written_import_is_never_used(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_hf(model(), tmp_path / "theirs")

    def dies(folder: Path, content: Checkpoint) -> None:
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir(parents=True)
        (partial / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "save_checkpoint", dies)
        with pytest.raises(KeyboardInterrupt):
            cache.model_folder(tmp_path / "theirs")
    assert [name for name in kept(root) if name.endswith(".partial")]
    folder = cache.model_folder(tmp_path / "theirs")
    assert load_checkpoint(folder).config.kind == "base"
    assert kept(root) == [folder.name]


def test_the_cache_is_in_the_users_cache_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    assert cache.cache_root() == Path("/somewhere/cache/textmill")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_root() == Path.home() / ".cache/textmill"


@pytest.mark.parametrize("name", ["models/none", "nowhere", "a/b/c"])
def test_a_path_that_is_not_there_is_no_hub_name(name: str, root: Path) -> None:
    with pytest.raises(InputError, match=f"{name}: not a model folder: config.json is missing"):
        llm.load(name)
    assert not root.exists()


def test_what_cannot_be_imported_leaves_nothing(root: Path, tmp_path: Path) -> None:
    export_hf(model(), tmp_path / "theirs")
    (tmp_path / "theirs/model.safetensors").rename(tmp_path / "theirs/pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is not read"):
        llm.load(tmp_path / "theirs")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="a PEFT adapter, not a whole model"):
        llm.load(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"none\.gguf: not found"):
        llm.load(tmp_path / "none.gguf")
    assert kept(root) == []
