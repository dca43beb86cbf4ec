"""Checkpoints: folders of config.json, model.safetensors and the tokenizer, nothing pickled."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, ValidationError, model_validator

from llm.checkpoint.card import Card, write_card
from llm.checkpoint.readme import readme
from llm.checkpoint.weights import (
    check_layers,
    load_weights,
    stored_tensors,
    tensors_in,
    without_weights,
    write_tensors,
)
from llm.common.errors import InputError
from llm.common.files import read_json, replaced_folder
from llm.config import GPTConfig, Positive, PositiveFloat, Probability, Strict, Template, explain
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.chat_source import (
    ChatSource,
    GenerationConfig,
    default_special_tokens,
    read_template_files,
    template_files,
)
from llm.tokenizer.conversation import ConversationEncoder
from llm.tokenizer.own_template import DEFAULT, OwnTemplate
from llm.tokenizer.prompts import TEMPLATES, end_tokens

log = logging.getLogger("llm")


class Decision(Strict):
    """A label that is given from a threshold of its probability on; below it the likeliest of the others is."""

    label: str
    threshold: Annotated[float, Field(ge=0, le=1)]


class CheckpointConfig(Strict):
    """The content of a checkpoint's `config.json`."""

    kind: Literal["base", "classifier", "instruct"]
    gpt: GPTConfig
    labels: list[str] | None = None  # classifier: in the order of its outputs
    max_length: Positive | None = None  # classifier: tokens of a text that it reads
    temperature: PositiveFloat | None = None  # classifier: its logits are divided by it, from val
    decision: Decision | None = None  # classifier: else the likeliest label
    unsure_below: Probability | None = None  # classifier: probability below which a label is `unsure`
    template: Template | None = None  # instruct: how a prompt is written, or what is nearest to the own template
    system: str | None = None  # instruct: what stands before every prompt, where the template has a place for it
    special_tokens: dict[str, str] | None = None  # of open weights: bos_token, eos_token, pad_token ...
    generation: GenerationConfig | None = None  # of open weights
    chat_templates: dict[str, str] | None = Field(default=None, exclude=True)  # own ones by name, in files beside

    @model_validator(mode="after")
    def _belongs_to_kind(self) -> Self:
        if (self.kind == "classifier") != (bool(self.labels) and self.max_length is not None):
            raise ValueError(f"labels and max_length go with kind classifier, found kind {self.kind}")
        stated = (self.temperature, self.decision, self.unsure_below)
        if self.kind != "classifier" and stated != (None, None, None):
            raise ValueError(f"temperature, decision and unsure_below go with kind classifier, found kind {self.kind}")
        if self.decision is not None and self.decision.label not in (self.labels or []):
            raise ValueError(f"decision: expected one of the labels {self.labels}, found {self.decision.label!r}")
        if self.kind == "instruct" and self.template is None and self.chat_templates is None:
            raise ValueError(
                "a template goes with kind instruct, found none, nor a chat_template.jinja beside this file"
            )
        if self.kind != "instruct" and self.template is not None:
            raise ValueError(f"a template goes with kind instruct, found kind {self.kind}")
        if self.system is not None and self.template in (None, "alpaca"):
            raise ValueError(f"system goes with the templates chatml and llama3, found {self.template}")
        return self

    @property
    def chat_source(self) -> ChatSource:
        """Return the model's own chat templates, tokens and settings."""
        return ChatSource(self.chat_templates, self.special_tokens, self.generation)

    def instructed(self, template: Template, tokenizer: Tokenizer) -> CheckpointConfig:
        """Return the config of this base after a training on instructions in one of our templates.

        A base that was asked in this template before keeps its system message, and its own chat template where that
        writes the same prompts.
        """
        system = self.system if self.template == template else None
        templates = self.chat_templates
        if templates is not None:
            ours, own = ConversationEncoder(tokenizer, template, system), self.conversations(tokenizer)
            probes = [[{"role": "user", "content": text}] for text in ("How are you?", " a\n\nb\n")]
            try:
                same = self.kind == "instruct" and all(ours.encode(probe) == own.encode(probe) for probe in probes)
            except InputError:
                same = False
            templates = templates if same else None
        return CheckpointConfig(
            kind="instruct",
            gpt=self.gpt,
            template=template,
            system=system,
            special_tokens=self.special_tokens,
            generation=self.generation,
            chat_templates=templates,
        )

    def conversations(self, tokenizer: Tokenizer) -> ConversationEncoder:
        """Return the encoder of conversations; raise `InputError` for a model that has no template."""
        if self.template is None and self.chat_templates is None:
            raise InputError(f"a model of kind {self.kind} has no chat template; use an instruct model")
        own = None
        if self.chat_templates is not None:
            own = OwnTemplate(tokenizer, self.chat_templates, self.special_tokens or {})
        return ConversationEncoder(tokenizer, self.template, self.system, own)

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return all tokens that end a text of the model."""
        stated = self.generation.eos_token_id if self.generation is not None else None
        return frozenset(end_tokens(tokenizer, self.template) | set(stated or ()))


class Checkpoint(NamedTuple):
    """A model with its tokenizer and its config."""

    model: GPT | GPTClassifier
    tokenizer: Tokenizer
    config: CheckpointConfig


def lm_checkpoint(
    model: GPT,
    tokenizer: Tokenizer,
    template: Template | None,
    system: str | None,
    chat: ChatSource | None = None,
    where: Path | None = None,
) -> Checkpoint:
    """Return the checkpoint of a GPT, in evaluation mode; its kind is instruct where it can be asked, else base.

    `chat` is of open weights from the place `where`. Their own chat template is the one that is used. Where it cannot
    be rendered, a warning says so, and the model is a base model that keeps the template for its exports.
    """
    chat = _without_ours(chat or ChatSource(), tokenizer, template, system)
    config = CheckpointConfig(kind="base", gpt=model.config, **_chat_fields(chat))
    asked = {"kind": "instruct", "template": template, "system": system}
    if chat.templates is None:
        config = config if template is None else config.model_copy(update=asked)
    elif problem := _problem(own := config.conversations(tokenizer)):
        log.warning("%s: its chat template cannot be used, only kept: %s", where or "model", problem)
    else:
        config = config.model_copy(update=asked)
        settings = config.generation or GenerationConfig()
        if settings.eos_token_id is None and own.turn_end is not None:
            ends = list(dict.fromkeys([own.turn_end, tokenizer.eot]))
            config = config.model_copy(update={"generation": settings.model_copy(update={"eos_token_id": ends})})
    return Checkpoint(model.eval(), tokenizer, CheckpointConfig.model_validate(dict(config)))


def _without_ours(chat: ChatSource, tokenizer: Tokenizer, template: Template | None, system: str | None) -> ChatSource:
    """Return what a foreign file says beyond what our exports write by themselves."""
    templates, special_tokens, generation = chat
    if template is not None and templates == {DEFAULT: TEMPLATES[template].jinja(tokenizer, system)}:
        templates = None
    if special_tokens == default_special_tokens(tokenizer):
        special_tokens = None
    if generation is not None:
        plain = GenerationConfig(bos_token_id=tokenizer.bos, eos_token_id=sorted(end_tokens(tokenizer, template)))
        ends = sorted(generation.eos_token_id or [])
        if generation.model_copy(update={"eos_token_id": ends}) == plain:
            generation = None
    return ChatSource(templates, special_tokens, generation)


def _chat_fields(chat: ChatSource) -> dict[str, Any]:
    return {"chat_templates": chat.templates, "special_tokens": chat.special_tokens, "generation": chat.generation}


def _problem(conversations: ConversationEncoder) -> str | None:
    """Return the reason why a chat template can render no question, not even below a system message."""
    question = {"role": "user", "content": "How are you?"}
    problem = ""
    for messages in ([question], [{"role": "system", "content": "Be kind."}, question]):
        try:
            conversations.encode(messages)
        except InputError as error:
            problem = problem or str(error).removeprefix("messages: ")
        else:
            return None
    return problem


def save_checkpoint(
    folder: Path, content: Checkpoint, more: Mapping[str, bytes] | None = None, card: Card | None = None
) -> None:
    """Write a model folder, whole or not at all, in place of any earlier one.

    `more` are further files, by their path inside the folder.
    """
    with replaced_folder(folder) as new:
        (new / "config.json").write_text(content.config.model_dump_json(indent=2, exclude_none=True) + "\n")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in stored_tensors(content.model).items()}
        write_tensors(new / "model.safetensors", weights)
        content.tokenizer.save(new)
        for name, data in {**template_files(content.config.chat_templates or {}), **(more or {})}.items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_bytes(data)
        if card is not None:
            write_card(new, card, readme(card, folder.name))


def load_checkpoint(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> Checkpoint:
    """Read a model folder, in evaluation mode; raise `InputError` if anything of it is missing or does not fit.

    `dtype` None keeps the stored one.
    """
    config, tokenizer = read_checkpoint_config(folder)
    path = folder / "model.safetensors"
    found = tensors_in(path)
    check_layers(path, len(found), config.gpt)
    with without_weights():
        gpt = GPT(config.gpt)
        model = GPTClassifier(gpt, len(config.labels)) if config.labels else gpt
    load_weights(model, path, found, torch.device(device), dtype)
    return Checkpoint(model.eval(), tokenizer, config)


def read_checkpoint_config(folder: Path) -> tuple[CheckpointConfig, Tokenizer]:
    """Read the config and tokenizer of a model folder, without the weights."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a model folder: config.json is missing; name a folder such as models/base")
    content = read_json(path, "make the model folder again")
    if isinstance(content, dict) and (templates := read_template_files(folder)) is not None:
        content["chat_templates"] = templates
    try:
        config = CheckpointConfig.model_validate(content)
    except ValidationError as error:
        raise InputError(explain(error, str(path))) from None
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.gpt.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.gpt.vocab_size}; "
            "they do not belong together"
        )
    return config, tokenizer
