"""Classification of texts."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llm.checkpoint.folder import Checkpoint, CheckpointConfig
from llm.common.errors import InputError
from llm.data.batches import batches_by_length, collate_labels
from llm.data.examples import Example, encode_message
from llm.model.classifier import GPTClassifier
from llm.tokenizer.bpe import Tokenizer

UNSURE = "unsure"  # in place of a label that means little
NO_TEXT = "no letter, digit or sign"
FEWEST_BYTES = 1.5  # a token: fewer, and the tokenizer has hardly any piece of the text as a whole
FEWEST_TOKENS = 4  # of a text that is judged so
SMALLEST_VOCABULARY = 768  # that has learned enough pieces to judge by


def has_text(tokenizer: Tokenizer, text: str) -> bool:
    """Return True for a text with a letter, digit or sign that the tokenizer knows.

    White space, control characters, what is not shown and U+FFFD are none of them.
    """
    signs = any(unicodedata.category(c)[0] in "LNPS" and c != "\ufffd" for c in text)
    return signs and bool(tokenizer.encode(text))


def doubt(tokenizer: Tokenizer, text: str) -> str | None:
    """Return why a label of this text means little, or None.

    `NO_TEXT`: there is nothing to label. Else the text is unlike the tokenizer's own: random letters, or another
    script. The mark is coarse; a probability is no measure of such things.
    """
    if not has_text(tokenizer, text):
        return NO_TEXT
    n_bytes, n_tokens = len(text.encode("utf-8", "replace")), len(tokenizer.encode(text))
    if n_tokens < FEWEST_TOKENS or tokenizer.vocab_size < SMALLEST_VOCABULARY or n_bytes >= FEWEST_BYTES * n_tokens:
        return None
    return f"unlike the text that the tokenizer knows: {n_bytes / n_tokens:.1f} bytes a token"


def classify_texts(folder: Checkpoint, texts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Return the calibrated label probabilities [N, labels] of texts, in the order of `folder.config.labels`."""
    return (label_logits(folder, texts, batch_size) / (folder.config.temperature or 1.0)).softmax(dim=-1)


def decide(config: CheckpointConfig, probabilities: Mapping[str, float]) -> str:
    """Return the label that a classifier's stored threshold gives, the likeliest without one; or `unsure`."""
    label = max(probabilities, key=probabilities.__getitem__)
    if (rule := config.decision) is not None:
        others = {name: p for name, p in probabilities.items() if name != rule.label}
        above = probabilities[rule.label] >= rule.threshold
        label = rule.label if above else max(others, key=others.__getitem__)
    return label if probabilities[label] >= (config.unsure_below or 0.0) else UNSURE


@torch.no_grad()
def label_logits(folder: Checkpoint, texts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Return the logits [N, labels] of texts, before calibration."""
    model, tokenizer, config = folder
    if not isinstance(model, GPTClassifier) or config.labels is None or config.max_length is None:
        raise InputError(f"this is a model of kind {config.kind}, not a classifier; name one such as models/classifier")
    device = next(model.parameters()).device
    examples = [Example(encode_message(tokenizer, text, config.max_length), 0, 0) for text in texts]
    logits = torch.empty(len(texts), len(config.labels))
    for batch in batches_by_length(examples, collate_labels, batch_size):
        batch = batch.to(device)
        assert batch.lengths is not None
        logits[batch.rows] = model(batch.idx, batch.lengths).float().cpu()
    return logits
