"""The engine in the `xllamacpp` wheel, behind llama-server's own flags.

A child program, started as `python -m p2pmesh.engine.embedded <flags>`: it understands the flags
that `argv.server_argv` writes plus `--version` and `--list-devices`, and answers those as
llama-server does, so that nobody else has to know which engine it is. llama.cpp itself prints
`listening on http://…`. SIGTERM and SIGINT keep their default action, which ends it at once, in
the middle of a load as well. It imports nothing of p2pmesh: start-up time is what users wait for.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import signal
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any

_MIB = 1024 * 1024


def main(args: Sequence[str] | None = None) -> int:
    """Serves the model until it is told to end.

    Returns:
        The exit code: 0 after a question, 1 when the model cannot be served.
    """
    options = _parse(args)
    if options.version:
        sys.stderr.write(f"version: {importlib.metadata.version('xllamacpp')} (xllamacpp)\n")
        return 0
    try:
        import xllamacpp
    except ImportError as exc:
        sys.stderr.write(f"error: the embedded engine cannot be loaded: {exc}\n")
        return 1
    if options.list_devices:
        cpu = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
        sys.stdout.write(_device_list(d for d in xllamacpp.get_device_info() if d["type"] != cpu))
        return 0
    # Python turns SIGINT into an exception that no C++ call would ever see.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        server = xllamacpp.Server(_params(xllamacpp, options))
    except RuntimeError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    threading.Event().wait()  # the server runs on threads of its own, until a signal ends all
    del server
    return 0


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llama-server", allow_abbrev=False)
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--list-devices", action="store_true")
    parser.add_argument("--model", default="")
    parser.add_argument("--alias", default="")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ctx-size", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--kv-unified", action="store_true")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--ubatch-size", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--threads-http", type=int)
    parser.add_argument("--device", choices=("none",))
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--no-webui", action="store_true")
    parser.add_argument("--jinja", action="store_true")
    modality = parser.add_mutually_exclusive_group()
    modality.add_argument("--embeddings", action="store_true")
    modality.add_argument("--reranking", action="store_true")
    options = parser.parse_args(args)
    if not (options.model or options.version or options.list_devices):
        parser.error("--model is missing")
    return options


def _params(xllamacpp: Any, options: argparse.Namespace) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.model_alias = {options.alias or options.model}
    params.hostnames = [options.host]
    params.port = options.port
    params.n_ctx = options.ctx_size
    params.n_parallel = options.parallel
    params.kv_unified = options.kv_unified
    params.ui = not options.no_webui
    params.use_jinja = options.jinja
    key = os.environ.pop("LLAMA_API_KEY", "")
    params.api_keys = [key] if key else []
    if options.batch_size is not None:
        params.n_batch = options.batch_size
    if options.ubatch_size is not None:
        params.n_ubatch = options.ubatch_size
    if options.threads is not None:
        params.cpuparams.n_threads = options.threads
    if options.threads_http is not None:
        params.n_threads_http = options.threads_http
    if options.device == "none":
        params.n_gpu_layers = 0
    params.embedding = options.embeddings or options.reranking
    if options.reranking:
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    return params


def _device_list(devices: Iterable[dict[str, Any]]) -> str:
    """The devices as llama-server prints them."""
    lines = [
        f"  {device['name']}: {device['description']} ({device['memory_total'] // _MIB} MiB, "
        f"{device['memory_free'] // _MIB} MiB free)"
        for device in devices
    ]
    return "\n".join(["Available devices:", *(lines or ["  (none)"]), ""])


if __name__ == "__main__":
    sys.exit(main())
