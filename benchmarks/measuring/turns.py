"""Trainers that take turns in one process, one optimizer step at a time, each in its own unmodified training loop.

Every trainer runs `trainer.train()` in a thread that rests in `on_step_end`; only the one whose turn it is runs. A turn
goes from one `on_step_end` to the next: logging, the next batch, forward, backward, clipping, optimizer, scheduler.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Semaphore, Thread
from typing import Any, NamedTuple

from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import PrinterCallback, TrainerCallback

_M_ARENA_MAX = -8  # of mallopt
# accelerate keeps one state for all trainers of a process; each of ours gets its own back for its turn.
_SHARED = (PartialState, AcceleratorState, GradientState)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Within this block these variables are set."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class StepCost(NamedTuple):
    """One optimizer step.

    Attributes:
        cpu: CPU seconds of the process.
        wall: seconds on the clock.
        loss: what `training_step` returned.
    """

    cpu: float
    wall: float
    loss: float


def share_one_heap() -> None:
    """Threads of glibc keep freed memory for themselves; with one heap, what one contender frees the next one gets."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # another C library has no such option
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def give_memory_back() -> None:
    """Collects what cycles hold, and returns free memory to the system."""
    gc.collect()
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


class SteppedTrainer:
    """A `transformers.Trainer` that takes a step when told to."""

    def __init__(self, build: Callable[[], Any], environment: Mapping[str, str] | None = None) -> None:
        """Builds the trainer; `build_cpu` is what that took in CPU seconds.

        Args:
            build: makes it.
            environment: variables that are set while it is awake.
        """
        self._environment = dict(environment or {})
        self._states: list[dict[str, Any]] = [{} for _ in _SHARED]
        self._go, self._rested = Semaphore(0), Semaphore(0)
        self._stopped = False
        self._failure: BaseException | None = None
        self._loss = float("nan")
        start = time.process_time()
        with self.awake():
            self.trainer = build()
            self.trainer.add_callback(_Rest(self))
            self.trainer.remove_callback(PrinterCallback)
        self.build_cpu = time.process_time() - start
        self._inner_step = self.trainer.training_step
        self.trainer.training_step = self._training_step
        self._thread = Thread(target=self._run, daemon=True)

    @contextmanager
    def awake(self) -> Iterator[Any]:
        """Within this block accelerate's process-wide state and the environment are this trainer's."""
        for owner, state in zip(_SHARED, self._states):
            owner._shared_state.clear()
            owner._shared_state.update(state)
        try:
            with environment(self._environment):
                yield getattr(self, "trainer", None)
        finally:
            self._states = [dict(owner._shared_state) for owner in _SHARED]

    def step(self) -> StepCost:
        """Runs until the next `on_step_end`. The first call starts the loop, so it costs more than a step."""
        with self.awake():
            cpu, wall = time.process_time(), time.perf_counter()
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._go.release()
            self._rested.acquire()
            cost = StepCost(time.process_time() - cpu, time.perf_counter() - wall, self._loss)
        if self._failure is not None:
            raise RuntimeError(f"a trainer failed: {self._failure!r}") from self._failure
        return cost

    def close(self) -> None:
        """Ends the loop where it rests; nothing is saved."""
        self._stopped = True
        if self._thread.is_alive():
            self._go.release()
            self._thread.join()
        del self.trainer, self._inner_step

    def rest(self) -> None:
        """Called by the training loop: hands the turn back and waits for the next."""
        self._rested.release()
        self._go.acquire()
        if self._stopped:
            raise _Stopped

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = self._inner_step(*args, **kwargs)
        self._loss = float(loss)
        return loss

    def _run(self) -> None:
        try:
            self.trainer.train()
        except _Stopped:
            return
        except BaseException as error:  # the thread that waits for the step reports it
            self._failure = error
        else:
            self._failure = RuntimeError("training ended before it was told to: too few rows for the steps asked for")
        self._rested.release()


class _Stopped(BaseException):
    """Unwinds a training loop; no `except Exception` on the way catches it."""


class _Rest(TrainerCallback):
    def __init__(self, owner: SteppedTrainer) -> None:
        self._owner = owner

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._owner.rest()
