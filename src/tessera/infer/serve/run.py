"""``tessera deploy``: open the model, listen, answer until told to stop.

The port is taken before the weights are read, so that a mistake costs nothing. On SIGTERM or Ctrl-C the server takes no
more requests (503), finishes those it has and exits with 0; a second Ctrl-C ends them, too.
"""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import logging
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessera.checkpoint import open as door
from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.config.serving import named
from tessera.infer.limits import OPEN_ENDED, max_positions
from tessera.infer.serve import backends

if TYPE_CHECKING:
    from tessera.infer.engine import Engine, Sampling

NEEDED = ("fastapi", "uvicorn", "prometheus_client")
COLDEST = 1e-5
"""A lower temperature draws what 0 chooses, and logits divided by it overflow."""

PORTS = 64
"""How many ports are tried, from ``--port`` upwards."""


def main(run: Run) -> None:
    """Serve as ``run`` says; returns when the server was told to stop."""
    if run.deploy.infer_backend != "tessera":
        backends.start(run)
        return
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"tessera deploy needs {', '.join(lacking)}: pip install 'tessera[deploy]'")
    models, adapters = models_of(run)
    source = door.describe(run.model)
    context = context_of(run, source)
    if run.dry_run:
        print(describe(run, models, context))
        return
    listening = listen(run.deploy.host, run.deploy.port)
    if listening.getsockname()[1] != run.deploy.port:
        print(f"port {run.deploy.port} is taken, the next free one is {listening.getsockname()[1]}", flush=True)
    from tessera.infer.engine import Engine

    try:
        engine = Engine.open(
            replace(run, model=replace(run.model, adapters=())),
            adapters,
            max_rows=run.deploy.max_num_seqs,
            max_waiting=run.deploy.max_waiting,
        )
    except BaseException:
        listening.close()
        raise
    for note in engine.session.notes:
        print(f"note: {note}", flush=True)
    drained = False
    try:
        drained = asyncio.run(_serve(run, engine, models, context, listening))
    finally:
        engine.close(drain=drained, timeout=None if drained else 5.0)


def models_of(run: Run) -> tuple[dict[str, str | None], dict[str, str]]:
    """What requests may name, the first being the default, each with its adapter; and where those adapters lie."""
    pairs = [named(word) for word in run.model.adapters]
    own = next((path for name, path in pairs if not name), None)
    title = run.deploy.served_model_name or Path(own or run.model.model or "model").name
    adapters = {name or title: path for name, path in pairs}
    if title in {name for name, _ in pairs}:
        raise UserError(f"--adapters {title}=...: that is what the model itself is called (--served_model_name)")
    return {title: title if own else None, **{name: name for name, _ in pairs if name}}, adapters


def context_of(run: Run, source: door.Source) -> int:
    """Most tokens of a prompt and its answer."""
    longest = max_positions(source.config)
    wanted = run.deploy.max_model_len
    if wanted is not None and wanted > longest:
        raise UserError(f"--max_model_len {wanted}: the model has room for {longest} tokens")
    return wanted or longest


def describe(run: Run, models: Mapping[str, str | None], context: int) -> str:
    """What would be served, for ``--dry_run true``."""
    scheme = "https" if run.deploy.ssl_certfile else "http"
    asked = run.deploy
    lines = [
        f"would serve {', '.join(models)} at {scheme}://{_host(asked.host)}:{asked.port}/v1",
        f"  model      {run.model.model}",
        *(f"  adapter    {word}" for word in run.model.adapters),
        f"  context    {context} tokens, {asked.max_num_seqs} answers at once, {asked.max_waiting} requests waiting",
        f"  key        {'asked for' if asked.api_key else 'none'}",
        f"  images     {_media(run)}",
    ]
    return "\n".join(lines)


def _media(run: Run) -> str:
    asked = run.deploy
    hosts = ", ".join(asked.allowed_media_domains) or "public hosts"
    below = f", files below {asked.allowed_media_dir}" if asked.allowed_media_dir else ""
    return f"data URIs, URLs of {hosts}{below}; at most {asked.max_body_size} bytes, {asked.max_image_pixels} pixels"


def listen(host: str, port: int) -> socket.socket:
    """A socket on ``host`` and the first free port from ``port`` on; UserError if there is none."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror or error}") from None
    for number in range(port, min(port + PORTS, 65536)):
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((address[0], number, *address[2:]))
            found.listen(2048)
        except OSError as error:
            found.close()
            if isinstance(error, PermissionError) or error.errno not in (98, 48, 10048):
                raise UserError(f"--host {host} --port {number}: {error.strerror or error}") from None
            continue
        return found
    raise UserError(f"--port {port}: it and the {PORTS - 1} ports behind it are taken")


async def _serve(
    run: Run, engine: Engine, models: Mapping[str, str | None], context: int, listening: socket.socket
) -> bool:
    """Answer until a signal; whether what was asked until then has been answered."""
    import uvicorn

    from tessera.infer.serve.app import make_app
    from tessera.infer.serve.desk import Desk
    from tessera.infer.serve.gate import Gate
    from tessera.infer.serve.metrics import Metrics, Summary

    class Server(uvicorn.Server):
        """Ends when the desk is empty, not when the signal comes."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            again, desk.draining = desk.draining, True
            if again:
                self.should_exit = self.force_exit = True
            else:
                print(f"shutting down: {max(0, desk.active)} requests to finish", flush=True)

        async def on_tick(self, counter: int) -> bool:
            if engine.failed is not None and not told:
                told.append(engine.failed)
                print(f"error: the engine has stopped, /health says so: {engine.failed}", file=sys.stderr, flush=True)
            return await super().on_tick(counter) or (desk.draining and not desk.active)

    told: list[str] = []
    desk = Desk(engine, Metrics(engine.stats))
    service = service_of(run, engine, models, context, desk)
    host = listening.getsockname()[0]
    gate = Gate(
        make_app(service),
        desk,
        api_key=run.deploy.api_key,
        max_body=run.deploy.max_body_size,
        local=ipaddress.ip_address(host.partition("%")[0]).is_loopback,
    )
    _log_discreetly()
    server = Server(
        uvicorn.Config(
            gate,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ssl_keyfile=run.deploy.ssl_keyfile,
            ssl_certfile=run.deploy.ssl_certfile,
        )
    )
    _announce(run, list(models), listening)
    telling = asyncio.ensure_future(_tell(Summary(desk.metrics), run.deploy.stats_interval))
    try:
        await server.serve(sockets=[listening])
    finally:
        telling.cancel()
        service.close()
    return not server.force_exit


def service_of(run: Run, engine: Engine, models: Mapping[str, str | None], context: int, desk: Any) -> Any:
    """The service of ``engine`` with the limits of ``run``: what the routes need."""
    from tessera.infer.serve.answers import Vocabulary
    from tessera.infer.serve.app import Served, Service
    from tessera.infer.serve.asking import Asker
    from tessera.infer.serve.fetch import Fetcher
    from tessera.infer.serve.media import Library, MediaLimits

    asked, renderer = run.deploy, engine.session.encoder.renderer
    defaults = door.read_json(engine.session.source.path / "generation_config.json")
    served = Served(
        models=models,
        root=str(run.model.model),
        created=int(time.time()),
        sampling=lambda given: sampling_of(run, defaults, given),
        max_new_tokens=run.infer.max_new_tokens,
        open_ended=OPEN_ENDED,
        max_logprobs=asked.max_logprobs,
        vocabulary=Vocabulary(renderer.decode, renderer.tokenizer.id_to_token),
    )
    limits = MediaLimits.of(asked.limit_mm_per_prompt, asked.max_body_size, asked.max_image_pixels)
    fetcher = Fetcher(asked.allowed_media_domains, max_bytes=asked.max_body_size)
    library = Library(limits, fetcher, asked.allowed_media_dir)
    return Service(served, desk, Asker(engine.session, context), library)


def sampling_of(run: Run, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Sampling:
    """What a request says (``given``), then the server's command line, then the model's ``generation_config.json``.

    The rules are those of ``tessera infer``, as if the request had been its flags.
    """
    from tessera.infer.engine import Sampling

    flags = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    args = replace(run.infer, **{name: given[name] for name in flags if name in given})
    if args.temperature is not None and args.temperature < COLDEST:
        args = replace(args, temperature=0.0)
    penalties = {name: given[name] for name in ("presence_penalty", "frequency_penalty") if name in given}
    return replace(Sampling.of(args, defaults), **penalties)


def _announce(run: Run, models: Sequence[str], listening: socket.socket) -> None:
    host, port = listening.getsockname()[:2]
    scheme = "https" if run.deploy.ssl_certfile else "http"
    base = f"{scheme}://{_host(host)}:{port}"
    print(f"serving {', '.join(models)} at {base}/v1 (chat {base}/, docs {base}/docs)", flush=True)
    if run.deploy.api_key is None and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        print(f"note: {host} can be reached from elsewhere and no --api_key is asked for", file=sys.stderr, flush=True)


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def _tell(summary: Any, interval: int) -> None:
    """Print what went on, every ``interval`` seconds in which something did."""
    while interval:
        await asyncio.sleep(interval)
        line = summary.line(float(interval))
        if line is not None:
            print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


class Discreet(logging.Formatter):
    """Log lines that never hold what a request said: of an exception, its kind and where it came from."""

    def formatException(self, ei: Any) -> str:  # noqa: N802
        import traceback

        kind, _, trace = ei
        return "".join(traceback.format_tb(trace)) + str(kind.__name__)


def _log_discreetly() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Discreet("%(levelname)s: %(message)s"))
    logger = logging.getLogger("uvicorn.error")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING)
