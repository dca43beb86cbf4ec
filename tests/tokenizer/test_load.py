"""Tokenizers of folders and files, loaded without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm.common.errors import InputError
from llm.tokenizer.hf import write_tokenizer_json
from llm.tokenizer.load import import_tokenizer
from tests.conftest import ROOT
from tests.helpers import tiny_tokenizer


def test_tokenizing_and_importing_a_tokenizer_load_no_torch(tmp_path: Path) -> None:
    write_tokenizer_json(tmp_path, tiny_tokenizer(), "chatml", None)
    code = (
        "import sys; from pathlib import Path; import stages.tokenize\n"
        "from llm.tokenizer.load import import_tokenizer\n"
        "print(import_tokenizer(Path(sys.argv[1])).template, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "chatml False\n"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"kind": "base"}, (None, None)),
        ({"kind": "instruct", "template": "chatml", "system": "Be brief."}, ("chatml", "Be brief.")),
    ],
)
def test_a_checkpoint_brings_tokenizer_template_and_system(
    tmp_path: Path, config: dict[str, Any], expected: tuple[Any, Any]
) -> None:
    tiny_tokenizer().save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer, *rest = import_tokenizer(tmp_path)
    assert tokenizer == tiny_tokenizer() and tuple(rest) == expected


@pytest.mark.parametrize("config", [{"template": "vicuna"}, {"template": []}, {"system": 3}])
def test_an_unknown_template_of_a_checkpoint_is_named(tmp_path: Path, config: dict[str, Any]) -> None:
    tiny_tokenizer().save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json: unknown template or system; make the model folder again"):
        import_tokenizer(tmp_path)
