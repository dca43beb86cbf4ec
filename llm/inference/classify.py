"""Classification of texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm.checkpoint.folder import Checkpoint
from llm.common.errors import InputError
from llm.data.batches import batches_by_length, collate_labels
from llm.data.examples import Example, encode_message
from llm.model.classifier import GPTClassifier


@torch.no_grad()
def classify_texts(folder: Checkpoint, texts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Return the label probabilities [N, labels] of texts, in the order of `folder.config.labels`."""
    model, tokenizer, config = folder
    if not isinstance(model, GPTClassifier) or config.labels is None or config.max_length is None:
        raise InputError(f"this is a model of kind {config.kind}, not a classifier; name one such as models/classifier")
    device = next(model.parameters()).device
    examples = [Example(encode_message(tokenizer, text, config.max_length), 0, 0) for text in texts]
    probabilities = torch.empty(len(texts), len(config.labels))
    for batch in batches_by_length(examples, collate_labels, batch_size):
        batch = batch.to(device)
        assert batch.lengths is not None
        probabilities[batch.rows] = model(batch.idx, batch.lengths).float().softmax(dim=-1).cpu()
    return probabilities
