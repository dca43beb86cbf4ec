"""One model in several precisions: size on disk, memory, decoding speed on one thread, and bits per byte of a text."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from llm.bench.harness import machine, memory, versions
from llm.common.errors import InputError
from llm.common.markdown import table
from llm.convert.cache import model_folder

PROMPT, NEW = 32, 128  # tokens of the text that are read, and that are then written
GGUF = {f"llama.cpp, {kind.upper()}": kind for kind in ("f32", "f16", "q8_0", "q4_1", "q4_0")}
OURS: dict[str, dict[str, Any]] = {
    "this project, fp32": {},
    "this project, int8": {"int8": True},
    "this project, int4": {"int4": True},
}


def compare_precisions(model_dir: Path, text: str, new: int = NEW) -> dict[str, Any]:
    """Measure a model folder in every form, each in a process of its own."""
    model_dir = model_folder(model_dir)  # of another tool's model, its import
    results = {name: apart(measure_ours, model_dir, rounding, text, new) for name, rounding in OURS.items()}
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        for name, kind in GGUF.items():
            path = Path(place) / f"{kind}.gguf"
            try:
                scored = apart(write_gguf, model_dir, path, kind, text)
            except InputError as error:
                results[name] = {"skipped": str(error)}
                continue
            results[name] = apart(measure_llama_cpp, path, scored.pop("prompt"), new) | scored
    n_bytes = len(text.encode())
    return {"kind": "precisions", "bytes": n_bytes, "machine": machine(), "versions": versions(), "results": results}


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a new process, which ends with it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def measure_ours(model_dir: Path, rounding: dict[str, Any], text: str, new: int) -> dict[str, float]:
    """Measure a model folder in fp32, or rounded to 8 or 4 bits when it is loaded."""
    import torch

    from llm.api import load
    from llm.inference.generate import generate

    torch.set_num_threads(1)
    model = load(model_dir, device="cpu", **rounding)
    prompt = model.checkpoint.tokenizer.encode(text)[:PROMPT]
    generate(model.gpt, [prompt], max_new_tokens=1)  # warm up
    begun = time.perf_counter()
    [made] = generate(model.gpt, [prompt], max_new_tokens=new)
    rate = len(made) / (time.perf_counter() - begun)
    held = memory()
    disk = sum(path.stat().st_size for path in Path(model_dir).glob("*.safetensors"))
    return {"disk": disk, "memory": held, "rate": rate, "bpb": model.score(text).bpb(len(text.encode()))}


def write_gguf(model_dir: Path, path: Path, kind: Any, text: str) -> dict[str, Any]:
    """Write a GGUF file; return the bits per byte with its weights, computed in fp32, and a prompt's tokens."""
    import torch

    from llm.api import Model
    from llm.checkpoint.folder import load_checkpoint
    from llm.convert.gguf import export_gguf, read_gguf

    export_gguf(load_checkpoint(model_dir, dtype=None), path, kind)
    model = Model(read_gguf(path, torch.float32))
    prompt = model.checkpoint.tokenizer.encode(text)[:PROMPT]
    return {"bpb": model.score(text).bpb(len(text.encode())), "prompt": prompt}


def measure_llama_cpp(path: Path, prompt: list[int], new: int) -> dict[str, float]:
    """Measure llama.cpp on a GGUF file."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), len(prompt) + new + 1, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_gpu_layers, params.fit_params, params.verbosity = 0, False, 0
    server = xllamacpp.Server(params)
    request = {"prompt": prompt, "ignore_eos": True, "cache_prompt": False, "temperature": 0}
    server.handle_completions(request | {"n_predict": 1})
    begun = time.perf_counter()
    reply = server.handle_completions(request | {"n_predict": new})
    rate = int(reply["usage"]["completion_tokens"]) / (time.perf_counter() - begun)
    return {"disk": path.stat().st_size, "memory": memory(), "rate": rate}


def markdown(found: Mapping[str, Any]) -> str:
    rows = []
    for name, result in found["results"].items():
        if reason := result.get("skipped"):
            rows.append([name, f"skipped: {reason}", "-", "-", "-"])
            continue
        megabytes = [f"{result[key] / 1e6:,.1f} MB" for key in ("disk", "memory")]
        rows.append([name, *megabytes, f"{result['rate']:,.1f}", f"{result['bpb']:.4f}"])
    return "\n".join(table(["one thread", "weights on disk", "memory", "tokens/s", "bits per byte"], rows))


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw the decoding speeds as bars."""
    from matplotlib.figure import Figure

    results = {name: result for name, result in found["results"].items() if "rate" in result}
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(results)[::-1], [result["rate"] for result in results.values()][::-1], color="#8fb1d6")
    axes.set_xlabel("tokens/s, one thread")
    figure.savefig(path, dpi=120)
