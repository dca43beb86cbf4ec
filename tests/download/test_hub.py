"""Sources of open weights: folders, files and names on the hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from llm.common.errors import InputError
from llm.download.hub import source_files


def test_no_pickle_is_fetched_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    wanted = ["config.json", "tokenizer.json", "chat_template.jinja", "merges.txt", "model.safetensors.index.json"]
    weights = ["model.safetensors", "model-00001-of-00002.safetensors"]
    others = ["pytorch_model.bin", "flax_model.msgpack", "original/consolidated.00.pth", "onnx/model.onnx", "README.md"]
    others += ["onnx/config.json", "consolidated.safetensors", "modeling_custom.py", "model.gguf"]

    def fetched(name: str, **options: Any) -> str:
        assert name == "some/model"
        files = [*wanted, *weights, *others]
        chosen.append(set(huggingface_hub.utils.filter_repo_objects(files, **options)))
        return str(tmp_path)

    chosen: list[set[str]] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert source_files("some/model") == tmp_path
    assert source_files("some/model", weights=False) == tmp_path
    assert chosen == [{*wanted, *weights}, set(wanted)]


def test_a_hub_name_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"some/model: no such folder, .* pip install 'textmill\[hf\]'"):
        source_files("some/model")
