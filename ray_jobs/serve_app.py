"""A served model as a Ray Serve application: replicas with the model, and before them one that speaks HTTP.

The one before them has no model and computes nothing. Where a replica is lost it asks another one: an answer depends on the row and its
options alone, so that nothing is lost with it, and a stream continues after what was sent.

`application` builds it of a mapping, for `serve run ray_jobs.serve_app:application run=RUN` and KubeRay's RayService.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from perceiver.config import UserError
from perceiver.data.rows import ArrayRows
from perceiver.inference.load import Description, describe
from perceiver.inference.predict import PredictOptions
from perceiver.inference.served import Interface, ServedModel, interface_of, mode_of
from ray_jobs.serve_http import Busy, build_app, hashed
from ray_jobs.shipping import Shipped

logger = logging.getLogger("ray.serve")

VARIABLE = "PERCEIVER_SERVE_TOKEN"
"""Environment variable with the token that requests must bring."""
MODEL = "model"
"""Name of the deployment that has the model."""
ATTEMPTS = 20
"""How often a row is given to another replica when one is lost."""
PAUSE = 0.5
"""Seconds between two attempts."""
READY_SECONDS = 5.0
"""How long a replica may take to say that it is there."""
QUEUED = 1000
"""Requests that wait for replicas; above it they are refused, to be sent again later."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What is served, and how."""

    source: str
    """Run, exported folder or hub name."""
    checkpoint: str
    interface: Interface
    options: PredictOptions
    arrays: dict[str, Any] | None
    """The columns of rows of arrays (`ArrayRows.to_json`)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    batch_wait: float = 0.01
    """Seconds that a row waits for others to be computed with."""
    replicas: int = 1
    token_hash: str | None = None
    needs_token: bool = True
    """Whether requests must bring a token: that of `token_hash`, else of $PERCEIVER_SERVE_TOKEN where it runs."""


def settings_of(
    model: Description,
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    batch_size: int = PredictOptions.batch_size,
    **others: Any,
) -> ServeSettings:
    """The settings to serve a model.

    Raises:
        UserError: it cannot be served, or not so.
    """
    abilities = model.abilities
    if not abilities:
        raise UserError(f"{model.name} says nothing of its task before it is loaded: export it (`perceiver export`) and serve the folder")
    chosen = mode_of(abilities, mode, model.name)
    interface = interface_of(model.name, model.checkpoint, model.task, model.rows, model.data.text_column, abilities, chosen)
    made = PredictOptions(mode=chosen, batch_size=batch_size, **(options or {}))
    made.check()
    arrays = None if model.rows is None or interface.kind != "arrays" else model.rows.to_json(missing=True)
    return ServeSettings(
        source=model.location, checkpoint=model.checkpoint, interface=interface, options=made, arrays=arrays, **others
    )  # fmt: skip


class ModelReplica:
    """A replica: one model, which computes rows of several requests at once."""

    def __init__(self, settings: ServeSettings, threads: int, classes: Any = None) -> None:
        """Loads the model; `classes` are its own, whose code came along with them (and was checked where it was started)."""
        import torch

        import perceiver

        torch.set_num_threads(threads)
        model = perceiver.load(settings.source, settings.checkpoint, device=settings.device, precision=settings.precision, trust_code=True)
        arrays = None if settings.arrays is None else ArrayRows.from_json(settings.arrays)
        self.served = ServedModel(model, settings.interface, settings.options, arrays)
        self._together.set_max_batch_size(settings.options.batch_size)  # type: ignore[attr-defined]
        self._together.set_batch_wait_timeout_s(settings.batch_wait)  # type: ignore[attr-defined]

    @serve.batch
    async def _together(self, items: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
        # In a thread, so that rows that come meanwhile are collected for the next batch.
        return await asyncio.to_thread(self.served.answers, items)

    async def predict(self, rows: list[dict[str, Any]], options: dict[str, Any]) -> list[dict[str, Any]]:
        """An answer to each row."""
        return list(await asyncio.gather(*(self._together((row, options)) for row in rows)))

    async def stream(self, text: str, options: dict[str, Any], identity: str) -> AsyncIterator[tuple[str, str]]:
        """("text", piece) for each piece of a continuation; ("error", sentence) where it is refused."""
        try:
            pieces = self.served.stream(text, options, identity)
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield "text", piece
        except UserError as error:
            yield "error", str(error)

    async def ready(self) -> bool:
        return True


class RayBackend:
    """The models behind a handle of Ray Serve; see `ray_jobs.serve_http.Backend`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def predict(self, rows: list[dict[str, Any]], options: dict[str, Any]) -> list[dict[str, Any]]:
        return await _again(lambda: self._handle.predict.remote(rows, options))

    async def stream(self, text: str, options: dict[str, Any], identity: str) -> AsyncIterator[str]:
        sent = 0
        for attempt in range(ATTEMPTS):
            skip = sent  # the same text comes again: its draws depend on seed and id alone
            try:
                async for kind, piece in self._handle.options(stream=True).stream.remote(text, options, identity):
                    if kind == "error":
                        raise UserError(piece)
                    new = piece[skip:]
                    skip = max(0, skip - len(piece))
                    if new:
                        sent += len(new)
                        yield new
                return
            except RayActorError:
                logger.warning("a replica was lost while it streamed: attempt %d", attempt + 2)
                await asyncio.sleep(PAUSE)
            except BackPressureError:
                raise Busy(f"{QUEUED} requests wait already: send it again later") from None
        raise Busy("no model stays alive for this request: send it again later")

    async def ready(self) -> bool:
        try:
            return bool(await asyncio.wait_for(self._handle.ready.remote(), READY_SECONDS))
        except (RayActorError, RayServeException, TimeoutError):
            return False


async def _again(ask: Callable[[], Awaitable[T]]) -> T:
    """What one replica or another answers."""
    for attempt in range(ATTEMPTS):
        try:
            return await ask()
        except RayActorError:
            logger.warning("a replica was lost while it computed: attempt %d", attempt + 2)
            await asyncio.sleep(PAUSE)
        except BackPressureError:
            break
    raise Busy(f"no model is free: lost, or {QUEUED} requests wait already; send it again later")


class Gateway:
    """The replica that speaks HTTP."""

    def __init__(self, settings: ServeSettings, handle: DeploymentHandle) -> None:
        token_hash = settings.token_hash
        if token_hash is None and settings.needs_token:
            if not (token := os.environ.get(VARIABLE, "").strip()):
                raise UserError(f"there is no token: set ${VARIABLE} where the application runs")
            token_hash = hashed(token)
        self._app = build_app(RayBackend(handle), settings.interface, token_hash)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app


def build(settings: ServeSettings, model: Description, cores: int | None = None) -> serve.Application:
    """The application.

    Args:
        settings: what is served, and how.
        model: whose code goes to the replicas.
        cores: of a machine that its replicas share; None: as many as the machine that this runs on has.
    """
    gpu = settings.device == "cuda"
    threads = max(1, (cores or os.cpu_count() or 1) // (1 if gpu else settings.replicas))
    replica = serve.deployment(
        ModelReplica,
        name=MODEL,
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": 1, **({"num_gpus": 1} if gpu else {})},
        max_ongoing_requests=4 * settings.options.batch_size,
        max_queued_requests=QUEUED,
        health_check_period_s=2,
        health_check_timeout_s=30,
    )
    gateway = serve.deployment(serve.ingress()(Gateway), name="http", ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=2 * QUEUED)
    return gateway.bind(settings, replica.bind(settings, threads, Shipped((model.task, model.config))))


def application(arguments: dict[str, Any]) -> serve.Application:
    """The application of a mapping: "run", and if you like "checkpoint", "mode", "replicas", "device", "precision", "batch_size",
    "batch_wait", "options". Requests must bring the token in $PERCEIVER_SERVE_TOKEN.

    Raises:
        UserError: an unknown name or a value that does not fit.
    """
    given = dict(arguments)
    names = ("run", "checkpoint", "mode", "replicas", "device", "precision", "batch_size", "batch_wait", "options")
    if unknown := [name for name in given if name not in names]:
        raise UserError(f"{unknown[0]} is no argument of the application: there are {', '.join(names)}")
    if "run" not in given:
        raise UserError("run is missing: the folder, URI or name of what is to be served")
    model = describe(given.pop("run"), str(given.pop("checkpoint", "best")))
    return build(settings_of(model, **given), model)
