"""The one thread that owns the model. Requests wait in line; those being written take turns, one token each.

Taking turns is fair, since a short answer never waits for a long one to end, and it changes no number: every request has
a cache of its own and is written as if it were alone. Reading all of them as one batch would be faster on a GPU, but sums in
another order give other answers where two tokens are nearly as likely.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from mixtral_lab.config import LabError
from mixtral_lab.generate import Sampling, generate_ids
from mixtral_lab.lab import Lab, Writer
from mixtral_lab.sites import recording, resolve
from mixtral_lab.tokenizer import TextStream

log = logging.getLogger(__name__)
COUNTS = ("accepted", "finished", "left", "expired", "turned_away", "failed", "tokens")


@dataclass(frozen=True)
class Limits:
    """How much one server takes on. Raises `LabError` unless all are above 0."""

    active: int = 8  # requests being written, in turns
    waiting: int = 64  # requests in line behind them; one more is turned away (429)
    wait: float = 30.0  # seconds in line before a request is given up (503)
    request_bytes: int = 1_000_000
    prompt_tokens: int = 32_768
    new_tokens: int = 4_096  # that a request may ask for
    texts: int = 16  # that one request may ask for: prompts times `n`

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise LabError(f"The limit {name} is {value}, but it must be above 0.")


class Text(NamedTuple):
    """One token more of one of a job's texts; `text` is empty while a character or a stop string is unfinished."""

    row: int
    text: str


class End(NamedTuple):
    """One of a job's texts is finished: at an end token or a stop string ("stop"), or as long as allowed ("length")."""

    row: int
    reason: str
    ids: list[int]
    experts: Int[Tensor, "seq layer choice"] | None  # of prompt and answer, but for the last token, which is never read


class Failed(NamedTuple):
    """Nothing more will come."""

    why: str


Event = Text | End | Failed


class LineFull(LabError):
    """As many requests are waiting as may."""


@dataclass(eq=False)
class Job:
    """One request on its way: what to write, and how to tell the event loop that asked for it."""

    prompts: list[list[int]]
    new_tokens: int
    sampling: Sampling
    stops: list[str]
    with_experts: bool = False
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    ended: int = 0  # of its texts
    over: bool = False  # finished, failed or cancelled: nobody waits for more

    def tell(self, what: Callable[..., object], *args: object) -> None:
        """Call something in the event loop, from the worker's thread."""
        try:
            self.loop.call_soon_threadsafe(what, *args)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            self.over = True


class Worker:
    """Writes what jobs ask for, in a thread of its own, between `start` and `close`."""

    def __init__(self, lab: Lab, limits: Limits) -> None:
        self._lab, self._limits = lab, limits
        self._waiting: deque[Job] = deque()
        self._active: dict[Job, Iterator[list[Event]]] = {}
        self._counts = dict.fromkeys(COUNTS, 0)
        self._closed = True
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="mixtral-lab writer", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job in line. Raises `LineFull`."""
        with self._changed:
            if self._closed:
                raise LineFull("The server is not running.")
            if len(self._waiting) >= self._limits.waiting:
                self._counts["turned_away"] += 1
                raise LineFull(f"{len(self._waiting)} requests are waiting already, as many as may: try again later.")
            self._counts["accepted"] += 1
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job, why: str = "left") -> None:
        """Write no more than the present token of a job. Nothing happens if it is over."""
        with self._changed:
            if job.over:
                return
            job.over = True
            self._counts[why] += 1
            if job in self._waiting:
                self._waiting.remove(job)

    def counts(self) -> dict[str, int]:
        """How many requests are where, and what became of the others; `tokens` is how many were written."""
        with self._changed:
            return {"active": len(self._active), "waiting": len(self._waiting), **self._counts}

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """End the thread after the present token; jobs that are not finished fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while self._next_round():
            for job in list(self._active):
                self._turn(job)
        for job in [*self._active, *self._waiting]:
            self._end(job, "failed", Failed("The server was stopped."))
        self._waiting.clear()

    def _next_round(self) -> bool:
        """Wait until there is something to write; False once the worker is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._active or self._waiting or self._closed)
            while self._waiting and len(self._active) < self._limits.active:
                job = self._waiting.popleft()
                self._active[job] = write(self._lab, job)
                job.tell(job.started.set)
            return not self._closed

    def _turn(self, job: Job) -> None:
        """Write one token more of every text of a job."""
        try:
            events = None if job.over else next(self._active[job], None)
        except Exception as error:  # whatever it is, it ends this request alone
            log.exception("A request could not be written")
            self._end(job, "failed", Failed(f"The model failed while writing: {error}"))
            return
        if events is None:
            self._end(job, "finished")
            return
        with self._changed:
            self._counts["tokens"] += sum(isinstance(event, Text) for event in events)
        job.ended += sum(isinstance(event, End) for event in events)
        if job.ended == len(
            job.prompts
        ):  # before it is told: whoever has heard the end may leave, and has not left early
            self._end(job, "finished")
        for event in events:
            job.tell(job.events.put_nowait, event)

    def _end(self, job: Job, count: str, last: Event | None = None) -> None:
        with self._changed:
            self._active.pop(job, None)
            if not job.over:
                job.over = True
                self._counts[count] += 1
        if last is not None:
            job.tell(job.events.put_nowait, last)
            job.tell(job.started.set)


def write(lab: Lab, job: Job) -> Iterator[list[Event]]:
    """What happens at each step of a job, a token more of every text. Texts end as `Lab.generate`'s do."""
    writers = [Writer(TextStream(lab.tokenizer, continues=True), job.stops) for _ in job.prompts]
    written: list[list[int]] = [[] for _ in job.prompts]
    routed: list[list[Tensor]] = [[] for _ in job.prompts]
    open_rows = set(range(len(job.prompts)))
    config = lab.config
    room = [job.new_tokens if config.window else min(job.new_tokens, config.context - len(ids)) for ids in job.prompts]
    sites = resolve(lab.config, "layers.*.router.experts") if job.with_experts else ()
    steps = generate_ids(lab.model, job.prompts, job.new_tokens, job.sampling, lab.tokenizer.stop_ids)
    while open_rows:
        # Recording ends before the next job's turn: hooks hang on the model, which all jobs share.
        with recording(lab.model, sites) if sites else nullcontext() as recorder:
            new = next(steps)
        events: list[Event] = []
        for row in sorted(open_rows):
            token = new[row]
            assert token is not None  # a row is closed as soon as it ends
            if recorder is not None:
                routed[row].append(torch.stack(list(recorder.values(row).values()), dim=1))
            written[row].append(token)
            text, reason = _read(writers[row], token, lab.tokenizer.stop_ids, len(written[row]) == room[row])
            events.append(Text(row, text))
            if reason is not None:
                open_rows.remove(row)
                events.append(End(row, reason, written[row], torch.cat(routed[row]) if sites else None))
        yield events


def _read(writer: Writer, token: int, stop_ids: Sequence[int], last: bool) -> tuple[str, str | None]:
    """The text that a token brings, and why it is the last one, if it is."""
    text = writer.feed(token)
    if writer.done:
        return text, "stop"
    if token in stop_ids or last:
        return text + writer.flush(), "stop" if token in stop_ids else "length"
    return text, None
