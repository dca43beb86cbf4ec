"""`python -m llm serve`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
from pathlib import Path
from typing import Any

from llm.cli.options import add_device, add_int8_cache, add_rounding
from llm.common.errors import InputError

SUMMARY = "answer over HTTP, in OpenAI's API, with a page"
DESCRIPTION = (
    "Serves models at http://HOST:PORT: OpenAI's /v1 endpoints, a page at / and the API's description at /docs. "
    "Requests share the decode batch. With LLM_API_KEY in the environment, clients have to send that key."
)
EXAMPLES = (
    "python -m llm serve models/instruct --classifier models/classifier",
    "python -m llm serve models/base models/instruct --port 9000",
    "LLM_API_KEY=secret python -m llm serve small=models/instruct --host 0.0.0.0",
    "python -m llm serve models:/llm-instruct@champion",
)
MODEL = "[NAME=]MODEL_DIR"
LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})  # names that only this machine answers to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar=MODEL, help="a model folder, or a registered model as models:/NAME@ALIAS"
    )
    parser.add_argument(
        "--classifier", action="append", default=[], metavar=MODEL, help="a classifier's folder; may be repeated"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="(default: %(default)s; 0: a free one)")
    parser.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN", help="let pages of this origin use the API"
    )
    add_device(parser)
    add_rounding(parser)
    add_int8_cache(parser)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the step of a token: more tokens, after half a minute at the start; needs g++, on a CPU",
    )
    add = parser.add_argument_group("limits").add_argument
    for option, value, text in LIMITS:
        add(option, type=positive, default=value, metavar="N", help=f"{text} (default: %(default)s)")
    add(
        "--no-deterministic",
        action="store_true",
        help="let the last bits of an answer depend on what runs beside it: fewer rows to compute for some batches",
    )


LIMITS = (
    ("--batch-size", 16, "requests that are decoded together"),
    ("--queue", 64, "requests that wait; more get status 429"),
    ("--chunk", 256, "tokens of prompts that are read between two tokens of the others"),
    ("--cache-tokens", 2**16, "tokens of all KV caches"),
    ("--max-tokens", 1024, "tokens of an answer"),
    ("--max-seconds", 300, "seconds of a request, from arrival to the end of its answer"),
    ("--max-body", 4 * 2**20, "bytes of a request"),
)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def run(args: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM, then finish the requests at hand."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise InputError(f"serve: {error.name} is not installed; install the extra: pip install '.[serve]'") from None
    app = build(args)
    config = uvicorn.Config(app, args.host, args.port, http="h11", log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    sockets = [config.bind_socket()]
    sockets[0].listen(config.backlog)  # who reads the line below can connect at once
    host, port = sockets[0].getsockname()[:2]
    logging.getLogger("llm").info("serving at http://%s:%d", f"[{host}]" if ":" in host else host, port)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal once more when all is finished
    server.run(sockets)


def build(args: argparse.Namespace) -> Any:
    """Load the models and return the app."""
    from llm.serving.answers import RequestLimits
    from llm.serving.app import Server, build_app
    from llm.serving.engine import Limits
    from llm.serving.middleware import Gate
    from llm.serving.models import CLASSIFIER, Loading, Models

    sizes = {name: getattr(args, name) for name in ("batch_size", "queue", "chunk", "cache_tokens")}
    limits = Limits(**sizes, deterministic=not args.no_deterministic)
    models = Models(Loading(args.device, args.int8, args.int4, args.int8_cache, args.compile, limits), resolve)
    for source in args.models:
        models.add(source)
    for source in args.classifier:
        models.add(source, CLASSIFIER)
    hosts = LOCAL if args.host in LOCAL or args.host == "::1" else None
    gate = Gate(os.environ.get("LLM_API_KEY") or None, args.max_body, hosts=hosts)
    return build_app(Server(models, RequestLimits(args.max_tokens, args.max_seconds), gate, args.cors))


def resolve(source: str) -> Path:
    """Return the folder of a model: itself, or the downloaded one of a registered model."""
    if not source.startswith("models:/"):
        return Path(source)
    import mlflow

    try:
        place = Path(mlflow.artifacts.download_artifacts(artifact_uri=source))
    except mlflow.MlflowException as error:
        raise InputError(f"{source}: not in the registry ({error}); see MLFLOW_TRACKING_URI") from None
    folders = sorted(path.parent for path in place.rglob("model.safetensors"))
    if not folders:
        raise InputError(f"{source}: holds no model folder; register it by the evaluate stage")
    return folders[0]
