"""`python -m ray_jobs.serve RUN [--port 8000] [--replicas N]`: serves a trained model over HTTP, with Ray Serve.

POST /predict takes rows as JSON and returns what `perceiver predict` writes for them; POST /stream continues a text piece by piece;
GET /health tells whether a model is ready; GET / is a page for trying it. Rows of several requests are computed together. Requests must
send a token (--token-file, or $PERCEIVER_SERVE_TOKEN) unless only this machine can reach the server.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from perceiver.config import ParallelConfig, UserError
from perceiver.generation.options import GenerationOptions, add_generation_options, given_generation_options, named_as_typed
from perceiver.inference.load import Description, describe
from perceiver.inference.predict import MODES, PredictOptions
from perceiver.inference.served import OPTIONS, mode_of
from perceiver.terminal import CommandParser, add_checkpoint_option, add_trust_option
from ray_jobs.cli import JobFailed, main_entry, refuse_empty
from ray_jobs.logs import show_progress
from ray_jobs.program import program

if TYPE_CHECKING:
    from ray_jobs.serve_app import ServeSettings

logger = logging.getLogger("ray_jobs.serve")  # which __name__ is not where it is run as a program

LOCAL = ("127.0.0.1", "localhost")
LEAST_TOKEN = 16
"""Characters of a token."""


def main(argv: list[str]) -> int:
    argv = show_progress(argv)
    settings, args, model = parse(argv)
    serve(settings, args, model)
    return 0


def parse(argv: list[str]) -> tuple[ServeSettings, argparse.Namespace, Description]:
    """A command line as what is served, where, and its model.

    Raises:
        UserError: a value out of range, no token where one is needed, or Ray Serve is not installed.
        SystemExit: an unknown argument, or `--help`.
    """
    parser = CommandParser(prog=program("ray_jobs.serve"), description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("run", help="folder or name of a run, or an exported folder")
    parser.add_argument("--mode", choices=MODES, help="what to compute (default: what the model's task is for)")
    add_checkpoint_option(parser)
    add_trust_option(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all addresses of the machine (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (%(default)s)")
    parser.add_argument("--token-file", help="file with the token that requests must send (default: $PERCEIVER_SERVE_TOKEN)")
    parser.add_argument("--replicas", type=int, default=1, help="models that run in parallel, each on a GPU or on a share of the CPUs (1)")
    parser.add_argument("--batch-size", type=int, default=PredictOptions.batch_size, help="rows computed at once (%(default)s)")
    parser.add_argument("--batch-wait", type=float, default=0.01, help="seconds that a row waits for others, at most (%(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs where the cluster has them")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="precision of weights and computation")
    parser.add_argument("--address", help="Ray cluster to join (default: that of $RAY_ADDRESS, else a new local one)")
    add_generation_options(
        parser, PredictOptions(mode="generate"), "fill-mask: predictions per row; generate: sample only from the k most likely tokens"
    )
    args = parser.parse_args(argv)
    refuse_empty(args, ("run",))
    for name in ("replicas", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)} and must be at least 1")
    if not 0 < args.port < 65536:
        raise UserError(f"--port is {args.port} and must be from 1 to 65535")
    if not 0 <= args.batch_wait <= 10:
        raise UserError(f"--batch-wait is {args.batch_wait} and must be from 0 to 10 seconds")
    token = read_token(args.token_file)
    if token is None and args.host not in LOCAL:
        raise UserError(
            f"--host is {args.host}, which other machines reach, so requests must bring a token: give --token-file FILE, or set "
            "PERCEIVER_SERVE_TOKEN"
        )
    model = describe(args.run, args.checkpoint, args.trust_code)
    if importlib.util.find_spec("fastapi") is None:
        raise UserError("perceiver serve needs Ray Serve: pip install 'perceiver-ray[serve]'")

    from ray_jobs.serve_app import settings_of
    from ray_jobs.serve_http import hashed

    mode = mode_of(model.abilities, args.mode, model.name) if model.abilities else args.mode
    options = {name: value for name, value in given_generation_options(args).items() if name in OPTIONS.get(mode or "", ())}
    with named_as_typed():
        GenerationOptions(**given_generation_options(args)).check()
    settings = settings_of(
        model, mode=mode, options=options, batch_size=args.batch_size, precision=args.precision, replicas=args.replicas,
        batch_wait=args.batch_wait, token_hash=None if token is None else hashed(token), needs_token=token is not None,
    )  # fmt: skip
    return settings, args, model


def read_token(file: str | None) -> str | None:
    """The token in a file, else in $PERCEIVER_SERVE_TOKEN; None: there is none.

    Raises:
        UserError: the file cannot be read, or the token is too short to be one.
    """
    where, token = f"--token-file {file}", os.environ.get("PERCEIVER_SERVE_TOKEN", "")
    if file is None:
        where = "PERCEIVER_SERVE_TOKEN"
        if not token:
            return None
    else:
        try:
            token = Path(file).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--token-file {file} cannot be read ({getattr(error, 'strerror', None) or 'it is no text'})") from None
    token = token.strip()
    if len(token) < LEAST_TOKEN or not token.isascii() or any(character.isspace() for character in token):
        raise UserError(f"{where} must hold one word of at least {LEAST_TOKEN} ASCII characters (openssl rand -hex 32 makes one)")
    return token


def serve(settings: ServeSettings, args: argparse.Namespace, model: Description) -> None:
    """Serves until a signal comes (Ctrl-C, SIGTERM).

    Raises:
        JobFailed: the model's replicas do not start.
        UserError: the cluster has no room for them.
    """
    import ray
    from ray import serve as ray_serve

    from ray_jobs.ray_env import connect, use_gpus
    from ray_jobs.serve_app import build

    parallel = ParallelConfig(device=args.device, address=args.address)
    stop = threading.Event()
    with connect(parallel):
        gpu = use_gpus(parallel)
        kind = "GPU" if gpu else "CPU"
        if (room := int(ray.cluster_resources().get(kind, 0))) < settings.replicas:
            raise UserError(f"--replicas is {settings.replicas}, but the cluster has room for {room} ({kind}s)")
        settings = replace(settings, device="cuda" if gpu else "cpu")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        ray_serve.start(http_options={"host": args.host, "port": args.port})
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        try:
            logs = {"log_level": "WARNING", "enable_access_log": False}
            ray_serve.run(build(settings, model), name="perceiver", route_prefix="/", logging_config=logs)
            shown = settings.interface
            what = f"{shown.mode} of {shown.name}, checkpoint {shown.checkpoint}"
            logger.info(f"serving {what}, at http://{args.host}:{args.port} (POST /predict; a page to try it at /); Ctrl-C ends it")
            stop.wait()
            logger.info("stopping: requests that are being computed are answered first")
        except RuntimeError as error:
            raise JobFailed(f"the model could not be served: {' '.join(str(error).split())[:500]}") from error
        finally:
            ray_serve.shutdown()


if __name__ == "__main__":
    # By the module's own name: what goes to Ray's workers is then found there by reference.
    from ray_jobs.serve import main as job

    main_entry(job)
