"""Model folders as Python objects: load, generate, stream, chat, classify, score."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from llm.checkpoint.folder import Checkpoint, load_checkpoint
from llm.common.device import pick_device
from llm.common.errors import InputError
from llm.inference.classify import classify_texts
from llm.inference.compiled import CompiledDecoder
from llm.inference.generate import generate, stream, stream_text
from llm.inference.int8 import to_int8
from llm.inference.prefill import PrefixCache
from llm.inference.request import Decoder
from llm.inference.sampling import GREEDY, Sampling
from llm.inference.score import Score, score_tokens
from llm.model.gpt import GPT
from llm.tokenizer.prompts import TEMPLATES, end_tokens

__all__ = ["InputError", "Message", "Model", "Prompt", "Sampling", "Score", "load"]

Message = Mapping[str, str]  # role, content and perhaps input, a text that the content is about
Prompt = str | Sequence[Message]  # a text to continue, or messages to answer
MAX_NEW_TOKENS = 200
GPT_KINDS = ("base", "instruct")

log = logging.getLogger("llm")


def load(
    path: str | Path,
    *,
    device: str = "auto",
    int8: bool = False,
    compiled: bool = False,
    draft: str | Path | None = None,
) -> Model:
    """Load a model folder. `device` is auto, cpu, cuda or mps; auto takes a GPU if there is one.

    `int8` rounds the weights to 8 bits. `compiled` compiles the decoding of a single row. `draft` is the folder of a
    smaller model with the same tokenizer, for speculative decoding.

    >>> import llm
    >>> model = llm.load("models/base", device="cpu")
    >>> model.kind
    'base'
    """
    where = pick_device(device)
    model = Model(load_checkpoint(Path(path), where), path)
    if int8:
        to_int8(model.gpt)
    if draft is not None:
        small = Model(load_checkpoint(Path(draft), where), draft)
        if small.checkpoint.tokenizer != model.checkpoint.tokenizer:
            raise InputError(f"{draft}: the draft has another tokenizer than {path}; choose one that shares it")
        model.draft = small.gpt
    if compiled:
        log.info("compiling the step of a token")
        model.decoder = CompiledDecoder(model.gpt)
        model.draft = None if model.draft is None else CompiledDecoder(model.draft.gpt)
    return model


class Model:
    """A checkpoint in memory, for one caller at a time."""

    def __init__(self, checkpoint: Checkpoint, path: str | Path = "this model") -> None:
        """Wrap a checkpoint; error messages call it by its path."""
        self.checkpoint, self.path = checkpoint, path
        self.decoder: Decoder | None = None  # in place of the model itself, where its steps are compiled
        self.draft: Decoder | None = None
        self._prefix = PrefixCache()

    @property
    def kind(self) -> str:
        return self.checkpoint.config.kind

    @property
    def gpt(self) -> GPT:
        self.require(*GPT_KINDS)
        assert isinstance(self.checkpoint.model, GPT)
        return self.checkpoint.model

    def require(self, *kinds: str) -> None:
        """Raise `InputError` unless the model is of one of these kinds."""
        if self.kind not in kinds:
            wanted = " or ".join(kinds)
            raise InputError(
                f"{self.path}: wrong kind of model (expected {wanted}, got {self.kind}); use models/{kinds[0]}"
            )

    def generate(
        self, prompt: Prompt, *, max_new_tokens: int = MAX_NEW_TOKENS, sampling: Sampling = GREEDY, seed: int = 0
    ) -> str:
        """Return the continuation of a text, or the answer to messages.

        >>> model.generate("One morning", max_new_tokens=30)
        ' the baker sold bread at the harbour.'
        >>> model.generate("One morning", sampling=llm.Sampling(temperature=0.01, top_p=0.9), seed=7)
        ' the baker sold bread at the harbour.'
        """
        return "".join(self.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed))

    def stream(
        self, prompt: Prompt, *, max_new_tokens: int = MAX_NEW_TOKENS, sampling: Sampling = GREEDY, seed: int = 0
    ) -> Iterator[str]:
        """Return the pieces of `generate`'s text, each as soon as it is known. Errors come at the call.

        The KV cache of the previous prompt is reused as far as both begin alike.

        >>> "".join(model.stream("One morning"))
        ' the baker sold bread at the harbour.'
        """
        tokenizer = self.checkpoint.tokenizer
        tokens = stream(
            self.decoder or self.gpt,
            self._encode(prompt),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop=self._stop(),
            prefix=self._prefix,
            draft=self.draft,
        )
        return stream_text(tokenizer, tokens)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> str:
        """Return the answer of an instruct model to a user message, which a system message may precede.

        >>> llm.load("models/instruct", device="cpu").chat([{"role": "user", "content": "Name a trade."}])
        'A baker.'
        """
        return self.generate(messages, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> list[str]:
        """Return the text that `generate` gives for each prompt, `batch_size` at a time; prompt i has seed + i.

        >>> model.generate_batch(["One morning", "One morning the baker"])
        [' the baker sold bread at the harbour.', ' sold bread at the harbour.']
        """
        answers = generate(
            self.gpt,
            [self._encode(prompt) for prompt in prompts],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop=self._stop(),
            batch_size=batch_size,
        )
        return [self.checkpoint.tokenizer.decode(ids) for ids in answers]

    def classify(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Return the probability of each label, for each text.

        >>> classifier = llm.load("models/classifier", device="cpu")
        >>> [found] = classifier.classify(["You have won a prize!"])
        >>> max(found, key=found.get), round(sum(found.values()), 3)
        ('spam', 1.0)
        """
        self.require("classifier")
        labels = self.checkpoint.config.labels or []
        rows = classify_texts(self.checkpoint, texts).tolist()
        return [dict(zip(labels, row, strict=True)) for row in rows]

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

    def _encode(self, prompt: Prompt) -> list[int]:
        tokenizer, config = self.checkpoint.tokenizer, self.checkpoint.config
        if isinstance(prompt, str):
            ids = [*([] if tokenizer.bos is None else [tokenizer.bos]), *tokenizer.encode(prompt)]
        else:
            self.require("instruct")
            assert config.template is not None
            template = TEMPLATES[config.template]
            system, user = split_messages(prompt)
            if system is not None and not template.has_system:
                name = config.template
                raise InputError(f"messages: the template {name} has no place for a system message; leave it out")
            above = config.system if system is None else system["content"]
            ids = template.encode(tokenizer, user["content"], user.get("input", ""), above)
        context_length = self.gpt.config.context_length
        if len(ids) > context_length:
            log.warning("the prompt has %d tokens, the model reads the last %d", len(ids), context_length)
        return ids

    def _stop(self) -> Collection[int]:
        return end_tokens(self.checkpoint.tokenizer, self.checkpoint.config.template)


def split_messages(messages: Sequence[Message]) -> tuple[Message | None, Message]:
    """Return the system message, if there is one, and the user message; conversations of several turns are refused."""
    roles = [message.get("role", "none") for message in messages]
    if roles not in (["user"], ["system", "user"]):
        found = ", ".join(map(str, roles)) or "none"
        raise InputError(f"messages: no single question (expected roles user, or system and user, got {found})")
    for message in messages:
        if not isinstance(message.get("content"), str):
            raise InputError(f"messages: the {message['role']} message has no text as its content; give a string")
    return (messages[0] if len(messages) > 1 else None), messages[-1]
