"""What workers send to the driver, and its answer: lines, metrics, signs of life, an interruption."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_jobs.mailbox import Beat, Item, Mailbox
from ray_jobs.patience import Patience
from ray_jobs.ray_env import lost_processes, own_processes
from ray_jobs.watch import Watch, end_process

logger = logging.getLogger(__name__)
SIGN_OF_LIFE = ""
"""What a worker says when it begins: nobody waits for it any more."""
START_PATIENCE = 60.0
"""Seconds without a sign of the workers after which the driver says what they may be waiting for."""
PUMP_EVERY = 0.5
"""Seconds between two looks of the driver for what has come."""


class Messages:
    """Lines and reported metrics from workers to the driver, without the noise of Ray's log forwarding, and its interruption to them."""

    def __init__(
        self,
        why_silent: Callable[[], str],
        on_report: Callable[[dict[str, float]], None] | None = None,
        every: float = PUMP_EVERY,
        stall: float = 1800.0,
    ) -> None:
        # On this node: losing another machine must not lose the run's messages. Its process may be lost and is then replaced.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Twice a second it is asked what has come: the cluster need not keep account of each time.
        options = {"scheduling_strategy": here, "max_restarts": -1, "enable_task_events": False}
        self.actor = Mailbox.options(**options).remote()  # type: ignore[attr-defined]
        self.interrupted = False
        """Whether the workers have been asked to save and end."""
        self.lost: str | None = None
        """Why nothing more can be heard of the workers: what they run on is gone."""
        self._watch = Watch(stall)
        self._ending: list[tuple[ray.ObjectRef, str]] = []
        self._alive = False
        self._why_silent = why_silent
        self._on_report = on_report
        self._every = every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._pump, daemon=True)

    def __enter__(self) -> Messages:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(timeout=60)
        if self.lost is None:
            ray.kill(self.actor)

    def interrupt(self, number: int, frame: object) -> None:
        """Handles a signal: a first one asks the workers, where there are any; else, and a second one, ends all at once."""
        if self.interrupted or not self._alive:
            raise KeyboardInterrupt
        self.interrupted = True
        logger.info("stopping: finishing the step and saving a checkpoint (Ctrl-C again stops at once)")

    def _pump(self) -> None:
        silent_since, passed_on = time.monotonic(), False
        while self.lost is None:
            ended = self._ended.is_set()
            items, kept = self._take()
            for item in items:
                self._pass(item)
            if ended:
                return
            if self.interrupted and not (passed_on and kept):
                self.actor.interrupt.remote()
                passed_on = True
            if not self._alive and time.monotonic() - silent_since > START_PATIENCE:
                logger.warning("%s", self._why_silent())
                silent_since = time.monotonic()
            self._end_overdue()
            self._ended.wait(self._every)

    def _take(self) -> tuple[list[Item], bool]:
        """What has come, and whether the actor still knows what was sent to it: it is replaced where its process is lost."""
        answer, kept = None, True
        patience = Patience(own_processes(), logger.warning)
        while True:
            if gone := lost_processes():
                self.lost = f"the {gone} on this machine ended, and with it Ray's local cluster"
                return [], False
            try:
                answer = answer or self.actor.take.remote()
                return ray.get(answer, timeout=1.0), kept
            except ray.exceptions.GetTimeoutError:
                pass
            except ray.exceptions.RayError as error:
                if kept:
                    logger.warning("the process that collects the workers' lines was lost and is replaced: some lines may be missing")
                    logger.debug("%s", error)
                answer, kept = None, False
                time.sleep(0.2)
            if lost := patience.is_lost():
                self.lost = lost
                return [], False
            self._watch.pause(1.0)

    def _pass(self, item: Item) -> None:
        self._alive = True
        if isinstance(item, Beat):
            self._watch.hear(item)
        elif isinstance(item, tuple):
            logger.log(*item)
        elif item != SIGN_OF_LIFE and self._on_report is not None:
            self._on_report(item)  # type: ignore[arg-type]  # metrics: all that is left

    def _end_overdue(self) -> None:
        """Ends a worker that stands, which Ray then replaces; what was ended is said."""
        if found := self._watch.overdue():
            beat, why = found
            there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
            ended = ray.remote(num_cpus=0, max_retries=0)(end_process).options(scheduling_strategy=there).remote(beat.pid)
            self._ending.append((ended, f"worker {beat.rank} (process {beat.pid} on {beat.host}) {why}"))
        for entry in list(self._ending):
            ended, text = entry
            if not ray.wait([ended], timeout=0)[0]:
                continue
            self._ending.remove(entry)
            try:
                if ray.get(ended):
                    logger.warning("%s: it is ended, and the run restarts from its last checkpoint", text)
            except ray.exceptions.RayError:  # Ray replaces the worker by itself
                logger.warning("%s; its machine is gone", text)
