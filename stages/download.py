"""Fetches and checks the three data sets that `params.yaml` names, and writes them in one form to `data/raw/`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from llm.config import Params
from llm.download.fetch import fetch
from llm.download.readers import write_records
from stages.runtime.run import Run, main
from stages.tracking.journal import repository

RAW = Path("data/raw")


def download(run: Run) -> None:
    draft = RAW.with_name("raw.tmp")  # renamed at the end, so that data/raw is whole or absent
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        provenance = {kind: write_kind(run, kind, draft) for kind in ("corpus", "messages", "instructions")}
        messages = run.params.sources[run.params.data.messages].messages
        assert messages is not None  # Params has checked it
        write_json(draft / "labels.json", messages.labels)
        if run.params.tokenize.tokenizer.kind == "gpt2":
            provenance["gpt2"] = copy_gpt2_files(run.params, draft / "gpt2")
        write_json(draft / "sources.json", provenance)
        shutil.rmtree(RAW, ignore_errors=True)
        draft.replace(RAW)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_kind(run: Run, kind: str, folder: Path) -> dict[str, Any]:
    name = getattr(run.params.data, kind)
    source = run.params.sources[name]
    section = getattr(source, kind)
    files = [found for file in section.files for found in fetch(file, downloads(), mirror())]
    written = write_records(section, files, folder / f"{kind}.jsonl")
    run.dataset(name, written.md5, source=str(files[0]), context=kind)
    entries = [
        {"file": str(file), "sha256": file.sha256, "bytes": file.size, "records": count}
        for file, count in zip(files, written.counts, strict=True)
    ]
    return {"source": name, "licence": source.licence, "files": entries}


def copy_gpt2_files(params: Params, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    entries = []
    for name, declared in (("encoder.json", params.gpt2_files.encoder), ("vocab.bpe", params.gpt2_files.merges)):
        (file,) = fetch(declared, downloads(), mirror())
        (folder / name).write_bytes(b"".join(file.blocks()))
        entries.append({"file": str(file), "sha256": file.sha256, "bytes": file.size})
    return {"files": entries}


def downloads() -> Path:
    """Kept between runs, and shared with DVC's temporary copies for experiments."""
    return repository() / ".work" / "downloads"


def mirror() -> Path | None:
    folder = os.environ.get("LLM_DATA_MIRROR")
    return repository() / Path(folder).expanduser() if folder else None


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main("download", download)
