"""Files that mean harm: each is refused by name, and nothing in it is executed. The limits of archives: `test_fetch`.

What harm would do is touch a marker file, by the means that each format has; the first test shows that the means work.
"""

from __future__ import annotations

import base64
import doctest
import json
import logging
import os
import pickle
import stat
import unittest.mock
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote_plus

import gguf
import jinja2
import joblib
import numpy as np
import pytest
import torch
import yaml

import llm.convert.gguf
import stages.sync
from llm.checkpoint.adapter import read_adapter
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, load_checkpoint, save_checkpoint
from llm.common import markdown
from llm.common import sanitize as display
from llm.common.errors import InputError
from llm.common.files import write_atomic
from llm.common.markdown import escape
from llm.common.sanitize import CONTROLS, one_line, visible
from llm.config import CorpusSource, SourceFile
from llm.convert.gguf import export_gguf
from llm.convert.hf import export_hf
from llm.convert.load import import_model
from llm.data.shards import TokenShards
from llm.download.fetching.fetch import fetch
from llm.download.records.readers import write_records
from llm.model.gpt import GPT
from llm.tokenizer.bpe import GPT2_PATTERN, Tokenizer
from llm.tokenizer.chat_template import render, render_untrusted
from llm.training.state import load_state, save_state
from stages.download import download
from stages.runtime import run as stage_run
from stages.runtime.inputs import read_yaml
from tests.conftest import ROOT
from tests.download.test_fetch import DATA, Server, serving
from tests.forks import run_forked
from tests.helpers import LLAMA_FORM, gpt_config, randomize, tiny_tokenizer


class Payload:
    """Unpickled, it touches the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


class Models(NamedTuple):
    ours: Path  # a model folder
    theirs: Path  # a folder of transformers


@pytest.fixture(scope="module")
def content() -> Checkpoint:
    config = gpt_config(**LLAMA_FORM, vocab_size=280)
    trained = tiny_tokenizer()
    tokenizer = Tokenizer(trained.ranks, GPT2_PATTERN, trained.special_tokens)  # a pattern that other tools know
    model = randomize(GPT(config))
    assert isinstance(model, GPT)
    return Checkpoint(model, tokenizer, CheckpointConfig(kind="base", gpt=config))


@pytest.fixture
def models(content: Checkpoint, tmp_path: Path) -> Models:
    save_checkpoint(tmp_path / "ours", content)
    export_hf(content, tmp_path / "theirs")
    return Models(tmp_path / "ours", tmp_path / "theirs")


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def test_the_payloads_are_live(tmp_path: Path) -> None:
    def touched(action: Callable[[], object]) -> bool:
        marker.unlink(missing_ok=True)
        action()
        return marker.exists()

    marker, file = tmp_path / "executed", tmp_path / "file"
    assert touched(lambda: pickle.loads(pickle.dumps(Payload(marker))))
    torch.save(Payload(marker), file)
    assert touched(lambda: torch.load(file, weights_only=False))
    assert touched(lambda: joblib.load(joblib.dump(Payload(marker), file)[0]))
    np.save(tmp_path / "a.npy", np.array([Payload(marker)]), allow_pickle=True)
    assert touched(lambda: np.load(tmp_path / "a.npy", allow_pickle=True))
    assert touched(lambda: yaml.unsafe_load(python_tag(marker)))
    assert touched(lambda: jinja2.Environment().from_string(jinja_escapes(marker)[0]).render())
    assert touched(lambda: exec(custom_code(marker)))


def custom_code(marker: Path) -> str:
    return f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"


def python_tag(marker: Path) -> str:
    return f"seed: !!python/object/apply:shutil.copyfile [{str(ROOT / 'LICENSE')!r}, {str(marker)!r}]\n"


def jinja_escapes(marker: Path) -> list[str]:
    touch = f"('touch {marker}').read()"
    return [
        f"{{{{ cycler.__init__.__globals__.os.popen{touch} }}}}",
        f"{{{{ lipsum.__globals__['os'].popen{touch} }}}}",
        f"{{{{ (lipsum|attr('__globals__')|attr('get')('os')|attr('popen')('touch {marker}')).read() }}}}",
        f"{{% for c in ().__class__.__base__.__subclasses__() %}}{{{{ c.__init__.__globals__['os'].popen{touch} }}}}"
        "{% endfor %}",
        f"{{{{ raise_exception.__globals__.sys.modules.os.popen{touch} }}}}",
    ]


# ---- each is refused by name -----------------------------------------------------------------------------------------

Case = Callable[[Path, Models, Path], tuple[Callable[[], object], Path, str]]


def as_weights(name: str, reason: str, write: Callable[[Path, Payload], object]) -> Case:
    """A file given to `python -m llm import` and to `pretrain.init`."""

    def case(folder: Path, models: Models, marker: Path) -> tuple[Callable[[], object], Path, str]:
        write(folder / name, Payload(marker))
        return lambda: import_model(str(folder / name)), folder / name, reason

    return case


def as_data(name: str, reason: str, write: Callable[[Path, Payload], object], member: str | None = None) -> Case:
    """A file that a source in params.yaml lists."""

    def case(folder: Path, models: Models, marker: Path) -> tuple[Callable[[], object], Path, str]:
        write(folder / name, Payload(marker))
        section = CorpusSource(files=[SourceFile(path=str(folder / name), member=member)])

        def read() -> None:
            write_records(section, fetch(section.files[0], folder / "downloads"), folder / "corpus.jsonl")

        return read, folder / name, reason

    return case


def inside(which: str, name: str, reason: str, write: Callable[[Path, Payload], object], without: str = "") -> Case:
    """A file in a sound model folder, in place of one of its own or beside it."""

    def case(folder: Path, models: Models, marker: Path) -> tuple[Callable[[], object], Path, str]:
        path = getattr(models, which)
        write(path / name, Payload(marker))
        if without:
            (path / without).unlink()
        load = {"ours": lambda: load_checkpoint(path), "theirs": lambda: import_model(str(path))}[which]
        return load, path / name, reason

    return case


def mlflow_model(flavor: dict[str, Any]) -> Case:
    """A model folder of MLflow that asks for its pickle or its code to be loaded."""

    def case(folder: Path, models: Models, marker: Path) -> tuple[Callable[[], object], Path, str]:
        path = folder / "mlflow"
        (path / "code").mkdir(parents=True)
        (path / "MLmodel").write_text(yaml.safe_dump({"flavors": {"python_function": flavor}}))
        (path / "python_model.pkl").write_bytes(pickle.dumps(Payload(marker)))
        (path / "code" / "evil.py").write_text(custom_code(marker))
        return lambda: import_model(str(path)), path / "config.json", "missing; give a folder with config.json"

    return case


def params_file(folder: Path, models: Models, marker: Path) -> tuple[Callable[[], object], Path, str]:
    path = folder / "params.yaml"
    path.write_text(python_tag(marker))
    return lambda: read_yaml(path), path, "line 1, column 7: could not determine a constructor for the tag"


def adapter(folder: Path, models: Models, marker: Path) -> tuple[Callable[[], object], Path, str]:
    path = folder / "adapter"
    path.mkdir()
    lora = {"rank": 1, "alpha": 1.0, "dropout": 0.0, "targets": ["q_proj"]}
    model = json.loads((models.ours / "config.json").read_text())
    (path / "adapter.json").write_text(json.dumps({"lora": lora, "base": "0" * 64, "model": model}))
    torch.save(Payload(marker), path / "adapter.safetensors")
    return lambda: read_adapter(path), path / "adapter.safetensors", "cannot be read as safetensors"


def pickled(path: Path, payload: Payload) -> None:
    path.write_bytes(pickle.dumps(payload))


def torch_zip(path: Path, payload: Payload) -> None:
    torch.save(payload, path)


def torch_old(path: Path, payload: Payload) -> None:
    torch.save({"state_dict": payload}, path, _use_new_zipfile_serialization=False)


def numpy_objects(path: Path, payload: Payload) -> None:
    np.save(path, np.array([payload]), allow_pickle=True)


def joblib_file(path: Path, payload: Payload) -> None:
    joblib.dump(payload, path)


def zipped_pickle(path: Path, payload: Payload) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(payload))


def changed_json(**changes: Any) -> Callable[[Path, Payload], None]:
    def write(path: Path, payload: Payload) -> None:
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(values | changes))
        for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py"):
            (path.parent / name).write_text(custom_code(payload.marker))

    return write


UNPICKLING = "pickled files are not read: unpickling executes code"
NO_SOURCE = "no folder and no .gguf file"
CASES: dict[str, Case] = {
    "a .pt of torch": as_weights("model.pt", UNPICKLING, torch_zip),
    "a .pth in torch's old form": as_weights("model.pth", UNPICKLING, torch_old),
    "a .pkl": as_weights("model.pkl", UNPICKLING, pickled),
    "a .ckpt": as_weights("last.ckpt", UNPICKLING, torch_zip),
    "a .bin": as_weights("pytorch_model.bin", UNPICKLING, torch_zip),
    "a .npy of objects": as_weights("weights.npy", NO_SOURCE, numpy_objects),
    "a joblib": as_weights("model.joblib", NO_SOURCE, joblib_file),
    "a zip with a pickle": as_weights("model.zip", NO_SOURCE, zipped_pickle),
    "a GGUF that is a pickle": as_weights("model.gguf", "does not begin with GGUF", pickled),
    "transformers' folder with a .bin": inside(
        "theirs", "", "pytorch_model.bin is not read: unpickling executes code",
        lambda path, payload: torch_zip(path / "pytorch_model.bin", payload), without="model.safetensors",
    ),
    "transformers' folder with a pickle called safetensors": inside(
        "theirs", "model.safetensors", "cannot be read as safetensors", torch_zip
    ),
    "transformers' folder with an index that leads out of it": inside(
        "theirs", "model.safetensors.index.json", "must name a file of this folder",
        changed_json(weight_map={"lm_head.weight": "../executed.bin"}), without="model.safetensors",
    ),
    "transformers' config of custom code": inside(
        "theirs", "config.json", "model_type 'evil' is not known",
        changed_json(model_type="evil", auto_map={"AutoConfig": "configuration_evil.Evil"}),
    ),
    "a pickle called tokenizer.json": inside("theirs", "tokenizer.json", "not valid JSON", pickled),
    "our folder with a pickle called safetensors": inside(
        "ours", "model.safetensors", "cannot be read as safetensors", pickled
    ),
    "our folder with a pickle called bpe.json": inside("ours", "bpe.json", "not valid JSON", pickled),
    "our config that names a class": inside(
        "ours", "config.json", "_target_: unknown key", changed_json(_target_="os.system", _args_=["touch executed"])
    ),
    "an adapter that is a pickle": adapter,
    "an MLflow model that is a pickle": mlflow_model(
        {"loader_module": "mlflow.pyfunc.model", "python_model": "python_model.pkl"}
    ),
    "an MLflow model that names a loader of its own": mlflow_model({"loader_module": "evil", "code": "code"}),
    "a .pkl as data": as_data("data.pkl", "found .pkl; convert or rename it", pickled),
    "a .npy as data": as_data("data.npy", "found .npy; convert or rename it", numpy_objects),
    "a joblib as data": as_data("data.joblib", "found .joblib; convert or rename it", joblib_file),
    "a pickle in a zip as data": as_data("data.zip", "found .pkl; convert or rename it", zipped_pickle, "data.pkl"),
    "a pickle called text": as_data("data.txt", "expected UTF-8", pickled),
    "a pickle called parquet": as_data("data.parquet", "expected a parquet file", pickled),
    "a .dvc file as data": as_data(
        "data.pkl.dvc", "found .dvc; convert or rename it",
        lambda path, payload: path.write_text("outs: [{path: ../../executed, md5: 0}]\n"),
    ),
    "params.yaml with a tag of Python": params_file,
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_by_name_and_not_executed(
    name: str, tmp_path: Path, models: Models, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    read, path, reason = CASES[name](tmp_path, models, marker)
    with pytest.raises(InputError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path).rstrip("/")) and reason in message
    assert not marker.exists()


def test_mlflow_unpickles_nothing_where_we_run_it(
    tmp_path: Path, models: Models, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    CASES["an MLflow model that is a pickle"](tmp_path, models, marker)
    monkeypatch.setattr(stages.sync, "deliver_all", lambda: mlflow.pyfunc.load_model(str(tmp_path / "mlflow")))
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    with pytest.raises(mlflow.MlflowException, match="pickle is disallowed"):
        stages.sync.main([])


def test_a_training_state_that_is_a_pickle_is_passed_over(tmp_path: Path, marker: Path) -> None:
    for step in (1, 2):
        save_state(tmp_path / "state", step, {"w": torch.ones(1)}, {"step": step})
    torch.save(Payload(marker), tmp_path / "state" / "step-00000002" / "state.safetensors")
    with unittest.mock.patch.object(logging.getLogger("llm"), "warning") as warning:
        state = load_state(tmp_path / "state")
    assert state is not None and state[1] == {"step": 1}
    [message] = [call.args[0] % call.args[1:] for call in warning.call_args_list]
    assert "step-00000002: damaged training state" in message


def test_token_shards_are_numbers_whatever_they_say(tmp_path: Path, marker: Path) -> None:
    np.save(tmp_path / "train.npy", np.array([Payload(marker)]), allow_pickle=True)
    n_tokens = (tmp_path / "train.npy").stat().st_size // 2
    split = {"tokens": n_tokens, "bytes": 1, "shards": ["train.npy"]}
    for dtype in ("object", "O"):
        (tmp_path / "meta.json").write_text(json.dumps({"dtype": dtype, "splits": {"train": split}}))
        with pytest.raises(InputError, match="no readable token shards"):
            TokenShards(tmp_path, "train")


# ---- what is taken without what it brings ----------------------------------------------------------------------------


def test_code_and_pickles_beside_the_weights_are_left_alone(models: Models, marker: Path) -> None:
    evil = changed_json(auto_map={"AutoModel": "modeling_evil.Evil", "AutoTokenizer": ["tokenization_evil.Evil", None]})
    for name in ("config.json", "tokenizer_config.json"):
        evil(models.theirs / name, Payload(marker))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch_zip(models.theirs / name, Payload(marker))
    assert import_model(str(models.theirs)).config.kind == "base"


@pytest.mark.parametrize("number", range(5))
def test_a_chat_template_cannot_leave_its_sandbox(number: int, models: Models, marker: Path) -> None:
    source = jinja_escapes(marker)[number]
    with pytest.raises(Exception, match=r"unsafe|undefined|has no attribute"):
        render(source, "Hello?", {})
    (models.theirs / "chat_template.jinja").write_text(source)
    assert import_model(str(models.theirs)).config.template is None


def test_a_chat_template_in_a_gguf_file_neither(
    content: Checkpoint, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = llm.convert.gguf.gguf_tokenizer_fields
    source = jinja_escapes(marker)[0]
    monkeypatch.setattr(
        llm.convert.gguf, "gguf_tokenizer_fields", lambda *args: fields(*args) | {"tokenizer.chat_template": source}
    )
    export_gguf(content, tmp_path / "model.gguf", "f32")
    stored = gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.chat_template"].contents()
    assert stored == source
    assert import_model(str(tmp_path / "model.gguf")).config.template is None


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10**(10**10) }}",
        "{{ 'a' * 10**12 }}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{{ 'a' * 2000000 }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
    ids=["loops", "a large number", "memory", "doubling", "a long prompt", "depth"],
)
def test_a_chat_template_that_takes_too_much_ends_with_nothing(source: str) -> None:
    assert render_untrusted(source, "Hello?", {}) is None


def test_a_chat_template_is_asked_in_a_process_of_its_own() -> None:
    source = "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}"
    assert render_untrusted(source, "日本?\n", {"bos_token": "<s>"}) == "<s><user> 日本?\n"


# ---- secrets ---------------------------------------------------------------------------------------------------------

SECRETS = {"TEST_USER": "someone-known", "TEST_PASS": "word/of:mouth@x", "TEST_TOKEN": "hidden+value"}


class Downloads(NamedTuple):
    """Two runs of the download stage, the second of which failed."""

    project: Path
    asked: str
    authorization: str | None
    printed: str


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Downloads:
    project = empty_project(tmp_path_factory.mktemp("project"))
    with serving(Server()) as server:
        server.files["/a.txt"] = DATA
        place = server.url.removeprefix("http://")
        url = f"http://${{TEST_USER}}:${{TEST_PASS}}@{place}/a.txt?token=${{TEST_TOKEN}}"
        status, printed = run_download(project, url)
        assert status == 0, printed
        asked, authorization = server.asked[-1][0], server.authorization[-1]
        status, failed = run_download(project, url.replace("a.txt", "b.txt"))
        assert status == 1 and "HTTP status 404" in failed
    return Downloads(project, asked, authorization, printed + failed)


def empty_project(folder: Path) -> Path:
    """Link the inputs of the download stage into a folder."""
    for name in ("llm", "stages", "data/sample", "data/own", "dvc.yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(ROOT / name)
    return folder


def run_download(project: Path, url: str) -> tuple[int, str]:
    """The status and all output of the stage, with a corpus from this URL and the secrets in the environment."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["sources"]["mine"] = {"licence": "private", "corpus": {"files": [{"url": url}]}}
    params["data"]["corpus"] = "mine"
    (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    proxies = ("http_proxy", "all_proxy")

    def run() -> None:
        os.chdir(project)
        os.umask(0o027)
        for name in [name for name in os.environ if name.lower() in proxies]:
            del os.environ[name]
        stage_run.main("download", download)

    done = run_forked(run, **SECRETS, LLM_TRACKING="off")
    return done.returncode, done.stdout + done.stderr


def written(project: Path) -> list[Path]:
    """Files and folders that the stage made: all but what it was given, which is linked, and params.yaml."""
    found = []
    for folder, folders, files in os.walk(project):
        paths = [Path(folder, name) for name in (*folders, *files)]
        found += [path for path in paths if not path.is_symlink()]
    return [path for path in found if path not in (project / "params.yaml", project / "data")]


def test_secrets_of_a_url_are_in_nothing_that_is_written(downloads: Downloads) -> None:
    """The journal is all that MLflow ever gets, and dvc.lock repeats params.yaml, where only names stand."""
    basic = base64.b64encode(f"{SECRETS['TEST_USER']}:{SECRETS['TEST_PASS']}".encode()).decode()
    assert downloads.asked == "/a.txt?token=hidden%2Bvalue"
    assert downloads.authorization == f"Basic {basic}"
    files = [path for path in written(downloads.project) if path.is_file()]
    assert {path.name for path in files} >= {"events.jsonl", "sources.json", "corpus.jsonl"}
    everything = downloads.printed + "".join(path.read_bytes().decode(errors="replace") for path in files)
    for secret in (*SECRETS.values(), *map(quote_plus, SECRETS.values()), basic):
        assert secret not in everything


def test_a_secret_in_params_yaml_is_refused_before_dvc_writes_it_to_its_lock(tmp_path: Path) -> None:
    project = empty_project(tmp_path)
    status, printed = run_download(project, "https://me:hidden@host.invalid/a.txt")
    assert status == 1 and "hidden" not in printed
    assert printed.startswith("download: params.yaml: sources.mine.corpus.files.0: a URL seems to hold a password")
    assert "${NAME}" in printed and printed.count("\n") == 1
    assert [path.name for path in written(project)] == []


# ---- modes of files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o027, 0o640, 0o750), (0o002, 0o664, 0o775)])
def test_model_folders_and_exports_have_the_modes_that_the_umask_says(
    content: Checkpoint, tmp_path: Path, umask: int, file: int, folder: int
) -> None:
    before = os.umask(umask)
    try:
        out = tmp_path / "out"
        out.mkdir()
        save_checkpoint(out / "ours", content, {"adapter/adapter.json": b"{}"})
        export_hf(content, out / "theirs")
        export_gguf(content, out / "model.gguf", "f32")
        save_state(out / "state", 1, {"w": torch.ones(1)}, {})
        content.tokenizer.save(out / "tokenizer")
        write_atomic(out / "reports" / "report.md", "text")
    finally:
        os.umask(before)
    modes = {path.relative_to(out).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*")}
    assert len(modes) > 15
    assert modes == {name: folder if (out / name).is_dir() else file for name in modes}


def test_what_a_stage_writes_has_the_modes_that_the_umask_says(downloads: Downloads) -> None:
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in written(downloads.project)}
    assert {path.name for path in modes} >= {"corpus.jsonl", "events.jsonl", "sources.json", "downloads", "raw"}
    assert modes == {path: 0o750 if path.is_dir() else 0o640 for path in modes}


# ---- text that is shown ----------------------------------------------------------------------------------------------

EVIL = "a\x1b[2J\x9b31m\x07\r\u202eb\nc"


def test_examples() -> None:
    assert doctest.testmod(display) == (0, 2)
    assert doctest.testmod(markdown) == (0, 1)


def test_no_control_character_reaches_a_terminal() -> None:
    assert visible(EVIL) == "a\ufffd[2J\ufffd31m\ufffd\ufffd\ufffdb\nc"
    assert visible("tabs\tand lines\nstay, and é 日本 \U0001f600 too") == (
        "tabs\tand lines\nstay, and é 日本 \U0001f600 too"
    )
    assert one_line(EVIL) == r"a\x1b[2J\x9b31m\x07\r\u202eb\nc"
    assert str(InputError(f"{EVIL}: wrong")) == rf"{one_line(EVIL)}: wrong"


def test_a_message_that_quotes_a_file_is_one_plain_line(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in (EVIL, "b.txt"):
            archive.writestr(name, "text")
    with pytest.raises(InputError, match="found 2") as caught:
        fetch(SourceFile(path=str(tmp_path / "a.zip")), tmp_path / "downloads")
    assert one_line(EVIL) in str(caught.value)
    assert not CONTROLS.search(str(caught.value)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<script>alert(1)</script>", r"\<script\>alert\(1\)\</script\>"),
        ("![x](javascript:y)", r"\!\[x\]\(javascript\:y\)"),
        ("a | b `c` **d** _e_ ~f~", r"a \| b \`c\` \*\*d\*\* \_e\_ \~f\~"),
        ("http://x.y www.x.y me@x.y &lt;", r"http\://x.y www\.x.y me\@x.y \&lt;"),
        ("# one\n- two\\", r"\# one \- two\\"),
        ("leak_free, CC BY 4.0", "leak_free, CC BY 4.0"),
    ],
)
def test_markup_is_escaped(text: str, expected: str) -> None:
    assert escape(text) == expected
