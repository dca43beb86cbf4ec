"""The rules that hold the project together: who imports whom, what `dvc.yaml` lists, what README and docs promise."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.serialize import modify_yaml

from llm.config import Params, Strict, parse_params

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_PARTY = ("llm", "stages")

# The packages of `llm` from the ground up: each may import those of the lines above its own, none on its own line.
LAYERS = [
    {"common"},
    {"config"},
    {"download", "tokenizer"},
    {"data"},
    {"preprocess"},
    {"model"},
    {"checkpoint"},
    {"training", "inference"},
    {"convert"},
    {"audit"},
    {"evaluation"},
    {"reporting"},
    {"release"},
    {"api"},
    {"serving", "bench", "devices"},
    {"cli"},
    {"__main__"},
]
COMMANDS = {"pull_request", "release", "sync", "timeline"}  # scripts of `stages` that are no stage
# Modules of stages/tracking: those that a running stage imports (no other one makes a stage stale), and MLflow's,
# with the script that releases.
WRITER = {"clock", "journal", "process", "provenance", "system_metrics"}
MLFLOW = {"alignment", "champion", "delivery", "mlflow_client", "registry", "release"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def package(path: Path) -> str:
    """Return the name of a module's package, or of the module where it lies in `llm` itself."""
    return path.relative_to(ROOT / "llm").parts[0].removesuffix(".py")


@lru_cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(node: ast.AST) -> Iterator[str]:
    """The dotted names that the import statements in `node` may load, `from a import b` as both `a` and `a.b`."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, "relative import"
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)


def at_module_level(path: Path) -> set[str]:
    """Return the dotted names that importing the file imports, without those that a function imports when called."""

    def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
            blocks += [handler.body for handler in getattr(node, "handlers", [])]
            if any(blocks):
                for block in blocks:
                    yield from statements(block)
            else:
                yield node

    return {name for node in statements(tree(path).body) for name in imported(node)}


def top_level(names: Iterable[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def module_file(name: str) -> Path | None:
    path = ROOT / name.replace(".", "/")
    if path.is_dir():
        return path / "__init__.py"
    path = path.with_suffix(".py")
    return path if path.is_file() else None


@lru_cache
def first_party(path: Path) -> frozenset[Path]:
    """Return the project's own files that a file imports, early or late, and the packages that they lie in.

    `llm/__init__.py` offers the whole library to a person, late. No module of ours takes it from there.
    """
    found = at_module_level(path) if path == ROOT / "llm/__init__.py" else set(imported(tree(path)))
    names = {name for name in found if name.split(".")[0] in FIRST_PARTY}
    names |= {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 1)}
    files = {file for name in names if (file := module_file(name)) is not None}
    return frozenset(file for file in files if file != path and has_code(file))


def has_code(path: Path) -> bool:
    """Tell a module from a package's `__init__.py` that holds nothing but its docstring."""
    return path.name != "__init__.py" or len(tree(path).body) > 1 or path == ROOT / "llm/__init__.py"


def transitive(path: Path) -> set[Path]:
    found: set[Path] = set()
    ahead = {path}
    while ahead:
        here = ahead.pop()
        found.add(here)
        ahead |= first_party(here) - found
    return found


def dvc_stages() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def shipped_params() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


# ---- imports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", modules("llm"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_llm_knows_no_stage_tracker_or_orchestrator(path: Path) -> None:
    assert "stages" not in top_level(imported(tree(path)))
    forbidden = {"mlflow", "dvc", "yaml"} - ({"mlflow"} if path.name == "mlflow_model.py" else set())
    assert not top_level(at_module_level(path)) & forbidden


def test_import_llm_is_light() -> None:
    code = (
        "import llm, sys; print([m for m in ('torch', 'numpy', 'pandas', 'mlflow', 'dvc', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_packages_of_llm_import_downwards_only() -> None:
    below: set[str] = {"__init__"}
    for layer in LAYERS:
        for path in modules("llm"):
            if package(path) in layer:
                names = {package(file) for file in first_party(path) if file.is_relative_to(ROOT / "llm")}
                wrong = names - below - {package(path)}
                assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"
        below |= layer
    assert {package(path) for path in modules("llm")} == below


def test_no_module_imports_itself_by_way_of_others() -> None:
    for path in [*modules("llm"), *modules("stages")]:
        above = {file for each in early_imports(path) for file in [each, *reached(each)]}
        assert path not in above, path.relative_to(ROOT)


@lru_cache
def early_imports(path: Path) -> frozenset[Path]:
    names = {name for name in at_module_level(path) if name.split(".")[0] in FIRST_PARTY}
    files = {file for name in names if (file := module_file(name)) is not None}
    return frozenset(file for file in files if file != path and has_code(file))


def reached(path: Path) -> set[Path]:
    found: set[Path] = set()
    ahead = set(early_imports(path))
    while ahead:
        here = ahead.pop()
        found.add(here)
        ahead |= early_imports(here) - found
    return found


def test_stages_never_import_each_other() -> None:
    scripts = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
    for path in modules("stages"):
        files = {
            file.relative_to(ROOT / "stages") for file in first_party(path) if file.is_relative_to(ROOT / "stages")
        }
        assert not {file.stem for file in files if len(file.parts) == 1} & scripts, path.name
        if path.stem not in COMMANDS and "tracking" not in path.parts:
            assert {file.stem for file in files if file.parts[0] == "tracking"} <= WRITER, path.name
        assert path.stem in MLFLOW or "mlflow" not in top_level(imported(tree(path)))


PEERS = {"litgpt", "llms_from_scratch"}  # `bench` measures them where they are; their requirements do not fit ours


def test_dependencies_are_what_is_imported() -> None:
    """Both ways; what is used without an import is named here."""
    distributions = packages_distributions()
    used = {"dvc"}  # the pipeline's command line
    for path in [*modules("llm"), *modules("stages"), *(ROOT / "data").rglob("*.py")]:
        for name in {name.split(".")[0] for name in imported(tree(path))} - set(FIRST_PARTY) - PEERS:
            if name not in sys.stdlib_module_names:
                used |= {normalised(each) for each in distributions[name] if not each.startswith("mlflow-")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [each for name, extra in project["optional-dependencies"].items() if name != "test" for each in extra]
    required, optional = (
        {normalised(re.split(r"[<>=!~\[]", each)[0]) for each in requirements}
        for requirements in (project["dependencies"], extras)
    )
    assert required == used - optional
    for path in [*modules("llm"), *modules("stages")]:  # an extra is imported where it is used, or it were none
        early = {normalised(each) for name in top_level(at_module_level(path)) for each in distributions.get(name, [])}
        assert not early & optional, path.name


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_no_pickled_file_is_read_or_written() -> None:
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    files = {("torch", "load"), ("torch", "save")}
    for path in [*modules("llm"), *modules("stages")]:
        assert not {name.split(".")[0] for name in imported(tree(path))} & unsafe, path.name
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in files, path.name
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False", path.name


def test_no_text_becomes_code() -> None:
    """Inputs are data: no file, parameter or argument is executed, and no shell sees one."""
    builtin = {"eval", "exec", "compile", "__import__"}
    functions = {
        "os.system",
        "os.popen",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
        "importlib.import_module",
    }
    functions |= {f"os.{how}{form}" for how in ("exec", "spawn") for form in ("l", "le", "lp", "v", "ve", "vp", "vpe")}
    functions |= {f"yaml.{kind}" for kind in ("load", "load_all", "full_load", "unsafe_load", "Loader", "UnsafeLoader")}
    functions |= {"pandas.read_pickle", "pd.read_pickle", "torch.hub.load", "jinja2.Template", "jinja2.Environment"}
    for path in [*modules("llm"), *modules("stages"), *(ROOT / "data").rglob("*.py")]:
        assert not set(imported(tree(path))) & (functions | {"runpy", "code"}), path.name
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in builtin | functions, f"{path.name}, line {node.lineno}: {called}"
            if isinstance(node, ast.keyword) and node.arg in ("shell", "trust_remote_code", "weights_only"):
                raise AssertionError(f"{path.name}, line {node.value.lineno}: {node.arg}")


def test_chat_templates_are_rendered_in_one_place() -> None:
    users = {path.name for path in modules("llm") if "jinja2" in top_level(imported(tree(path)))}
    assert users == {"chat_template.py"}


# ---- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [*FIRST_PARTY, "tests"])
def test_docstrings_open_with_a_verb_or_a_noun(package: str) -> None:
    """Paraphrases hide the field's term: "What a model has computed for its prompt" is a prefix cache."""
    for path in modules(package):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                assert not re.match(r"(What|Of|As|Those|The same|How|Whether)\b", first), f"{path.name}: {first}"


def test_functions_fit_on_a_screen() -> None:
    for path in [*modules("llm"), *modules("stages")]:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name} has over 60 lines"


# ---- the pipeline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", dvc_stages())
def test_deps_cover_what_the_stage_imports_and_nothing_else(stage: str) -> None:
    script = ROOT / "stages" / f"{stage.replace('-', '_')}.py"
    assert dvc_stages()[stage]["cmd"] == f"python -m stages.{script.stem}"
    listed = [dep for dep in dvc_stages()[stage]["deps"] if dep.split("/")[0] in FIRST_PARTY]
    used: set[str] = set()
    for path in transitive(script):
        covering = [dep for dep in listed if path == ROOT / dep or path.is_relative_to(ROOT / dep)]
        assert covering, f"{path.relative_to(ROOT)} is imported and lies under none of the deps"
        used |= set(covering)
    assert set(listed) == used, "no module under these deps is imported"


def test_an_edit_makes_no_stage_stale_that_it_cannot_change() -> None:
    def stale(changed: str) -> set[str]:
        covered = lambda dep: f"{changed}/".startswith(f"{dep}/")  # noqa: E731
        return {stage for stage, entry in dvc_stages().items() if any(covered(dep) for dep in entry["deps"])}

    assert not stale("llm/model/cpu_attention.py") & {"download", "tokenize"}
    assert not stale("llm/preprocess/corpus.py") & {"pretrain", "finetune-classify", "finetune-instruct"}
    for unused in ("llm/cli", "llm/bench", "llm/serving", "llm/api.py", "stages/tracking/delivery.py", "README.md"):
        assert not stale(unused), unused


def test_data_deps_come_from_an_earlier_stage_or_the_repository() -> None:
    made: set[str] = set()
    for stage, entry in dvc_stages().items():
        for dep in entry["deps"]:
            if dep.split("/")[0] not in FIRST_PARTY:
                from_stage = any(dep == out or dep.startswith(f"{out}/") for out in made)
                assert from_stage or tracked(dep), f"{stage}: {dep} is neither made by a stage above nor committed"
        for kind in ("outs", "metrics", "plots"):
            made |= {out if isinstance(out, str) else next(iter(out)) for out in entry.get(kind, [])}


def test_runtime_and_release_are_no_dependency() -> None:
    keys = {key.split(".")[0] for entry in dvc_stages().values() for key in entry["params"]}
    assert not {"runtime", "release"} & keys
    assert keys == Params.model_fields.keys() - {"runtime", "release"} | {"training"}, (
        "every other section feeds some stage"
    )


# ---- params.yaml -----------------------------------------------------------------------------------------------------


def test_shipped_params_parse() -> None:
    parse_params(shipped_params())


def test_an_experiment_changes_one_line_of_params(tmp_path: Path) -> None:
    """`-S` has DVC write the whole file anew, in its own style."""
    lines = (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines()
    copy = tmp_path / "params.yaml"
    copy.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with modify_yaml(copy) as values:
        values["pretrain"]["max_steps"] = 7
    changed = [new for old, new in zip(lines, copy.read_text(encoding="utf-8").splitlines(), strict=True) if old != new]
    assert [line.partition("#")[0].rstrip() for line in changed] == ["  max_steps: 7"]


def test_params_have_no_default_in_code() -> None:
    """All but `sources`, whose entries say only what differs from the usual."""

    def check(model: type[Strict]) -> None:
        for name, field in model.model_fields.items():
            assert field.is_required(), f"{model.__name__}.{name} has a default"
            if isinstance(field.annotation, type) and issubclass(field.annotation, Strict):
                check(field.annotation)

    for name, section in typing.get_type_hints(Params).items():
        if isinstance(section, type) and issubclass(section, Strict) and name != "gpt2_files":
            check(section)


# ---- README ----------------------------------------------------------------------------------------------------------


PAGES = README + "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md")))


def commands() -> list[str]:
    """Every shell line in the code blocks of the README and of docs/, continued lines joined, comments left out."""
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```$", PAGES, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def recipes() -> list[str]:
    """Commands that change params, with the options of a file in `recipes/` written out."""
    written_out = [re.sub(r"\$\(cat (\S+)\)", lambda match: (ROOT / match[1]).read_text(), c) for c in commands()]
    return [command for command in written_out if re.search(r" (-S|--set-param) ", command)]


def test_the_readme_shows_recipes() -> None:
    assert len(recipes()) >= 3
    for path in (ROOT / "recipes").iterdir():
        assert f"$(cat recipes/{path.name})" in README, f"README.md does not show recipes/{path.name}"


@pytest.mark.parametrize("command", sorted(set(recipes())))
def test_recipes_fit_params_yaml(command: str) -> None:
    """Each `-S key=value` names a key that exists, and the whole parses; a queue's `value,value` value by value."""
    params = with_yaml_blocks(README)  # the README's example of one's own source is one of its recipes
    words = shlex.split(command, comments=True)
    for override in [words[i + 1] for i, word in enumerate(words) if word in ("-S", "--set-param")]:
        key, _, text = override.partition("=")
        section, last = locate(params, key.removeprefix("+"))
        assert (last in section) != key.startswith("+"), f"{key}: `+` adds a key of the section training, and no other"
        for value in text.split(",") if "--queue" in words else [text]:
            section[last] = yaml.safe_load(value)
            parse_params(params)


def test_the_example_of_own_data_fits_params_yaml() -> None:
    params = with_yaml_blocks((ROOT / "data/own/README.md").read_text(encoding="utf-8"))
    assert params["data"] != shipped_params()["data"]
    parse_params(params)


def with_yaml_blocks(text: str) -> dict[str, Any]:
    """The shipped params with the sections `data` and `sources` of a page's examples."""
    params = shipped_params()
    for block in re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        values = yaml.safe_load(block)
        for section in ("data", "sources"):
            params[section] |= values.get(section, {})
    return params


@pytest.mark.parametrize("name", ["pipeline", "test", "book"])
def test_commands_that_ci_runs_are_single_lines(name: str) -> None:
    block = re.search(rf"^<!-- command: {name} -->\n+```sh\n(.*?)^```$", PAGES, re.MULTILINE | re.DOTALL)
    assert block, f"neither README.md nor docs/ has a command marked {name}"
    assert len(block[1].splitlines()) == 1


@pytest.mark.parametrize(("name", "most"), [("README.md", 180), ("dvc.yaml", 110)])
def test_what_is_read_first_is_short(name: str, most: int) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= most


def test_the_picture_of_the_pipeline_is_current() -> None:
    drawn = runpy.run_path(str(ROOT / "docs/draw_pipeline.py"))["draw"](dvc_stages())
    assert drawn == (ROOT / "docs/pipeline.svg").read_text(encoding="utf-8"), "run python docs/draw_pipeline.py"


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), ROOT / "data/own/README.md"]:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if not re.match(r"[a-z]+:", path):
                file = page.parent / path if path else page
                assert file.exists(), f"{page.relative_to(ROOT)}: {target}"
                assert not anchor or anchor in anchors(file), f"{page.relative_to(ROOT)}: {target}"


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and the site give to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_map_names_what_exists_and_every_folder() -> None:
    """A folder with a line of its own and no lines below it stands for its files."""
    entries = mapped()
    folders = {e for e in entries if e.endswith("/") and not any(o != e and o.startswith(e) for o in entries)}
    for entry in entries:
        assert tracked(entry), f"the map names {entry}, which is not in the repository"
    for path in ls_files():
        if path.count("/") > 1:  # the modules of llm/ and stages/ stand on the lines of these two
            assert any(path.startswith(folder) for folder in folders) or path.startswith(".dvc/"), (
                f"the map misses {path}"
            )


def test_the_map_names_every_module_of_a_package() -> None:
    for path in [*modules("llm"), *modules("stages")]:
        folder = "/".join(path.relative_to(ROOT).parts[:-1][:2]) + "/"  # a package, with its folders
        entry = folder if folder != "llm/" else f"llm/{path.name}"
        if "families" in path.parts:  # a module a family, by its name
            continue
        if not path.stem.startswith("__"):
            assert entry in mapped(), f"the map misses {entry}"
        if folder in mapped() and folder != "llm/" and not path.stem.startswith("__"):
            assert re.search(rf"\b{path.stem}\b", mapped()[folder]), f"the line of {folder} misses {path.stem}"


def mapped() -> dict[str, str]:
    """Return the paths of the README's map, each under the folder of its indent, with the rest of its line."""
    block = re.search(r"^## Map of files\n.*?^```text\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert block
    paths: dict[str, str] = {}
    above: list[tuple[int, str]] = []  # indent and path of the folders that the line may stand in
    for indent, names, text in re.findall(r"^( *)(\S+(?:, \S+)*)  +(.*)", block[1], re.MULTILINE):
        above = [folder for folder in above if folder[0] < len(indent)]
        for path in [(above[-1][1] if above else "") + name for name in names.split(", ")]:
            paths[path] = text
            if path.endswith("/"):
                above.append((len(indent), path))
    return paths


@lru_cache
def ls_files() -> tuple[str, ...]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(path for path in done.stdout.splitlines() if (ROOT / path).is_file())


def tracked(path: str) -> bool:
    return any(file == path or file.startswith(path.rstrip("/") + "/") for file in ls_files())


def locate(params: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The section that holds a dotted key, and the key's last part."""
    *sections, last = key.split(".")
    for name in sections:
        params = params[name]
    return params, last
