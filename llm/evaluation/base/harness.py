"""Run lm-evaluation-harness (extra `eval`) on a model.

Likelihoods are those of `llm.inference.score`. A text longer than the context is read in windows that overlap by half,
as `python -m llm score` reads it; the harness's own models let them not overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llm.checkpoint.folder import Checkpoint
from llm.common.errors import InputError
from llm.inference.generate import generate
from llm.inference.sampling import GREEDY, Sampling
from llm.inference.score import score_continuations, token_nats
from llm.model.gpt import GPT

MAX_NEW_TOKENS = 64  # of an answer for which a task states none
KEPT = ("results", "n-shot", "versions", "n-samples", "higher_is_better")  # of the harness's output


def harness_lm(checkpoint: Checkpoint, batch_size: int = 32) -> Any:
    """Return a model as lm-evaluation-harness takes it."""
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError:
        raise InputError("lm-eval is missing; pip install 'textmill[eval]'") from None
    loaded, tokenizer, config = checkpoint
    if not isinstance(loaded, GPT):
        raise InputError(f"wrong kind of model (expected base or instruct, got {config.kind}); use models/base")
    model: GPT = loaded

    class HarnessLM(TemplateLM):  # type: ignore[misc]  # the package is no requirement, so it may have no types
        """The likelihoods and the greedy texts of one model."""

        @property
        def eot_token_id(self) -> int:
            return tokenizer.bos_ids[0] if tokenizer.bos_ids else tokenizer.eot

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
            start = [] if add_special_tokens is False else tokenizer.bos_ids
            return [*start, *tokenizer.encode(string)]

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return [(-found.nats, found.greedy) for found in score_continuations(model, pairs, batch_size)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            texts = [[self.eot_token_id, *tokenizer.encode(request.args[0])] for request in requests]
            return [-float(token_nats(model, torch.tensor(ids)).sum()) for ids in texts]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            settings = [request.args[1] for request in requests]
            prompts = [self.tok_encode(request.args[0]) or [tokenizer.eot] for request in requests]
            temperatures = {s.get("temperature", 1.0) if s.get("do_sample") else 0.0 for s in settings}
            if len(temperatures) > 1:
                raise InputError("requests of one task with different temperatures; give all the same")
            temperature = temperatures.pop() if temperatures else 0.0
            answers = generate(
                model,
                prompts,
                max_new_tokens=[s.get("max_gen_toks", MAX_NEW_TOKENS) for s in settings],
                sampling=Sampling(temperature=temperature) if temperature else GREEDY,
                stop=config.stop_ids(tokenizer),
                batch_size=batch_size,
            )
            return [cut(tokenizer.decode(ids), s.get("until") or []) for ids, s in zip(answers, settings, strict=True)]

    return HarnessLM()


def cut(text: str, until: str | Sequence[str]) -> str:
    """Return the text before the first of some endings."""
    ends = [until] if isinstance(until, str) else until
    return text[: min((text.find(end) for end in ends if end and end in text), default=len(text))]


def evaluate_tasks(
    checkpoint: Checkpoint,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Return the harness's results of a model on tasks, its own or those described in `include_path`."""
    lm = harness_lm(checkpoint)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise InputError(f"{', '.join(unknown)}: no such task; name one of the harness, or a folder by --include-path")
    found = simple_evaluate(
        lm, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False
    )
    return {key: found[key] for key in KEPT if found and key in found}
