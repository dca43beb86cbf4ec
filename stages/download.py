"""Fetch and check the three data sets that `params.yaml` names, and write them in one form to `data/raw/`."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from llm.common.files import replaced_folder, write_atomic
from llm.config import KINDS, Params, Source, SourceFile
from llm.download.content.archives import DataFile
from llm.download.fetching.fetch import downloads_folder, fetch, mirror_folder
from llm.download.records.readers import write_records
from stages.runtime.run import Run, main
from stages.tracking.process import repository

RAW, OWN = Path("data/raw"), Path("data/own")


def download(run: Run) -> None:
    tell_what_is_private(run.params)
    with replaced_folder(RAW) as draft:
        provenance = {kind: write_kind(run, kind, draft) for kind in KINDS}
        if run.params.tokenize.tokenizer.kind == "gpt2":
            provenance["gpt2"] = copy_gpt2_files(run.params, draft / "gpt2")
        write_json(draft / "sources.json", provenance)


def write_kind(run: Run, kind: str, folder: Path) -> dict[str, Any]:
    name = getattr(run.params.data, kind)
    source = run.params.sources[name]
    section = getattr(source, kind)
    files = [found for file in section.files for found in fetched(section.entry(file))]
    written = write_records(section, files, folder / f"{kind}.jsonl")
    if kind == "messages":
        write_json(folder / "labels.json", written.labels)
    run.dataset(name, written.md5, source=str(files[0]), context=kind)
    entries = [
        {"file": str(file), "sha256": file.sha256, "bytes": file.size, "records": count}
        for file, count in zip(files, written.counts, strict=True)
    ]
    size = sum(file.size for file in files)
    counts = f"{len(files)} {'file' if len(files) == 1 else 'files'}, {size:,} bytes, {sum(written.counts):,} records"
    logging.getLogger("llm").info("download: %s of %s: %s", kind, name, counts)
    left_out = {"left_out": written.left_out.summary()} if written.left_out.counts else {}
    return {"source": name, "licence": source.licence, "quotable": source.quotable, "files": entries} | left_out


def fetched(file: SourceFile) -> list[DataFile]:
    """Fetch a file into the user's repository, where DVC's temporary copies for experiments find it too."""
    return fetch(file, downloads_folder(repository()), mirror_folder(repository()))


def tell_what_is_private(params: Params) -> None:
    """Log which of the chosen sources are private, and where DVC puts their texts."""
    chosen = {kind: getattr(params.data, kind) for kind in KINDS}
    private = [name for kind, name in chosen.items() if is_private(params.sources[name], kind)]
    if private:
        logging.getLogger("llm").warning(
            "download: %s: private data. DVC's cache keeps copies; `dvc push` and `dvc exp push` upload them, "
            "and models trained on them, to a DVC remote. data/own/README.md says what goes where",
            ", ".join(dict.fromkeys(private)),
        )


def is_private(source: Source, kind: str) -> bool:
    """Return whether the source is not quotable or its data of this kind lies in the folder for own files."""
    paths = [os.path.normpath(Path(file.path).absolute()) for file in getattr(source, kind).files if file.path]
    return not source.quotable or any(OWN.absolute() in Path(path).parents for path in paths)


def copy_gpt2_files(params: Params, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    entries = []
    for name, declared in (("encoder.json", params.gpt2_files.encoder), ("vocab.bpe", params.gpt2_files.merges)):
        (file,) = fetched(declared)
        (folder / name).write_bytes(b"".join(file.blocks()))
        entries.append({"file": str(file), "sha256": file.sha256, "bytes": file.size})
    return {"files": entries}


def write_json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main("download", download)
