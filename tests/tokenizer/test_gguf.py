"""Tokenizers in GGUF files against llama.cpp and transformers, and metadata that is wrong."""

from __future__ import annotations

import json
import random
import sysconfig
import unicodedata
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from transformers import AutoTokenizer

from llm.config import Template
from llm.tokenizer.bpe import FILE_NAME, Tokenizer
from llm.tokenizer.gguf import gguf_tokenizer_fields, tokenizer_from_gguf
from llm.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from llm.tokenizer.prompts import encode_prompt
from tests.conftest import ROOT
from tests.tokenizer.originals import (
    FAMILIES,
    NASTY,
    QUESTIONS,
    TEXTS,
    every_kind_of_character,
    ids_of,
    imported,
    prompt_of,
    refused,
    tokenizers_of_all_kinds,
)

KNOWN_TO_LLAMA_CPP = [*FAMILIES, "default", "trained here"]


def tokenizer_for(pre: str) -> Tokenizer:
    if pre != "default":
        return tokenizers_of_all_kinds()[pre]
    [known] = [known for known in PRE_TOKENIZERS if "default" in known.gguf_names]
    other = imported("gpt-2")
    return Tokenizer(other.ranks, known.pattern, other.special_tokens, other.eot_token)


@pytest.mark.parametrize("pre", KNOWN_TO_LLAMA_CPP)
def test_gguf_metadata_round_trip(pre: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_for(pre)
    fields = gguf_tokenizer_fields(tokenizer, "chatml", "Be brief.")
    assert fields["tokenizer.ggml.pre"] == ("gpt-2" if pre == "trained here" else pre)
    found = tokenizer_from_gguf(json.loads(json.dumps(fields)))  # plain values
    assert found[1:] == ("chatml", "Be brief.")
    tokenizer.save(tmp_path / "a")
    found.tokenizer.save(tmp_path / "b")
    assert (tmp_path / "a" / FILE_NAME).read_bytes() == (tmp_path / "b" / FILE_NAME).read_bytes()


class LlamaCpp:
    """llama.cpp with a model of one small block, whose only use is its tokenizer."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        gguf, xllamacpp = pytest.importorskip("gguf"), pytest.importorskip("xllamacpp")
        writer = gguf.GGUFWriter(path, "llama")
        size, width = len(fields["tokenizer.ggml.tokens"]), 32
        writer.add_context_length(64)
        writer.add_embedding_length(width)
        writer.add_block_count(1)
        writer.add_feed_forward_length(width)
        writer.add_head_count(1)
        writer.add_layer_norm_rms_eps(1e-5)
        adders = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        for key, value in fields.items():
            adders[type(value)](key, value)
        shapes = {"token_embd": (size, width), "output_norm": (width,)}
        shapes |= {f"blk.0.{name}_norm": (width,) for name in ("attn", "ffn")}
        shapes |= {f"blk.0.attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.0.ffn_{name}": (width, width) for name in ("gate", "up", "down")}
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 64, 1, 1
        params.warmup = False
        params.port = 0
        self.server = xllamacpp.Server(params)

    def post(self, route: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.server.listening_address}{route}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def encode(self, text: str, **more: Any) -> list[int]:
        return self.post("/tokenize", {"content": text, "parse_special": False, **more})["tokens"]


@pytest.mark.parametrize("pre", [pre for pre in KNOWN_TO_LLAMA_CPP if pre != "tekken"])
def test_llama_cpp_gives_the_same_ids(pre: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_for(pre)
    template: Template = "llama3" if pre == "llama-bpe" else "chatml"
    llama_cpp = LlamaCpp(tmp_path / "model.gguf", gguf_tokenizer_fields(tokenizer, template, "Be brief."))
    texts = [text for text in [*NASTY, *every_kind_of_character()] if text]
    if pre == "qwen2":
        texts = [unicodedata.normalize("NFC", text.replace("<tool_call>", "")) for text in texts]
    if tokenizer.missing_bytes:  # llama.cpp leaves them out after merging
        missing = tokenizer.missing_bytes
        texts = ["".join(c for c in text if not set(c.encode()) & set(missing)) for text in texts]
    for text in texts:
        assert llama_cpp.encode(text, add_special=False) == tokenizer.encode(text)
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    assert llama_cpp.encode("Hi", add_special=True) == begin + tokenizer.encode("Hi")
    question = {"role": "user", "content": "What's 2+2?"}
    prompt = llama_cpp.post("/apply-template", {"messages": [question]})["prompt"]
    ids = llama_cpp.post("/tokenize", {"content": prompt, "parse_special": True, "add_special": False})["tokens"]
    expected = encode_prompt(tokenizer, template, "What's 2+2?", system="Be brief.")
    assert begin + [i for i in ids if i not in begin] == expected  # the server adds the first token itself


def test_spare_tokens_of_a_gguf_file() -> None:
    fields = gguf_tokenizer_fields(imported("qwen2"), None, None)
    size = len(fields["tokenizer.ggml.tokens"])
    fields["tokenizer.ggml.tokens"] += ["[PAD0]", "[PAD1]"]
    fields["tokenizer.ggml.token_type"] += [5, 5]
    assert tokenizer_from_gguf(fields).tokenizer.vocab_size == size


# ---- SmolLM2 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_fields(smollm2: Path) -> dict[str, Any]:
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(smollm2).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


@pytest.fixture(scope="module")
def smollm2_transformers(smollm2: Path) -> Any:
    """transformers' reading of the file, with the digits apart as SmolLM2 has them.

    It knows no pre-tokenizer by the name of smollm, and takes GPT-2's instead.
    """
    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    tokenizer.backend_tokenizer.pre_tokenizer = FAMILIES["smollm"]()
    return tokenizer


@pytest.mark.slow
def test_smollm2_has_the_ids_of_transformers(smollm2_fields: dict[str, Any], smollm2_transformers: Any) -> None:
    tokenizer, template, system = tokenizer_from_gguf(smollm2_fields)
    assert (tokenizer.vocab_size, tokenizer.eot_token, tokenizer.bos_token) == (49152, "<|im_end|>", None)
    assert len(tokenizer.missing_bytes) == 21
    assert (template, system) == ("chatml", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")
    backend = smollm2_transformers.backend_tokenizer
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:12]
    texts = [path.read_text() for path in [ROOT / "data" / "sample" / "stories.txt", *library]]
    chooser = random.Random(0)
    mixed = ["".join(chooser.choices(" \n\t\x04'aeéß1293.,!?-—字🙂the ", k=300)) for _ in range(200)]
    for text in [*NASTY, *every_kind_of_character(), *mixed, *texts]:
        assert tokenizer.encode(text) == ids_of(backend, text)
    for question in QUESTIONS:
        assert encode_prompt(tokenizer, template, question, system=system) == prompt_of(smollm2_transformers, question)


@pytest.mark.slow
@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_smollm2_has_the_ids_of_transformers_for_generated_text(
    smollm2_fields: dict[str, Any], smollm2_transformers: Any, text: str
) -> None:
    assert smollm2_here(smollm2_fields).encode(text) == ids_of(smollm2_transformers.backend_tokenizer, text)


_kept: list[Tokenizer] = []


def smollm2_here(fields: dict[str, Any]) -> Tokenizer:
    if not _kept:
        _kept.append(tokenizer_from_gguf(fields).tokenizer)
    return _kept[0]


@pytest.mark.slow
def test_smollm2_goes_out_as_it_came_in(smollm2_fields: dict[str, Any]) -> None:
    fields = gguf_tokenizer_fields(*tokenizer_from_gguf(smollm2_fields))
    for key in ("tokens", "token_type", "merges", "pre", "model", "eos_token_id", "padding_token_id"):
        assert fields[f"tokenizer.ggml.{key}"] == smollm2_fields[f"tokenizer.ggml.{key}"]


# ---- what can be wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ggml.model", "llama", "scores: missing"),
        ("ggml.model", "t5", "t5; only byte-level BPE"),
        ("ggml.model", None, "missing"),
        ("ggml.pre", "bloom", "bloom is not known here; known are gpt-2, "),
        ("ggml.pre", 3, "expected str, found 3"),
        ("ggml.tokens", None, "missing"),
        ("ggml.tokens", ["a", "a"], "2 tokens"),
        ("ggml.tokens", [["a"]], "expected strings"),
        ("ggml.merges", None, "missing"),
        ("ggml.merges", ["ab"], "expected pairs of tokens"),
        ("ggml.merges", ["ƀ ƀ"], "of tokens that it has not"),
        ("ggml.merges", [5], "expected pairs of tokens"),
        ("ggml.token_type", [1], "1 types for"),
        ("ggml.eos_token_id", 10**6, "is none of"),
        ("ggml.add_bos_token", "yes", "expected bool"),
        ("chat_template", 5, "expected str"),
    ],
)
def test_wrong_gguf_metadata_is_one_line(key: str, value: Any, message: str) -> None:
    fields = {**gguf_tokenizer_fields(imported("gpt-2"), None, None), f"tokenizer.{key}": value}
    if value is None:
        del fields[f"tokenizer.{key}"]
    refused(lambda: tokenizer_from_gguf(fields), rf"^tokenizer\.\S*.*{message}")


def test_a_token_twice_in_gguf_metadata() -> None:
    fields = gguf_tokenizer_fields(imported("gpt-2"), None, None)
    fields["tokenizer.ggml.tokens"] = [*fields["tokenizer.ggml.tokens"][:-2], "a", "a"]
    refused(lambda: tokenizer_from_gguf(fields), "are both 'a'")
