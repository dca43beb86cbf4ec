"""The registry of families of open weights."""

from __future__ import annotations

import pytest

from llm.convert.families.base import Family, fused_names
from llm.convert.families.registry import FAMILIES
from llm.model.gpt import GPT
from tests.conftest import ROOT
from tests.helpers import GPT2_FORM, LLAMA_FORM, gpt_config


def test_every_module_of_a_family_is_registered() -> None:
    modules = {path.stem for path in (ROOT / "llm/convert/families").glob("*.py")}
    shared = {"__init__", "base", "metadata", "registry"}
    assert {type(family).__module__.rpartition(".")[2] for family in FAMILIES} == modules - shared
    assert {family.model_type for family in FAMILIES} == modules - shared


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_family_names_every_parameter_of_its_models_in_both_formats(family: Family) -> None:
    form = GPT2_FORM if family.fixed["positions"] == "learned" else LLAMA_FORM | {"tie_embeddings": False}
    parameters = GPT(gpt_config(**form | family.fixed)).state_dict()
    for names in (family.hf_names, family.gguf_names):
        stored = fused_names(names, parameters)
        assert sorted(name for parts in stored.values() for name in parts) == sorted(parameters)
