"""SentencePiece's tokenizer.model: pieces and their scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from llm.common.errors import InputError
from llm.tokenizer.bpe import Form

FILE_NAME = "tokenizer.model"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces, in GGUF files too
BPE = 2  # trainer_spec.model_type


class SentencePieceModel(NamedTuple):
    """The content of a tokenizer.model."""

    ids: dict[str, int]
    scores: dict[str, float]
    added: dict[str, bool]  # whether a piece that is matched as a whole is special
    names: dict[str, str]  # its `bos_token` and `eos_token`
    form: Form
    changes_text: str | None  # what it does to a text before encoding it, beside marking spaces


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a tokenizer.model; raise `InputError` for one that is no BPE."""
    model = _parsed(path)
    if model.trainer_spec.model_type != BPE:
        name = model.trainer_spec.ModelType.Name(model.trainer_spec.model_type)
        raise InputError(f"{path}: a {name} model of SentencePiece; only its BPE can be imported exactly")
    ids: dict[str, int] = {}
    scores, added = {}, {}
    for number, piece in enumerate(model.pieces):
        if ids.setdefault(piece.piece, number) != number:
            raise InputError(f"{path}: {ids[piece.piece]} and {number} are both {piece.piece!r}; fetch it again")
        scores[piece.piece] = piece.score
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED):
            added[piece.piece] = piece.type != USER_DEFINED
        elif piece.type == UNUSED:
            raise InputError(f"{path}: the piece {piece.piece!r} is marked as unused; that is not known here")
    spec = model.normalizer_spec
    changes = None
    if spec.precompiled_charsmap:
        changes = f"normalizes texts by {spec.name or 'a table'}"
    elif spec.remove_extra_whitespaces:
        changes = "removes spaces (remove_extra_whitespaces)"
    trained = model.trainer_spec
    ends = {"bos_token": (trained.bos_id, trained.bos_piece), "eos_token": (trained.eos_id, trained.eos_piece)}
    names = {key: name for key, (number, name) in ends.items() if number >= 0}
    form = Form(prefix="prepend", strips_space=True) if spec.add_dummy_prefix else Form()
    return SentencePieceModel(ids, scores, added, names, form, changes)


def _parsed(path: Path) -> Any:
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise InputError(
            f"{path}: reading it needs the package sentencepiece; pip install -c constraints.txt -e '.[hf]'"
        ) from None
    try:
        content = path.read_bytes()
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(content)  # says what is wrong with it
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: no model of SentencePiece ({error}); fetch it again") from None
    messages: Any = sentencepiece_model_pb2  # made by protobuf, without types
    model = messages.ModelProto()
    model.ParseFromString(content)
    return model
