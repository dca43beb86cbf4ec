"""Show records as a training reads them: their tokens, which of them count in the loss, what is cut and dropped.

All of it is done by the code of the stages: tokenizers, templates, cleaning, examples and batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm.cli.subject import downloads, mirror
from llm.common.errors import InputError
from llm.config import AUTO, SCRATCH, MessagesSource, Params
from llm.data.batches import IGNORE_INDEX, collate_pairs
from llm.data.examples import Message, Pair, message_examples, pair_examples
from llm.download.fetching.fetch import fetch
from llm.download.hub import source_files
from llm.download.look import first_records
from llm.preprocess import clean, lengths, supervised
from llm.preprocess.chunks import cut_chunks
from llm.preprocess.clean_corpus import Funnel, clean_corpus
from llm.preprocess.corpus import line_batches, read_batch
from llm.preprocess.lengths import Limit, TooLong
from llm.preprocess.supervised import Row, SplitRows
from llm.preprocess.workers import Workers
from llm.tokenizer.bpe import FILE_NAME, Tokenizer
from llm.tokenizer.build import ImportedTokenizer
from llm.tokenizer.conversation import ConversationEncoder, as_messages
from llm.tokenizer.load import import_tokenizer, own_conversations

SHOWN = 3  # records
MADE_HERE = (Path("data/tokens/tokenizer"), Path("models/base"))
GPT2_FILES = (Path("data/raw/gpt2/encoder.json"), Path("data/raw/gpt2/vocab.bpe"))
THESE = "these records"  # stands for the name of a split


class Choice(NamedTuple):
    """The tokenizer of a training, and the params that go with it."""

    params: Params
    imported: ImportedTokenizer
    name: str

    @property
    def tokenizer(self) -> Tokenizer:
        return self.imported.tokenizer


class Shown(NamedTuple):
    """The tokens of one record, each with whether it counts in the loss."""

    title: str
    ids: Sequence[int]
    counts: Sequence[bool]
    label: str = ""  # of a message, which is what counts


class View(NamedTuple):
    title: str
    shown: list[Shown]
    effects: list[str]  # on all records that were read, a line each


# ---- tokenizer and template ------------------------------------------------------------------------------------------


def choose_tokenizer(params: Params, wanted: str | None, texts: Iterable[str]) -> Choice:
    """Return the tokenizer that is wanted, or the one that the stages use by `params`.

    Where these would train one and have not yet, one is trained on `texts`.
    """
    if wanted is not None:
        if (Path(wanted) / FILE_NAME).is_file() and not (Path(wanted) / "config.json").is_file():
            return Choice(params, ImportedTokenizer(Tokenizer.load(Path(wanted)), None, None), wanted)
        kind = "gpt2" if wanted == "gpt2" else params.tokenize.tokenizer.kind
        params = _changed(params, "pretrain", init=SCRATCH if wanted == "gpt2" else wanted)
        tokenizer = params.tokenize.tokenizer.model_copy(update={"kind": kind})
        params = _changed(params, "tokenize", tokenizer=tokenizer)
    if params.pretrain.init != SCRATCH:
        return Choice(params, import_tokenizer(source_files(params.pretrain.init, weights=False)), params.pretrain.init)
    section = params.tokenize.tokenizer
    if section.kind == "gpt2":
        files = GPT2_FILES
        if not all(path.is_file() for path in files):
            declared = (params.gpt2_files.encoder, params.gpt2_files.merges)
            encoder, merges = (fetch(file, downloads(), mirror())[0].path for file in declared)
            files = encoder, merges
        return Choice(params, ImportedTokenizer(Tokenizer.gpt2(*files), None, None), "gpt2")
    for folder in MADE_HERE:
        if (folder / FILE_NAME).is_file():
            return Choice(params, ImportedTokenizer(Tokenizer.load(folder), None, None), folder.as_posix())
    trained = Tokenizer.train(texts, section.vocab_size, exact=False)
    return Choice(params, ImportedTokenizer(trained, None, None), "trained for this look, as none is made yet")


def _changed(params: Params, section: str, **values: Any) -> Params:
    return params.model_copy(update={section: getattr(params, section).model_copy(update=values)})


def with_template(params: Params, template: str | None) -> Params:
    return params if template is None else _changed(params, "finetune_instruct", template=template)


def conversation_encoder(choice: Choice) -> ConversationEncoder:
    """Return the encoder of `finetune_instruct.template`; raise `InputError` for own where there is none."""
    template, imported, init = choice.params.finetune_instruct.template, choice.imported, choice.params.pretrain.init
    if template != "own":
        system = imported.system if imported.template == template else None
        return ConversationEncoder(imported.tokenizer, template, system)
    if init == SCRATCH:
        raise InputError("template own: needs a model's chat template; name its folder with --tokenizer")
    return own_conversations(source_files(init, weights=False), imported.tokenizer)


def vocabulary_texts(params: Params, root: Path, kind: str, records: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Yield texts for a vocabulary: those of a corpus itself, else of the corpus of params.yaml where it is at hand."""
    section = params.sources[params.data.corpus].corpus
    if kind != "corpus" and section is not None and all(entry.path is not None for entry in section.files):
        entries = [entry.model_copy(update={"path": str(root / str(entry.path))}) for entry in section.files]
        try:
            files = [file for entry in entries for file in fetch(section.entry(entry), downloads())]
            records = first_records(section, files, rows=len(files) * 10_000).records
        except InputError:
            pass  # not at hand
    for record in records:
        if "text" in record:
            yield record["text"]
        elif "messages" in record or "instruction" in record:
            yield from (str(message.get("content") or "") for message in as_messages(record))


# ---- views -----------------------------------------------------------------------------------------------------------


def view(kind: str, section: Any, records: Sequence[Mapping[str, Any]], choice: Choice, scratch: Path) -> View:
    """Return the view of records as `data/raw/` has them; `scratch` is a folder for files of the stages' code."""
    path = scratch / f"{kind}.jsonl"
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    message_limit, pair_limit = lengths.finetuning_limits(choice.params)
    try:
        if kind == "corpus":
            return _view_corpus(path, choice, pair_limit)
        if kind == "messages":
            return _view_messages(path, section, choice, message_limit)
        return _view_pairs(path, choice, pair_limit)
    except InputError as error:
        message = str(error).replace(f"{path}: line", "record")
        return View("as the training reads them: not at all", [], [f"the tokenize stage refuses it: {message}"])


def _view_pairs(path: Path, choice: Choice, limit: Limit | None) -> View:
    section = choice.params.finetune_instruct
    rows = supervised.read_instructions(path)
    encoder = conversation_encoder(choice)
    shown = []
    for row in rows[:SHOWN]:
        pair = Pair(**row.fields)
        whole = encoder.encode_answers(as_messages(row.fields), pair.tools)
        room = len(whole.ids) if limit is None else limit.tokens
        if whole.cut(room) is None:
            title = f"{len(whole.ids):,} tokens, dropped: no room for an answer in {room:,}"
            shown.append(Shown(title, whole.ids, [False] * len(whole.ids)))
            continue
        [example] = pair_examples([pair], encoder, room, mask_prompt=section.mask_prompt, loss_on=section.loss_on)
        targets = collate_pairs([example], [0]).targets[0].tolist()  # of all tokens but the first
        in_loss = [False, *(target != IGNORE_INDEX for target in targets)]
        title = f"{len(whole.ids):,} tokens, {sum(in_loss):,} count in the loss"
        if example.is_cut:
            lost = "the answer lacks its end" if len(whole.spans) == 1 else "the last turns are left out"
            title += f"; cut to {len(example.ids):,}: {lost}"
        shown.append(Shown(title, example.ids, in_loss))
    counts = {} if limit is None else lengths.count_pairs(_as_split(rows), encoder, limit)
    effects = [*_too_long("instructions", counts, limit, choice.params), *_repeats(rows)]
    template = f"template {section.template}, "
    return View(_title(choice, limit, template), shown, effects)


def _view_messages(path: Path, section: MessagesSource, choice: Choice, limit: Limit) -> View:
    with path.open(encoding="utf-8") as file:
        found = sorted({json.loads(line)["label"] for line in file})
    labels = found if section.labels == AUTO else section.labels
    rows = supervised.read_messages(path, labels)
    shown = []
    for row in rows[:SHOWN]:
        message = Message(**row.fields)
        [example] = message_examples([message], choice.tokenizer, labels, limit.tokens)
        whole = len(choice.tokenizer.encode(message.text))
        cut = f", cut to {len(example.ids):,}" if whole > len(example.ids) else ""
        title = f"{whole:,} tokens{cut}; the label counts in the loss"
        shown.append(Shown(title, example.ids, [False] * len(example.ids), message.label))
    counts = lengths.count_messages(_as_split(rows), choice.tokenizer, limit)
    effects = [*_too_long("messages", counts, limit, choice.params), *_repeats(rows)]
    return View(_title(choice, limit), shown, effects)


def _view_corpus(path: Path, choice: Choice, limit: Limit | None) -> View:
    params, effects = choice.params.tokenize, ["tokenize.clean: no rule is on"]
    if clean.is_on(params.clean):
        with Workers(1) as workers:
            cleaned = path.with_suffix(".clean.jsonl")
            funnel = clean_corpus(path, cleaned, params.clean, workers, path.with_suffix(".shards"))
        path, effects = cleaned, _funnel_lines(funnel)
    texts = [text for batch in line_batches(path) for _, text in read_batch(path, batch)]
    tokenizer, context = choice.tokenizer, None if limit is None else limit.tokens
    sizes = [len(tokenizer.encode_array(text)) for text in texts]
    shown = []
    for text, size in list(zip(texts, sizes, strict=True))[:SHOWN]:
        chunks = cut_chunks(text, params.corpus.chunk_chars if params.corpus.split == "leak_free" else len(text) or 1)
        ids = tokenizer.encode_array("".join(chunks[:1])).tolist() + ([tokenizer.eot] if len(chunks) < 2 else [])
        more = f" in {len(chunks):,} chunks of which this is the first" if len(chunks) > 1 else ""
        shown.append(Shown(f"{size:,} tokens{more}; all count in the loss", ids, [True] * len(ids)))
    total, n_bytes = sum(sizes) + len(texts), sum(len(text.encode()) for text in texts)
    windows = "" if context is None else f", {total // context:,} windows of {context:,}"
    effects.append(f"{total:,} tokens{windows}; {n_bytes / max(1, sum(sizes)):.2f} bytes a token; none is cut off")
    return View(_title(choice, limit), shown, effects)


def _funnel_lines(funnel: Funnel) -> list[str]:
    lines = [f"tokenize.clean: {funnel.left:,} of {funnel.texts:,} texts are left"]
    for rule in funnel.changed:
        removed, changed, samples = funnel.removed[rule], funnel.changed[rule], funnel.samples[rule]
        counts = " and ".join(f"{n:,} {what}" for n, what in ((removed, "removed"), (changed, "changed")) if n)
        example = f", such as {' '.join(samples[0].split())!r}" if samples else ""
        lines.append(f"  {rule}: {counts or 'nothing'}{example}")
    return lines


def _as_split(rows: list[Row]) -> SplitRows:
    return SplitRows({THESE: rows}, 0, {})


def _too_long(kind: str, counts: Mapping[str, TooLong], limit: Limit | None, params: Params) -> list[str]:
    """Return a line on the records that are too long, and where they are too many the stage's refusal."""
    if limit is None:
        return ["the context of the model is not known, so neither is what is too long for it"]
    try:
        line = lengths.check_lengths(kind, counts, limit, params.tokenize.max_too_long)
    except InputError as error:
        return [f"the tokenize stage refuses it: {error}"]
    return [line or f"none is longer than {limit.key} ({limit.tokens:,} tokens)"]


def _repeats(rows: Sequence[Row]) -> list[str]:
    repeats = len(rows) - len({(row.key, row.answer) for row in rows})
    return [f"{repeats:,} repeat an earlier one; val and test hold each once"] if repeats else []


def _title(choice: Choice, limit: Limit | None, template: str = "") -> str:
    tokenizer = f"tokenizer {choice.name} ({choice.tokenizer.vocab_size:,} tokens)"
    room = "" if limit is None else f", up to {limit.tokens:,} tokens ({limit.key})"
    return f"as the training reads them: {template}{tokenizer}{room}"
