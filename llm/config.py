"""Every parameter of the project, typed: one frozen, strict model per section of `params.yaml`.

No value has a default here: `params.yaml` holds them all. Only what may be absent altogether (a backup URL, a zip
member) defaults to None. The section `training` holds what the three trainings share. `parse_params` merges it into
theirs, and turns a bad file into one line that names the key, the expected value and the found one.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llm.common.errors import InputError

KINDS = ("corpus", "messages", "instructions")  # of data
SPLITS = ("train", "val", "test")  # the later one is the more held out
TRAIN, VAL, TEST = range(3)
HELD_OUT = SPLITS[1:]


class Strict(BaseModel):
    """Unknown keys, missing keys and wrong types are errors; instances never change. Built at its first use."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, lt=0.5)]
SECRET = re.compile(  # something before the @ of a URL, or the value of such a parameter
    r"//[^/?#\s]*[^/?#\s:]:?@|[?&;]([^=&;\s]*(token(?!iz)|secret|passw|pwd|credential|signature)[^=&;\s]*"
    r"|([^=&;\s]*[_-])?(sig|auth|key)|(api|access)key)=[^&;\s]",
    re.IGNORECASE,
)
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

MAX_SIZE = 2**24  # no width, vocabulary or context of a model comes near
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Layers = Annotated[int, Field(ge=1, le=1000)]


def _checked_url(url: str) -> str:
    urlsplit(url)  # a ValueError for brackets that are no IPv6 address
    return url


Url = Annotated[str, AfterValidator(_checked_url)]


# ---- data ------------------------------------------------------------------------------------------------------------


def _as_text(value: Any) -> Any:
    """Return a number as text; raise `ValueError` for words that YAML makes other values of where no quotes are."""
    if isinstance(value, bool):
        words = "yes, on or true" if value else "no, off or false"
        raise ValueError(f'expected text, found {value}, which YAML makes of {words}; quote the word, as in "no"')
    if isinstance(value, int | float):
        return str(value)
    if value is not None and not isinstance(value, str | list | dict):
        raise ValueError(f"expected text, found {type(value).__name__} {value}; write it in quotes")
    return value


def _as_label(value: Any) -> Any:
    if value is None:
        raise ValueError('expected text, found null, which YAML makes of null, ~ or nothing; quote it, as in "null"')
    return _as_text(value)


def _checked_labels(labels: list[str]) -> list[str]:
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"expected each label once, found {twice[0]!r} twice; remove one")
    if len(labels) < 2 and labels != AUTO:
        raise ValueError(f"expected two labels or more, or auto, found {labels}; add the others")
    return labels


AUTO = ["auto"]  # labels that are found out


def _as_column(value: Any) -> Any:
    if isinstance(value, dict):
        raise ValueError("expected the name of a column; files for each split go to files: {train: ..., test: ...}")
    return _as_text(value)


Text = Annotated[str, BeforeValidator(_as_text)]
OptionalText = Annotated[str | None, BeforeValidator(_as_text)]
SplitColumn = Annotated[str | None, BeforeValidator(_as_column)]
Labels = Annotated[
    list[Annotated[str, BeforeValidator(_as_label)]],
    BeforeValidator(lambda value: AUTO if value == "auto" else value),
    AfterValidator(_checked_labels),
]


NO_ENCODINGS = ("idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape")  # of files, though of text


def _checked_encoding(name: str) -> str:
    try:
        codecs.getincrementaldecoder(name)().decode(b"")
        known = codecs.lookup(name).name not in (
            "idna",
            "punycode",
            "undefined",
            "unicode_escape",
            "raw_unicode_escape",
        )
    except (LookupError, TypeError, ValueError, OSError):
        known = False
    if not known:
        raise ValueError(f"expected the name of an encoding such as windows-1252 or gb18030, found {name!r}")
    return name


def _checked_separator(value: str) -> str:
    found = {"\\t": "\t", "tab": "\t", "comma": ",", "semicolon": ";"}.get(value, value)
    if len(found) != 1 or found in '"\r\n':
        raise ValueError(f"expected one character or tab, found {value!r}")
    return found


def _checked_header(value: Any) -> Any:
    names = [_as_label(name) for name in value] if isinstance(value, list) else value
    if not isinstance(names, bool | None) and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise ValueError(f"expected true, false or a list of the columns' names, found {value!r}")
    if isinstance(names, list) and (not names or len(set(names)) < len(names)):
        raise ValueError(f"expected a name of its own for each column, found {names}")
    return names


Format = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "pdf", "html", "epub", "docx", "xlsx"]
ORIENTATIONS = ("split", "index", "columns", "lists")  # of tables in one JSON object


def _checked_records(value: str) -> str:
    if value not in ORIENTATIONS and not re.fullmatch(r"[^.\[\]]+(\[\])?(\.[^.\[\]]+(\[\])?)*", value):
        raise ValueError(f"expected a path such as data[].paragraphs[], or {', '.join(ORIENTATIONS)}, found {value!r}")
    if value not in ORIENTATIONS and "[]" not in value:
        raise ValueError(f"expected [] behind the key of a list, as in {value}[], found {value!r}")
    return value


class ReadOptions(Strict):
    """Properties of files that are found out where they are not stated."""

    format: Format | None = None  # else by name, or by content
    encoding: Annotated[str, AfterValidator(_checked_encoding)] | None = None  # else UTF-8, or UTF-16 by its mark
    separator: Annotated[str, AfterValidator(_checked_separator)] | None = None  # between the columns of a table
    header: Annotated[Any, AfterValidator(_checked_header)] = None  # true, false, or names where the file has none
    quoting: Literal["auto", "none", "csv"] | None = None  # none: quotes are characters like any other; else auto
    records: Annotated[str, AfterValidator(_checked_records)] | None = None  # where JSON has its rows, or a whole table


class SourceFile(ReadOptions):
    """One file of a source, or several: a `url` (https, http, file, s3, gs, hf), a local `path`, or a hub's data set.

    A `path` is a file, a glob or a folder. `hf` is OWNER/NAME@REVISION of a data set on the Hugging Face hub, and
    `split` then chooses its files. `member` names a file of an archive or data set, or a sheet of an Excel workbook.
    `sha256` is of the content that is used: of `member` where an archive has several, else of the file itself.
    A URL holds no secret, as DVC writes all params to `dvc.lock`: `${NAME}` in it is taken from the environment.
    """

    url: Url | None = None
    backup_url: Url | None = None
    path: str | None = None
    hf: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")] | None = None
    sha256: Sha256 | None = None
    member: str | None = None
    split: Literal["train", "val", "test", "from_name", "mixed"] | None = None  # of all its rows

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if sum(place is not None for place in (self.url, self.path, self.hf)) != 1:
            raise ValueError("a file needs either url or path, or hf for a data set of the Hugging Face hub")
        if self.backup_url is not None and self.url is None:
            raise ValueError("backup_url goes with url")
        for url in (self.url, self.backup_url):
            if url is not None and SECRET.search(re.sub(r"\$\{\w+\}", "", url)):
                raise ValueError(
                    "a URL seems to hold a password or token, which dvc.lock would keep; "
                    "write ${NAME} for an environment variable, or use ~/.netrc"
                )
        return self


SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("val", "valid", "validation", "dev", "development", "eval"), "val"
)


def split_name(text: str) -> str | None:
    """Return the split that a word names, such as val for `Dev`, or None."""
    return SPLIT_NAMES.get(text.strip().lower())


def _listed_files(value: Any) -> Any:
    """Return the list of files that a mapping `{train: [...], validation: ..., test: ...}` stands for; else the value.

    A file that is text alone is a path, or a URL.
    """
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        return [_as_file(file) for file in value]
    if not isinstance(value, Mapping):
        return value
    files = []
    for key, entries in value.items():
        split = split_name(key) if isinstance(key, str) else None
        if split is None:
            raise ValueError(
                f"expected a list of files, or files for train, validation and test, found the key {key!r}"
            )
        for file in entries if isinstance(entries, list) else [entries]:
            entry = _as_file(file)
            files.append({"split": split} | dict(entry) if isinstance(entry, Mapping) else entry)
    return files


def _as_file(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return {"url": value} if re.match(r"\w+://", value) else {"path": value}


Files = Annotated[list[SourceFile], BeforeValidator(_listed_files), Field(min_length=1)]


class FilesSource(ReadOptions):
    """Files of one kind of data, and how to read them. A file's own options come before these."""

    files: Files
    max_rows: Positive | None = None  # rows or documents that are read, the first of all files
    skip_invalid: bool = False  # leave out rows that cannot be used, and say which; else the first one is an error

    def entry(self, file: SourceFile) -> SourceFile:
        """Return a file with the options of its source where it has none of its own."""
        shared, own = (
            {name: value for name in ReadOptions.model_fields if (value := getattr(options, name)) is not None}
            for options in (self, file)
        )
        return file.model_copy(update=shared | own)


class CorpusSource(FilesSource):
    """Raw text. Each file is a document, unless `document_separator` cuts it into several or it has rows."""

    strip: Literal["gutenberg"] | None = None  # remove Project Gutenberg's header and licence
    document_separator: str | None = None  # text between two documents of one text file
    text: OptionalText = None  # column or key of the text, for files with rows


def _named_numbers(value: Any) -> Any:
    """Return the names of numbers, the first of a list being 0."""
    names = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(names, Mapping) or not names:
        raise ValueError(f"expected names, the first being that of 0, or as in {{1: ham, 2: spam}}, found {value!r}")
    return {str(number): _as_label(name) for number, name in names.items()}


class MessagesSource(FilesSource):
    """Labelled messages: rows with a text and a label.

    Format `tsv` also stands for lines of label TAB text without header or quotes, as in the SMS collection.
    """

    text: Text = "text"
    label: Text = "label"
    labels: Labels  # all of them, in the order of the classifier's outputs; or auto
    label_names: Annotated[dict[str, str], BeforeValidator(_named_numbers)] | None = None  # of numbers in the column
    split: SplitColumn = None  # column that says train, val or test, under these names or such as validation, dev
    slices: list[Text] = []  # further columns, such as language: the report has the accuracy by their values


class InstructionsSource(FilesSource):
    """Instruction pairs: rows with an instruction, an optional input and an output; or conversations.

    Rows with prompt and completion, a conversation or a preference pair are known by their fields where none is stated.
    """

    instruction: Text = "instruction"
    input: OptionalText = "input"
    output: Text = "output"
    messages: OptionalText = None  # column with a conversation, where a row has several
    preferences: Literal["chosen"] | None = None  # train on the preferred answers of pairs with chosen and rejected
    task: OptionalText = None  # column that names the kind of task, for figures per task
    split: SplitColumn = None  # column that says train, val or test, under these names or such as validation, dev


class Source(Strict):
    """A named place that data comes from: a corpus, messages, instructions or several of them."""

    licence: str
    quotable: bool = False  # reports may show its texts, and what a model trained on them writes
    corpus: CorpusSource | None = None
    messages: MessagesSource | None = None
    instructions: InstructionsSource | None = None


class GPT2TokenizerFiles(Strict):
    """Files of GPT-2's byte-pair encoding."""

    encoder: SourceFile
    merges: SourceFile


class DataParams(Strict):
    corpus: str
    messages: str
    instructions: str


class TokenizerParams(Strict):
    kind: Literal["bpe", "gpt2"]
    vocab_size: Annotated[int, Field(ge=260)]
    train_chars: Positive


class CorpusSplit(Strict):
    split: Literal["leak_free", "book"]
    val: Fraction
    test: Fraction
    chunk_chars: Positive


class LabelledSplit(Strict):
    split: Literal["leak_free", "book"]
    val: Fraction
    test: Fraction


class CleanParams(Strict):
    """Rules for the corpus before it is split, in the order in which they are applied."""

    repair: bool
    invisible: bool
    languages: list[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]]
    quality: list[Literal["gopher", "c4"]]
    duplicates: Literal["none", "exact", "near"]
    mask: list[Literal["mail", "phone", "card", "iban"]]


class TokenizeParams(Strict):
    tokenizer: TokenizerParams
    corpus: CorpusSplit
    messages: LabelledSplit
    instructions: LabelledSplit
    clean: CleanParams
    max_too_long: Annotated[float, Field(ge=0, le=1)]
    tokens_per_shard: Positive


# ---- model -----------------------------------------------------------------------------------------------------------


class ModelParams(Strict):
    """The shape of a GPT, all but the vocabulary, which comes with the tokenizer."""

    context_length: Size
    emb_dim: Size
    n_layers: Layers
    n_heads: Size
    n_kv_heads: Size
    head_dim: Size
    ffn_dim: Size
    positions: Literal["learned", "rotary"]
    rope_theta: PositiveFloat
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: PositiveFloat
    activation: Literal["gelu", "swiglu", "geglu", "relu2"]
    qk_norm: bool
    qkv_bias: bool
    bias: bool
    tie_embeddings: bool

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        if self.n_heads * self.head_dim > MAX_SIZE:
            raise ValueError(f"n_heads {self.n_heads} times head_dim {self.head_dim} must not exceed {MAX_SIZE}")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, found {self.head_dim}")
        return self


class RopeScaling(Strict):
    """Scaling of rotary positions beyond the length that a model was first trained on.

    `linear` (Chen et al. 2023) divides all frequencies by `factor`; `llama3` (Llama 3.1) divides the low ones, whose
    wavelength exceeds original_context_length / low_freq_factor, and blends towards the high ones; `yarn` (Peng et al.
    2023) blends between the dimensions that turn beta_slow and beta_fast times within the original context, and
    scales the attention.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: PositiveFloat
    original_context_length: Positive | None = None  # llama3, yarn
    low_freq_factor: PositiveFloat | None = None  # llama3
    high_freq_factor: PositiveFloat | None = None  # llama3
    beta_fast: PositiveFloat | None = None  # yarn
    beta_slow: PositiveFloat | None = None  # yarn
    attention_factor: PositiveFloat | None = None  # yarn: what cos and sin are multiplied with

    @model_validator(mode="after")
    def _belongs_to_kind(self) -> Self:
        needed = {
            "linear": (),
            "llama3": ("original_context_length", "low_freq_factor", "high_freq_factor"),
            "yarn": ("original_context_length", "beta_fast", "beta_slow", "attention_factor"),
        }[self.kind]
        for name in type(self).model_fields:
            if name not in ("kind", "factor") and (getattr(self, name) is None) == (name in needed):
                problem = "is missing" if name in needed else "has no place"
                raise ValueError(f"rope_scaling of kind {self.kind}: {name} {problem}")
        return self


class LayerKind(NamedTuple):
    """The positions that a layer of a `GPT` sees, and their angles."""

    window: int | None  # tokens that a position attends to, itself included; None: all before it
    rope_theta: float | None  # None: no position turns anything
    rope_scaling: RopeScaling | None


LayerNumbers = Annotated[tuple[NonNegative, ...], Field(min_length=1, strict=False)]  # JSON has lists


class GPTConfig(ModelParams):
    """Config of a `GPT`, and the content of a model folder's `config.json`.

    Beside those of `params.yaml` it has options that only open weights use. None leaves an option out.
    """

    vocab_size: Size  # at least the tokenizer's; open weights often have rows to spare
    rope_scaling: RopeScaling | None = None
    sliding_window: Positive | None = None  # tokens that a position attends to, itself included; None: all before it
    full_layers: LayerNumbers | None = None  # layers without the sliding window, the first being 0
    local_rope_theta: PositiveFloat | None = None  # rope_theta of layers with the window, which no scaling stretches
    nope_layers: LayerNumbers | None = None  # layers without rotary positions
    rotary_dim: Positive | None = None  # the first numbers of each head, which rotary positions turn; None: all
    ffn_bias: bool | None = None  # of the feed-forward layers; None: as `bias`
    joint_qk_norm: Literal[True] | None = None  # qk_norm spans all heads together; None: each head alone
    norm_place: Literal["after", "both"] | None = None  # of attention and feed-forward layers; None: before
    unit_offset_norm: Literal[True] | None = None  # norms multiply with 1 + weight
    embedding_scale: PositiveFloat | None = None  # token embeddings are multiplied with
    attention_scale: PositiveFloat | None = None  # scores are multiplied with; None: 1 / sqrt(head_dim)

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        needs = {
            "full_layers": self.sliding_window is not None,
            "local_rope_theta": self.sliding_window is not None and self.positions == "rotary",
            "nope_layers": self.positions == "rotary",
            "rotary_dim": self.positions == "rotary",
            "joint_qk_norm": self.qk_norm,
            "unit_offset_norm": self.norm == "rmsnorm",
        }
        for name, fits in needs.items():
            if getattr(self, name) is not None and not fits:
                raise ValueError(f"{name} has no place without the option that it changes; leave it out")
        for layers in (self.full_layers or (), self.nope_layers or ()):
            if list(layers) != sorted({*layers}) or any(layer >= self.n_layers for layer in layers):
                raise ValueError(f"layers {list(layers)}: expected numbers below {self.n_layers}, in order")
        if self.ffn_bias is not None and self.ffn_bias == self.bias:
            raise ValueError("ffn_bias is that of bias; leave it out")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim >= self.head_dim):
            raise ValueError(f"rotary_dim {self.rotary_dim} must be even and less than head_dim {self.head_dim}")
        return self

    def layer_kind(self, layer: int) -> LayerKind:
        """Return the kind of a layer, the first being 0."""
        local = self.sliding_window is not None and layer not in (self.full_layers or ())
        window = self.sliding_window if local else None
        if layer in (self.nope_layers or ()):
            return LayerKind(window, None, None)
        if local and self.local_rope_theta is not None:
            return LayerKind(window, self.local_rope_theta, None)
        return LayerKind(window, self.rope_theta, self.rope_scaling)


Template = Literal["alpaca", "chatml", "llama3"]  # prompt template of an instruct model
InstructTemplate = Literal["alpaca", "chatml", "llama3", "own"]  # own: the chat template of the open weights


# ---- training --------------------------------------------------------------------------------------------------------


LinearName = Literal["q_proj", "k_proj", "v_proj", "out_proj", "up_proj", "gate_proj", "down_proj", "head"]


class LoRAParams(Strict):
    """Low-rank adapters (Hu et al. 2021): W x + alpha / rank * B A x, with A and B trained and W frozen.

    `targets` are linear layers of every block; `head` is a classifier's, which otherwise trains as it is.
    """

    rank: Positive
    alpha: PositiveFloat
    dropout: Probability
    targets: Annotated[list[LinearName], Field(min_length=1)]


class TrainParams(Strict):
    """Params of `fit`, in all three trainings. A step is an optimizer step."""

    max_steps: NonNegative
    batch_size: Positive
    grad_accum_steps: Positive
    optimizer: Literal["adamw", "muon"]
    lr: PositiveFloat
    muon_lr: PositiveFloat
    muon_momentum: Probability
    muon_iterations: Positive  # of Newton-Schulz
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)]
    warmup_steps: NonNegative
    schedule: Literal["cosine", "linear", "constant", "wsd"]
    decay_steps: Positive  # of wsd
    beta1: Probability
    beta2: Probability
    weight_decay: NonNegativeFloat
    grad_clip: NonNegativeFloat
    precision: Literal["auto", "fp32", "tf32", "bf16"]  # of matrix products; auto: bf16 where it is fast
    dropout: Probability
    trainable: Literal["head", "last_blocks", "lora", "all"]  # head: of a classifier
    last_blocks: NonNegative
    lora: LoRAParams
    eval_interval: Positive
    patience: NonNegative
    keep: Literal["best", "last"]

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.schedule == "wsd" and self.warmup_steps + self.decay_steps > self.max_steps:
            raise ValueError(
                f"schedule wsd: warmup_steps {self.warmup_steps} and decay_steps {self.decay_steps} together exceed "
                f"max_steps {self.max_steps}; make one of them smaller, or max_steps larger"
            )
        return self

    def resolve_precision(self, fast_in_bf16: bool) -> Literal["fp32", "tf32", "bf16"]:
        """Return the precision of matrix products, on a device that is or is not fast in bf16."""
        if self.precision == "auto":
            return "bf16" if fast_in_bf16 else "fp32"
        return self.precision

    @property
    def stable_steps(self) -> int:
        """Return the number of steps before the decay of schedule wsd, with those of the warmup."""
        return self.max_steps - self.decay_steps


SCRATCH = "scratch"


class PretrainParams(TrainParams):
    init: Annotated[str, Field(min_length=1)]  # SCRATCH, or where open weights are
    prompt: str
    sample_tokens: NonNegative
    eval_tokens: Positive


class DecisionParams(Strict):
    """The rule by which val chooses the threshold of one label's probability."""

    rule: Literal["none", "cost", "precision"]
    label: OptionalText  # null: the last one
    false_alarm_cost: PositiveFloat
    miss_cost: PositiveFloat
    precision: Annotated[float, Field(gt=0, le=1)]


class FinetuneParams(TrainParams):
    """Params of a finetuning and of its control, the same training from random weights."""

    scratch_control: bool
    scratch_lr: PositiveFloat
    scratch_muon_lr: PositiveFloat

    def from_scratch(self) -> Self:
        """Return the params of the same training from random weights, with its own rates and all weights trained."""
        return self.model_copy(update={"trainable": "all", "lr": self.scratch_lr, "muon_lr": self.scratch_muon_lr})


class ClassifyParams(FinetuneParams):
    class_weights: Literal["none", "balanced"]
    max_length: Positive
    calibrate: bool
    decision: DecisionParams
    unsure_below: Probability


class InstructParams(FinetuneParams):
    template: InstructTemplate
    mask_prompt: bool
    loss_on: Literal["all", "last"]  # of the answers in a conversation
    packing: bool


class EvaluateParams(Strict):
    test_tokens: Annotated[int, Field(ge=2)]
    ngram_order: Annotated[int, Field(ge=1, le=8)]
    baseline_bytes: Positive
    max_new_tokens: Positive
    batch_size: Positive
    report_samples: NonNegative
    prompts: list[str]
    robustness: NonNegative
    learning_curve: bool
    seeds: Positive
    audit_texts: NonNegative
    audit_bytes: NonNegative


class ReleaseParams(Strict):
    """Requirements of a champion, by its folder's name and the metric's."""

    at_least: dict[str, dict[str, float]]
    at_most: dict[str, dict[str, float]]
    no_worse_by: dict[str, NonNegativeFloat]
    slower_by: NonNegativeFloat
    larger_by: NonNegativeFloat
    leaks: NonNegative
    near_leaks: Annotated[float, Field(ge=0, le=1)]


class RuntimeParams(Strict):
    """Params of speed and comfort, which change no compared result: no stage lists this section in `dvc.yaml`."""

    device: Literal["auto", "cpu", "cuda", "mps"]
    compile: bool
    activation_checkpointing: bool
    workers: NonNegative
    log_interval: Positive
    checkpoint_interval: Positive


class Params(Strict):
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    data: DataParams
    sources: dict[str, Source]
    gpt2_files: GPT2TokenizerFiles
    tokenize: TokenizeParams
    model: ModelParams
    pretrain: PretrainParams
    finetune_classify: ClassifyParams
    finetune_instruct: InstructParams
    evaluate: EvaluateParams
    runtime: RuntimeParams
    release: ReleaseParams

    @model_validator(mode="after")
    def _sources_exist(self) -> Self:
        for kind in KINDS:
            name = getattr(self.data, kind)
            able = sorted(n for n, source in self.sources.items() if getattr(source, kind) is not None)
            if name not in able:
                raise ValueError(f"data.{kind}: no source {name!r} with {kind}; there are: {', '.join(able)}")
        return self


TRAININGS = ("pretrain", "finetune_classify", "finetune_instruct")
RENAMED = {  # keys of earlier versions, and their present names
    **{f"{section}.min_lr": "min_lr_ratio" for section in ("training", *TRAININGS)},
    "tokenize.corpus.section_chars": "chunk_chars",
    "tokenize.shard_tokens": "tokens_per_shard",
    "evaluate.answers": "report_samples",
    "runtime.precision": "training.precision",
}


def parse_params(values: Mapping[str, Any], where: str = "params.yaml") -> Params:
    """Validate a mapping as read from `params.yaml`; raise `InputError` with one line on the first error."""
    for key, name in RENAMED.items():
        if contains(values, key.split(".")):
            raise InputError(f"{where}: {key}: renamed; write {name}")
    shared = values.get("training", {})
    if not isinstance(shared, Mapping):
        raise InputError(f"{where}: training: expected keys with values, found {type(shared).__name__}")
    effective = effective_params(values)
    del effective["training"]
    try:
        return Params.model_validate(effective)
    except ValidationError as error:
        raise InputError(explain(error, where, values)) from None


def effective_params(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `params.yaml` with the section `training` merged into the three trainings, and emptied."""
    shared = values.get("training", {})
    if not isinstance(shared, Mapping):
        return dict(values)
    return {
        key: merged(shared, section) if key in TRAININGS and isinstance(section, Mapping) else section
        for key, section in values.items()
    } | {"training": {}}


def merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shared values, overridden key by key by a section's own."""
    result = dict(shared)
    for key, value in own.items():
        both = isinstance(value, Mapping) and isinstance(shared.get(key), Mapping)
        result[key] = merged(shared[key], value) if both else value
    return result


def contains(values: Any, key: Iterable[str | int]) -> bool:
    try:
        for part in key:
            values = values[part]
    except (LookupError, TypeError):
        return False
    return True


def explain(error: ValidationError, where: str, values: Mapping[str, Any] | None = None) -> str:
    """Return one line for the first error: `params.yaml: pretrain.lr: expected a number, found '1e-3'`.

    `values` are those of `params.yaml`: what a training has from the section `training` is named there.
    """

    def place(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
        shared = ("training", *loc[1:])
        return shared if loc and loc[0] in TRAININGS and not contains(values, loc) and contains(values, shared) else loc

    errors = error.errors()
    first, places = errors[0], list(dict.fromkeys(place(each["loc"]) for each in errors))
    key = ".".join(str(part) for part in places[0])
    message = first["msg"].removeprefix("Value error, ")
    kind, found = first["type"], first["input"]
    if kind == "extra_forbidden":
        message = "unknown key; remove it or correct its name"
    elif kind == "missing":
        section, *inner = first["loc"]
        shareable = section in TRAININGS and bool(inner) and inner[0] in TrainParams.model_fields
        message = "missing key; add it here or to the section training" if shareable else "missing key; add it"
        if inner[-1:] == ["labels"]:
            message = "missing key; list all labels in the order of the outputs, or write labels: auto"
    elif kind != "value_error":
        shown = "something with a password or token" if SECRET.search(str(found)) else repr(found)
        message = f"{message[0].lower()}{message[1:]}, found {shown}"
        if isinstance(found, str) and "number" in message:
            message += " (write 0.001, not 1e-3, which YAML reads as text)"
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    return f"{where}: {key + ': ' if key else ''}{message}{more}"
