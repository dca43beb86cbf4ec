"""Chat templates, named tokens and generation settings of open weights, kept through import and export."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers

from llm.api import Model
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, load_checkpoint, save_checkpoint
from llm.convert.gguf import export_gguf
from llm.convert.hf import export_hf
from llm.convert.load import describe, import_model
from llm.inference.sampling import Sampling
from llm.model.gpt import GPT
from llm.tokenizer import chat_template
from llm.tokenizer.bpe import Tokenizer
from tests.helpers import LLAMA_FORM, gpt_config, randomize, tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m.role + ']\r\n' + m.content + '<|im_end|>' }}{% endfor %}\r\n"
    "{# é #}{% if add_generation_prompt %}{{ '[assistant]<think>\n' }}{% endif %}"
)
SETTINGS = {
    "bos_token_id": 277,
    "eos_token_id": [279, 278, 5],
    "pad_token_id": 278,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "repetition_penalty": 1.05,
}
TOKENS = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|im_start|>"}
QUESTION = [{"role": "user", "content": "Where is the cat?"}]


def tokenizer() -> Tokenizer:
    tiny = tiny_tokenizer()
    return Tokenizer(tiny.ranks, tiny.pattern, tiny.special_tokens, eot_token="<|im_end|>")


def foreign(folder: Path, template: str = TEMPLATE, settings: dict[str, Any] | None = SETTINGS) -> Path:
    """A tiny model's folder as another tool wrote it, with a chat template and settings of its own."""
    model = randomize(GPT(gpt_config(**(LLAMA_FORM | {"vocab_size": 280, "context_length": 128}))))
    assert isinstance(model, GPT)
    export_hf(Checkpoint(model, tokenizer(), CheckpointConfig(kind="base", gpt=model.config)), folder)
    (folder / "generation_config.json").unlink()
    if settings is not None:
        (folder / "generation_config.json").write_text(json.dumps({**settings, "max_new_tokens": 4}))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | TOKENS))
    (folder / "chat_template.jinja").write_bytes(template.encode())
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The model, imported, written as a model folder and read again."""
    path = tmp_path_factory.mktemp("foreign")
    save_checkpoint(path / "ours", import_model(str(foreign(path / "theirs"))))
    assert (path / "ours/chat_template.jinja").read_bytes() == TEMPLATE.encode()
    return load_checkpoint(path / "ours", dtype=None)


def test_an_import_keeps_template_tokens_and_settings(imported: Checkpoint) -> None:
    config = imported.config
    assert (config.kind, config.template) == ("instruct", None)
    assert config.chat_templates == {"default": TEMPLATE}
    assert config.special_tokens == TOKENS
    assert config.generation is not None and config.generation.to_hf() == SETTINGS
    assert describe(imported).endswith("its own chat template")


def test_settings_are_the_defaults_of_the_model(imported: Checkpoint) -> None:
    model = Model(imported)
    assert model.sampling == Sampling(repetition_penalty=1.05, temperature=0.7, top_k=20, top_p=0.8)
    assert model.stop_ids == {279, 278, 5}
    assert model.encode_conversation(QUESTION)[-6:] == imported.tokenizer.encode("<think>\n")[-6:]
    sampled = model.chat(QUESTION, max_new_tokens=20, seed=3)
    assert sampled == model.chat(QUESTION, max_new_tokens=20, seed=3, sampling=model.sampling)
    assert sampled != model.chat(QUESTION, max_new_tokens=20, sampling=Sampling())


def test_an_export_to_transformers_has_them_all(imported: Checkpoint, tmp_path: Path) -> None:
    export_hf(imported, tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_bytes() == TEMPLATE.encode()
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == SETTINGS
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {key: config[key] for key in SETTINGS if key.endswith("_id")} == {
        key: value for key, value in SETTINGS.items() if key.endswith("_id")
    }
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert {key: opened.special_tokens_map[key] for key in TOKENS} == TOKENS
    prompt = opened.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert prompt == Model(imported).encode_conversation(QUESTION)
    assert import_model(str(tmp_path / "out")).config == imported.config


def test_a_gguf_file_has_them_all(imported: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    export_gguf(imported, path, "f32")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["tokenizer.chat_template"] == TEMPLATE
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding", "eot")] == [
        imported.tokenizer.special_tokens[name] for name in (*TOKENS.values(), "<|im_end|>")
    ]
    assert fields["general.sampling.top_k"] == 20
    assert np.float32(fields["general.sampling.temp"]) == np.float32(0.7)
    again = import_model(str(path))
    assert again.config.chat_templates == {"default": TEMPLATE}
    assert again.config.special_tokens == TOKENS
    model = Model(again)
    assert model.sampling == Model(imported).sampling
    assert model.encode_conversation(QUESTION) == Model(imported).encode_conversation(QUESTION)
    assert model.stop_ids == {imported.tokenizer.special_tokens[name] for name in ("<|im_end|>", "<|endoftext|>")}


def test_templates_by_name_go_through_both_formats(tmp_path: Path) -> None:
    theirs = foreign(tmp_path / "theirs")
    (theirs / "additional_chat_templates").mkdir()
    (theirs / "additional_chat_templates/tool_use.jinja").write_bytes(b"{{ tools }}\r\n")
    expected = {"default": TEMPLATE, "tool_use": "{{ tools }}\r\n"}
    imported = import_model(str(theirs))
    assert imported.config.chat_templates == expected
    save_checkpoint(tmp_path / "ours", imported)
    export_hf(load_checkpoint(tmp_path / "ours", dtype=None), tmp_path / "out")
    export_gguf(imported, tmp_path / "model.gguf", "f32")
    for source in ("ours", "out", "model.gguf"):
        assert import_model(str(tmp_path / source)).config.chat_templates == expected


def warnings_of(caplog: pytest.LogCaptureFixture, source: Path) -> tuple[Checkpoint, list[str]]:
    """Import a model and return it with the warnings."""
    logger = logging.getLogger("llm")
    logger.addHandler(caplog.handler)
    try:
        return import_model(str(source)), [record.getMessage() for record in caplog.records]
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ undefined_function() }}<|im_start|>", "'undefined_function' is undefined"),
        ("{% for %}<|start_header_id|>", "Expected an expression"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}<|im_start|>", ""),
        ("{{ raise_exception('no chats\nhere') }}", "no chats here"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_kept_and_said(
    template: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "PATIENCE", 1.0)  # seconds, for the one that never ends
    theirs = foreign(tmp_path / "theirs", template)
    imported, [warning] = warnings_of(caplog, theirs)
    assert f"{theirs}: its chat template cannot be used, only kept" in warning and reason in warning
    assert "\n" not in warning
    assert (imported.config.kind, imported.config.template) == ("base", None)
    save_checkpoint(tmp_path / "ours", imported)
    export_hf(load_checkpoint(tmp_path / "ours"), tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_bytes() == template.encode()


def test_a_template_that_needs_a_system_message_can_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    imported, warnings = warnings_of(caplog, foreign(tmp_path / "theirs", template))
    assert imported.config.kind == "instruct" and warnings == []


@pytest.mark.parametrize("settings", [None, {"temperature": 0.5}])
def test_the_token_behind_an_answer_ends_it_where_no_end_is_stated(
    settings: dict[str, Any] | None, tmp_path: Path
) -> None:
    theirs = foreign(tmp_path / "theirs", TEMPLATE.replace("<|im_end|>", "<|im_start|>"), settings)
    config = json.loads((theirs / "config.json").read_text())
    del config["eos_token_id"]
    (theirs / "config.json").write_text(json.dumps(config))
    imported = import_model(str(theirs))
    special = imported.tokenizer.special_tokens
    assert Model(imported).stop_ids >= {special["<|im_start|>"], special["<|im_end|>"]}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Sampling()),
        ({"do_sample": False, "temperature": 0.7, "top_k": 5}, Sampling()),
        ({"do_sample": True}, Sampling(temperature=1.0)),
        ({"do_sample": True, "temperature": 1, "top_k": 0, "top_p": 1}, Sampling(temperature=1.0, top_p=1.0)),
        ({"temperature": 0.6, "top_p": 0.95}, Sampling(temperature=0.6, top_p=0.95)),
        ({"top_k": 64, "min_p": 0.1}, Sampling(temperature=1.0, top_k=64, min_p=0.1)),
        ({"repetition_penalty": 1.1}, Sampling(repetition_penalty=1.1)),
        ({"bos_token_id": -1, "pad_token_id": -1, "eos_token_id": 279}, Sampling()),
    ],
)
def test_sampling_of_other_settings(settings: dict[str, Any], expected: Sampling, tmp_path: Path) -> None:
    assert Model(import_model(str(foreign(tmp_path / "theirs", settings=settings)))).sampling == expected


def test_what_our_own_exports_say_leaves_no_trace(tmp_path: Path) -> None:
    model = randomize(GPT(gpt_config(**(LLAMA_FORM | {"vocab_size": 280, "context_length": 128}))))
    assert isinstance(model, GPT)
    config = CheckpointConfig(kind="instruct", gpt=model.config, template="chatml", system="Be brief.")
    checkpoint = Checkpoint(model, tiny_tokenizer(), config)
    export_hf(checkpoint, tmp_path / "out")
    export_gguf(checkpoint, tmp_path / "model.gguf", "f32")
    save_checkpoint(tmp_path / "ours", checkpoint)
    for source in ("out", "model.gguf", "ours"):
        assert import_model(str(tmp_path / source)).config == config
    assert not (tmp_path / "ours/chat_template.jinja").exists()
    assert "generation" not in (tmp_path / "ours/config.json").read_text()


def test_a_finetuned_model_keeps_what_still_holds(imported: Checkpoint) -> None:
    """Its tokens and settings stay; the own chat template stays where the training's writes the same prompts."""
    made = imported.config.instructed("chatml", imported.tokenizer)
    assert (made.kind, made.template, made.chat_templates) == ("instruct", "chatml", None)
    assert (made.special_tokens, made.generation) == (imported.config.special_tokens, imported.config.generation)
    assert made.stop_ids(imported.tokenizer) >= {5, imported.tokenizer.special_tokens["<|im_end|>"]}
    chatml = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    base = imported.config.model_copy(update={"template": "chatml", "chat_templates": {"default": chatml}})
    assert base.instructed("chatml", imported.tokenizer).chat_templates == {"default": chatml}


def test_answers_are_not_padded_with_their_end(tmp_path: Path) -> None:
    model = randomize(GPT(gpt_config(**(LLAMA_FORM | {"vocab_size": 280, "context_length": 128}))))
    assert isinstance(model, GPT)
    config = CheckpointConfig(kind="instruct", gpt=model.config, template="chatml")
    export_hf(Checkpoint(model, tokenizer(), config), tmp_path / "out")
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (opened.eos_token, opened.pad_token) == ("<|im_end|>", "<|endoftext|>")
    export_gguf(Checkpoint(model, tokenizer(), config), tmp_path / "model.gguf", "f32")
    for source in ("out", "model.gguf"):
        assert import_model(str(tmp_path / source)).config.special_tokens is None
