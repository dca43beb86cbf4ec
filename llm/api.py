"""Model folders as Python objects: load, generate, stream, chat, classify, score."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from llm.checkpoint.folder import Checkpoint, load_checkpoint
from llm.common.device import pick_device
from llm.common.errors import InputError
from llm.convert.cache import model_folder
from llm.data.about import About, read_about
from llm.inference.classify import NO_TEXT, classify_texts, decide, doubt, has_text
from llm.inference.generate import generate, stream, stream_text
from llm.inference.grouped import to_int4
from llm.inference.int8 import to_int8
from llm.inference.kernels.build import load_kernels
from llm.inference.prefill import PrefixCache, use_prompt_kernels
from llm.inference.request import Decoder
from llm.inference.sampling import GREEDY, Sampling, sampling_of
from llm.inference.score import Score, score_tokens
from llm.inference.speculative import PROMPT
from llm.model.gpt import GPT
from llm.tokenizer.conversation import ConversationEncoder, fit_turns
from llm.tokenizer.prompts import Message

__all__ = ["InputError", "Message", "Model", "Prompt", "Sampling", "Score", "load"]

Prompt = str | Sequence[Message]  # a text to continue, or messages to answer
MAX_NEW_TOKENS = 200
GPT_KINDS = ("base", "instruct")

log = logging.getLogger("llm")


def load(
    path: str | Path,
    *,
    device: str = "auto",
    int8: bool = False,
    int4: bool = False,
    int8_cache: bool = False,
    compiled: bool = False,
    draft: str | Path | None = None,
) -> Model:
    """Load a model. `device` is auto, cpu, cuda or mps; auto takes a GPU if there is one.

    `path` is a model folder, or another tool's model: a folder of transformers, a .gguf file or a hub name, which is
    imported into a cache at its first use (see `llm.convert.cache`).

    `int8` rounds the weights to 8 bits, `int4` to 4; `int8_cache` keeps keys and values in 8 bits. `compiled` compiles
    the decoding of a single row. `draft` is for speculative decoding: a smaller model with the same tokenizer, or
    "prompt" to draft from the text so far.

    >>> import llm
    >>> model = llm.load("models/base", device="cpu")
    >>> model.kind
    'base'
    """
    where = pick_device(device)
    model = Model(load_checkpoint(model_folder(path), where), path)
    if int8 and int4:
        raise InputError("int8 and int4 are two roundings of the same weights; choose one")
    if int8:
        to_int8(model.gpt)
    elif int4:
        load_kernels()
        to_int4(model.gpt)
    if int8_cache:
        model.gpt.int8_cache = True
    if draft == PROMPT:
        model.draft = PROMPT
    elif draft is not None:
        small = Model(load_checkpoint(model_folder(draft), where), draft)
        if small.checkpoint.tokenizer != model.checkpoint.tokenizer:
            raise InputError(f"{draft}: the draft has another tokenizer than {path}; choose one that shares it")
        model.draft = small.gpt
    if compiled:
        log.info("compiling the step of a token")
        model.decoder = _compile_steps(model.gpt)
        if model.draft is not None and not isinstance(model.draft, str):
            model.draft = _compile_steps(model.draft.gpt)
    return model


def _compile_steps(gpt: GPT) -> Decoder:
    """Return a model with compiled decode steps; on a CPU it also reads prompts by kernels."""
    from llm.inference.compiled import CompiledDecoder

    if gpt.tok_emb.weight.device.type == "cpu":
        load_kernels()
        use_prompt_kernels(gpt)
    return CompiledDecoder(gpt)


@dataclass
class Usage:
    """The tokens of one text: read and written so far."""

    prompt_tokens: int = 0
    new_tokens: int = 0


class Model:
    """A checkpoint in memory, for one caller at a time."""

    def __init__(self, checkpoint: Checkpoint, path: str | Path = "this model") -> None:
        """Wrap a checkpoint; error messages call it by its path."""
        self.checkpoint, self.path = checkpoint, path
        self.decoder: Decoder | None = None  # in place of the model itself, where its steps are compiled
        self.draft: Decoder | Literal["prompt"] | None = None
        self.usage = Usage()  # of the latest `stream`
        self._prefix = PrefixCache()

    @property
    def kind(self) -> str:
        return self.checkpoint.config.kind

    @property
    def gpt(self) -> GPT:
        self.require(*GPT_KINDS)
        assert isinstance(self.checkpoint.model, GPT)
        return self.checkpoint.model

    @property
    def about(self) -> About | None:
        """Return what the model was trained on, where its folder tells it."""
        return read_about(Path(self.path))

    def require(self, *kinds: str) -> None:
        """Raise `InputError` unless the model is of one of these kinds."""
        if self.kind not in kinds:
            wanted = " or ".join(kinds)
            raise InputError(
                f"{self.path}: wrong kind of model (expected {wanted}, got {self.kind}); use models/{kinds[0]}"
            )

    @property
    def sampling(self) -> Sampling:
        """Return the default choice of tokens, greedy unless the model's generation settings say otherwise."""
        settings = self.checkpoint.config.generation
        return GREEDY if settings is None else sampling_of(settings)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Return all tokens that end a text."""
        return self.checkpoint.config.stop_ids(self.checkpoint.tokenizer)

    def encode_conversation(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the tokens of a conversation of any length; see `ConversationEncoder.encode`."""
        return self._conversations.encode(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, template_kwargs=template_kwargs
        )

    def has_template_variable(self, name: str) -> bool:
        """Return whether the model's own chat template may read a variable of this name."""
        sources = (self.checkpoint.config.chat_templates or {}).values()
        return name.isidentifier() and any(re.search(rf"\b{name}\b", source) for source in sources)

    def fit_messages(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[list[Message], list[int]]:
        """Return a conversation that fits into the context with its answer, as messages and as tokens.

        The oldest turns are left out, whole. The answer has room for `max_new_tokens`, at most half of the context.
        System messages and the last turn stay. Raises `InputError` where these alone are longer than the context, and
        where no question is at the end.
        """
        encoder, context_length = self._conversations, self.gpt.config.context_length
        kept, ids, left_out = fit_turns(
            messages,
            lambda kept: encoder.encode(kept, tools=tools, template_kwargs=template_kwargs),
            budget=context_length - min(max_new_tokens, context_length // 2),
        )
        require_question(messages)
        if len(ids) > context_length:
            raise InputError(
                f"messages: the last turn has {len(ids)} tokens with the system message and the template "
                f"(expected at most {context_length}, the model's context); shorten it"
            )
        if left_out:
            log.info("the context is full: turns left out, the oldest first: %d", left_out)
        return kept, ids

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> str:
        """Return the continuation of a text, or the answer to messages.

        Without `sampling` the model's own choice applies, which is greedy for models trained here.

        >>> model.generate("One morning", max_new_tokens=30)
        ' the baker sold bread at the harbour.'
        >>> model.generate("One morning", sampling=llm.Sampling(temperature=0.01, top_p=0.9), seed=7)
        ' the baker sold bread at the harbour.'
        """
        return "".join(self.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed))

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | None = None,
        seed: int = 0,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[str]:
        """Return the pieces of `generate`'s text, each as soon as it is known. Errors come at the call.

        The KV cache of the previous prompt is reused as far as both begin alike. `tools` and `template_kwargs` go to
        the model's own chat template.

        >>> "".join(model.stream("One morning"))
        ' the baker sold bread at the harbour.'
        """
        ids = self._encode(prompt, max_new_tokens, tools, template_kwargs)
        usage = self.usage = Usage(len(ids))
        tokens = stream(
            self.decoder or self.gpt,
            ids,
            max_new_tokens=max_new_tokens,
            sampling=self.sampling if sampling is None else sampling,
            seed=seed,
            stop=self.stop_ids,
            prefix=self._prefix,
            draft=self.draft,
        )
        return stream_text(self.checkpoint.tokenizer, _counted(tokens, usage))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | None = None,
        seed: int = 0,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the answer of an instruct model to a conversation that ends in a user message.

        The oldest turns are left out where the context has no place for them; see `fit_messages`.

        >>> llm.load("models/instruct", device="cpu").chat([{"role": "user", "content": "Name a trade."}])
        'A baker.'
        """
        more: dict[str, Any] = {"sampling": sampling, "seed": seed, "tools": tools, "template_kwargs": template_kwargs}
        return "".join(self.stream(messages, max_new_tokens=max_new_tokens, **more))

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | None = None,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> list[str]:
        """Return the text that `generate` gives for each prompt, `batch_size` at a time; prompt i has seed + i.

        >>> model.generate_batch(["One morning", "One morning the baker"])
        [' the baker sold bread at the harbour.', ' sold bread at the harbour.']
        """
        answers = generate(
            self.gpt,
            [self._encode(prompt, max_new_tokens) for prompt in prompts],
            max_new_tokens=max_new_tokens,
            sampling=self.sampling if sampling is None else sampling,
            seed=seed,
            stop=self.stop_ids,
            batch_size=batch_size,
        )
        return ["".join(stream_text(self.checkpoint.tokenizer, ids)) for ids in answers]

    def classify(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Return the probability of each label, for each text; a text with nothing to label is refused.

        >>> classifier = llm.load("models/classifier", device="cpu")
        >>> [found] = classifier.classify(["You have won a prize!"])
        >>> max(found, key=found.get), round(sum(found.values()), 3)
        ('spam', 1.0)
        """
        self.require("classifier")
        for number, text in enumerate(texts):
            if not has_text(self.checkpoint.tokenizer, text):
                raise InputError(f"texts[{number}]: {NO_TEXT} to label, found {text[:50]!r}; leave it out")
        labels = self.checkpoint.config.labels or []
        rows = classify_texts(self.checkpoint, texts).tolist()
        return [dict(zip(labels, row, strict=True)) for row in rows]

    def decide(self, probabilities: Mapping[str, float]) -> str:
        """Return the label of a text's probabilities: by the model's threshold, else the likeliest; or `unsure`.

        >>> classifier.decide({"ham": 0.2, "spam": 0.8})
        'spam'
        """
        return decide(self.checkpoint.config, probabilities)

    def doubt(self, text: str) -> str | None:
        """Return why a label of this text would mean little, or None.

        >>> model.doubt(" ")
        'no letter, digit or sign'
        """
        return doubt(self.checkpoint.tokenizer, text)

    def score(self, text: str) -> Score:
        """Return how well the model predicts a text: its tokens but the first, each scored once.

        >>> score = model.score("One morning the baker sold bread at the harbour.")
        >>> score.perplexity < 2
        True
        """
        ids = self.checkpoint.tokenizer.encode(text)
        if len(ids) < 2:
            raise InputError("a single token; the first is never scored, so a text needs at least two")
        return score_tokens(self.gpt, torch.tensor(ids))

    @cached_property
    def _conversations(self) -> ConversationEncoder:
        self.require("instruct")
        return self.checkpoint.config.conversations(self.checkpoint.tokenizer)

    def _encode(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        if not isinstance(prompt, str):
            more: dict[str, Any] = {"tools": tools, "template_kwargs": template_kwargs}
            return self.fit_messages(prompt, max_new_tokens=max_new_tokens, **more)[1]
        tokenizer, context_length = self.checkpoint.tokenizer, self.gpt.config.context_length
        ids = [*tokenizer.bos_ids, *tokenizer.encode(prompt)]
        if len(ids) > context_length:
            log.warning("the prompt has %d tokens, the model reads the last %d", len(ids), context_length)
        return ids


def _counted(tokens: Iterator[int], usage: Usage) -> Iterator[int]:
    """Yield tokens, each counted."""
    for token in tokens:
        usage.new_tokens += 1
        yield token


def require_question(messages: Sequence[Message]) -> None:
    """Raise `InputError` for a conversation that ends without a question."""
    if messages and (last := messages[-1]["role"]) in ("system", "assistant"):
        raise InputError(f"messages: no question at the end (expected the role user, got {last}); add one")
