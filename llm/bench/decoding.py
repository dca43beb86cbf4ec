"""The benchmark `generate`: greedy decoding of one prompt or of a batch.

The rows of a batch have prompts and continuations of different lengths. Only the tokens that were asked for count, not
those that an implementation makes in vain until the longest row ends.

Shapes: B rows, T tokens of a prompt.
"""

from __future__ import annotations

import math
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llm.bench.harness import OURS, Benchmark, Cost, Skipped, Workload, run_apart
from llm.bench.models import Shape, check_shape, gpt_config, matrix_weights, transformers_model
from llm.common.errors import InputError
from llm.convert.gguf import FileType, export_gguf
from llm.inference.compiled import CompiledDecoder
from llm.inference.generate import generate
from llm.inference.grouped import to_int4
from llm.inference.int8 import to_int8
from llm.inference.kernels.build import load_kernels
from llm.inference.packed import to_packed
from llm.inference.prefill import use_prompt_kernels
from llm.inference.request import Decoder
from llm.model.gpt import GPT
from llm.tokenizer.bpe import END_OF_TEXT, GPT2_PATTERN, Tokenizer


class Requests(NamedTuple):
    prompts: list[list[int]]
    new: list[int]  # tokens that each row is continued by


def requests(shape: Shape) -> Requests:
    """Return random prompts. A single row has the full lengths, those of a batch at least half of them."""
    random = torch.Generator().manual_seed(0)

    def lengths(longest: int) -> list[int]:
        least = longest if shape.batch == 1 else (longest + 1) // 2
        drawn: list[int] = torch.randint(least, longest + 1, (shape.batch,), generator=random).tolist()
        return drawn

    prompts = [torch.randint(0, shape.vocab, (n,), generator=random).tolist() for n in lengths(shape.prompt)]
    return Requests(prompts, lengths(shape.new))


# ---- this project ----------------------------------------------------------------------------------------------------


def generate_ours(
    shape: Shape,
    int8: bool = False,
    int4: bool = False,
    packed: bool = False,
    int8_cache: bool = False,
    compiled: bool = False,
) -> Workload:
    model = GPT(gpt_config(shape))
    model.int8_cache = int8_cache
    if int8:
        to_int8(model)
    decoder: Decoder = model
    try:
        if int4 or packed or compiled:
            load_kernels()
        if int4:
            to_int4(model)
        if packed:
            to_packed(model)
        if compiled:
            use_prompt_kernels(model)
            decoder = CompiledDecoder(model)
    except InputError as error:
        raise Skipped(str(error)) from None
    prompts, new = requests(shape)
    return lambda: sum(map(len, generate(decoder, prompts, max_new_tokens=new)))


# ---- transformers ----------------------------------------------------------------------------------------------------


def generate_transformers(shape: Shape, cache: str = "dynamic", compiled: bool = False) -> Workload:
    """Return the workload of transformers. A batch is padded at the left and ends with its longest row."""
    model = transformers_model(shape).eval()
    if compiled:
        model.forward = torch.compile(model.forward)
    prompts, new = requests(shape)
    width = max(map(len, prompts))
    idx = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])  # [B, T]
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])  # [B, T]

    def run() -> int:
        found = model.generate(
            idx,
            attention_mask=mask,
            max_new_tokens=max(new),
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
            disable_compile=True,  # by generate itself, which does it on GPUs only
        )
        assert found.shape == (len(new), width + max(new))
        return sum(new)

    if compiled:
        try:
            run()
        except Exception as error:  # of the compiler's many classes
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise Skipped(f"torch.compile failed: {reason}") from None
    return run


PAGE = 256  # tokens of a block of its KV cache


def generate_transformers_continuous(shape: Shape) -> Workload:
    """Return the workload of transformers' continuous batching: a row that has its tokens leaves."""
    import transformers

    if shape.batch == 1:
        raise Skipped("a single row is no batch")
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        raise Skipped("this version of transformers has no continuous batching")
    prompts, new = requests(shape)
    model = transformers_model(shape).eval()
    blocks = sum(math.ceil((len(prompt) + n) / PAGE) for prompt, n in zip(prompts, new, strict=True))
    config = transformers.ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=blocks + 1, max_batch_tokens=sum(map(len, prompts)), allow_block_sharing=False
    )
    greedy = transformers.GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1, max_new_tokens=max(new))

    def run() -> int:
        made: list[int] = []
        with model.continuous_batching_context_manager(
            greedy, continuous_batching_config=config, persistent_manager=True, warmup=False
        ) as manager:
            for prompt, n in zip(prompts, new, strict=True):
                manager.add_request(prompt, max_new_tokens=n)
            while len(made) < len(prompts):
                row = manager.get_result(timeout=1)
                if row is not None and row.error is not None:
                    raise Skipped(f"continuous batching failed: {row.error}")
                if row is not None and row.is_finished():
                    made.append(len(row.generated_tokens))
                elif row is None and not manager.is_running():
                    raise Skipped("continuous batching does not run here; see its output above")
        return sum(made)

    return run


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


BYTE_TOKENIZER = Tokenizer([*(bytes([byte]) for byte in range(256)), b"th"], GPT2_PATTERN, {END_OF_TEXT: 257})
# A GGUF file needs a vocabulary with a merge; its other tokens are spare.


def write_gguf(shape: Shape, path: Path, weights: FileType) -> None:
    """Write a model with random weights, by our own export."""
    from llm.checkpoint.folder import lm_checkpoint

    export_gguf(lm_checkpoint(GPT(gpt_config(shape)), BYTE_TOKENIZER, None, None), path, weights)


def generate_llama_cpp(shape: Shape, weights: FileType) -> Workload:
    """Return the workload of llama.cpp's server, with a slot for each row; tokens come back as text."""
    import gguf  # noqa: F401  (the export needs it)
    import xllamacpp

    if shape.vocab < BYTE_TOKENIZER.vocab_size:
        raise Skipped(f"a GGUF file needs a vocabulary of {BYTE_TOKENIZER.vocab_size}")
    prompts, new = requests(shape)
    path = Path(tempfile.mkdtemp()) / "model.gguf"
    run_apart(write_gguf, shape, path, weights)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx = shape.batch, shape.batch * (shape.prompt + shape.new + 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.n_gpu_layers, params.fit_params, params.verbosity = 0, False, 0
    server = xllamacpp.Server(params)
    callers = ThreadPoolExecutor(shape.batch)

    def complete(prompt: list[int], n: int) -> int:
        request: dict[str, Any] = {"prompt": prompt, "n_predict": n, "ignore_eos": True, "cache_prompt": False}
        reply = server.handle_completions({**request, "temperature": 0})
        return int(reply["usage"]["completion_tokens"])

    return lambda: sum(callers.map(complete, prompts, new))


# ---- the benchmark ---------------------------------------------------------------------------------------------------


OURS_INT8 = f"{OURS}, int8"
OURS_INT8_COMPILED = f"{OURS}, int8, compiled"
OURS_INT8_CACHE = f"{OURS}, int8, int8 cache, compiled"
OURS_INT4 = f"{OURS}, int4"
OURS_INT4_COMPILED = f"{OURS}, int4, compiled"
BYTES_PER_WEIGHT = {  # of the blocks and of the output layer; elsewhere fp32
    OURS_INT8: (1, 1),
    OURS_INT8_COMPILED: (1, 1),
    OURS_INT8_CACHE: (1, 1),
    OURS_INT4: (20 / 32, 20 / 32),  # a group of 32 has a step and a minimum of two bytes each
    OURS_INT4_COMPILED: (20 / 32, 20 / 32),
    "llama.cpp, Q8_0": (34 / 32, 34 / 32),  # a block of 32 has a scale of two bytes
    "llama.cpp, Q4_0": (18 / 32, 34 / 32),
    "llama.cpp, Q4_1": (20 / 32, 34 / 32),
}


def decoding_cost(shape: Shape, name: str) -> Cost | None:
    """Return the cost of a token of a single row, which reads every weight once; the rows of a batch share reads."""
    if shape.batch > 1:
        return None
    of_blocks, of_output = BYTES_PER_WEIGHT.get(name, (4, 4))
    output = shape.vocab * shape.width
    return Cost(n_bytes=of_blocks * (matrix_weights(gpt_config(shape)) - output) + of_output * output)


FORMS = {  # GPT-2 124M's and SmolLM2-135M's
    "gpt2": Shape(layers=12, width=768, heads=12, vocab=50257, context=1024, batch=1, prompt=64, new=256),
    "llama": Shape(
        layers=30,
        width=576,
        heads=9,
        vocab=49152,
        context=2048,
        batch=1,
        prompt=64,
        new=256,
        kv_heads=3,
        ffn=1536,
        form="llama",
    ),
}
GENERATE = Benchmark(
    "generate",
    "tokens/s",
    FORMS["gpt2"],
    {
        OURS: generate_ours,
        f"{OURS}, packed": partial(generate_ours, packed=True),
        f"{OURS}, packed, compiled": partial(generate_ours, packed=True, compiled=True),
        f"{OURS}, compiled": partial(generate_ours, compiled=True),
        OURS_INT8: partial(generate_ours, int8=True),
        OURS_INT8_COMPILED: partial(generate_ours, int8=True, compiled=True),
        OURS_INT8_CACHE: partial(generate_ours, int8=True, int8_cache=True, compiled=True),
        OURS_INT4: partial(generate_ours, int4=True),
        OURS_INT4_COMPILED: partial(generate_ours, int4=True, compiled=True),
        "transformers": generate_transformers,
        "transformers, static cache": partial(generate_transformers, cache="static"),
        "transformers, compiled": partial(generate_transformers, cache="static", compiled=True),
        "transformers, continuous": generate_transformers_continuous,
        "llama.cpp, F32": partial(generate_llama_cpp, weights="f32"),
        "llama.cpp, Q8_0": partial(generate_llama_cpp, weights="q8_0"),
        "llama.cpp, Q4_0": partial(generate_llama_cpp, weights="q4_0"),
        "llama.cpp, Q4_1": partial(generate_llama_cpp, weights="q4_1"),
    },
    check_shape,
    decoding_cost,
    FORMS,
)
