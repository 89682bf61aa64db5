"""What a job writes, on its way to the client: as one answer, or event by event."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mixtral_lab.serve.protocol import (
    AssistantMessage,
    ChatAnswer,
    ChatChoice,
    Generation,
    Refused,
    TextAnswer,
    TextChoice,
    Usage,
)
from mixtral_lab.serve.worker import End, Failed, Job, Text

T = TypeVar("T")


@dataclass(frozen=True)
class Style:
    """How an endpoint dresses its texts."""

    prefix: str  # of the answer's id
    chunk: str  # `object` of an event
    message: bool  # a message by the assistant, or a bare text
    trim: bool  # as `Lab.chat` does


CHAT = Style("chatcmpl", "chat.completion.chunk", message=True, trim=True)
FILL_IN = Style("fim", "chat.completion.chunk", message=True, trim=False)
TEXT = Style("cmpl", "text_completion", message=False, trim=False)


class ClientLeft(Exception):
    """Nobody is there to be answered."""


class Trim:
    """`str.strip` for a text that comes in pieces."""

    def __init__(self) -> None:
        self._begun, self._held = False, ""

    def feed(self, text: str) -> str:
        text = self._held + text
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        kept = text.rstrip()
        self._held = text[len(kept) :]
        return kept


class Reply:
    """The answer to one request while it is written."""

    def __init__(self, model: str, body: Generation, job: Job, style: Style) -> None:
        self._model, self._body, self._job, self._style = model, body, job, style
        self._id, self._created = f"{style.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._trims = [Trim() if style.trim else None for _ in job.prompts]
        self._texts = ["" for _ in job.prompts]
        self._ends: dict[int, End] = {}

    async def pieces(self) -> AsyncIterator[tuple[int, str, End | None]]:
        """New text by row, and at last each row's end. Raises `Refused` if the model fails."""
        while len(self._ends) < len(self._job.prompts):
            event = await self._job.events.get()
            if isinstance(event, Failed):
                raise Refused(500, event.why, "generation_failed", kind="server_error")
            if isinstance(event, End):
                self._ends[event.row] = event
                yield event.row, "", event
            elif isinstance(event, Text):
                trim = self._trims[event.row]
                text = event.text if trim is None else trim.feed(event.text)
                self._texts[event.row] += text
                if text:
                    yield event.row, text, None

    async def listen(self) -> None:
        """Wait until all is written."""
        async for _ in self.pieces():
            pass

    def whole(self) -> dict[str, Any]:
        """The answer, once it is there."""
        body, prompt = self._body, self._job.prompts[0]
        choices: list[dict[str, Any]] = []
        for row, end in sorted(self._ends.items()):
            choice: dict[str, Any] = {"index": row, "finish_reason": end.reason}
            if body.return_token_ids:
                choice["token_ids"] = end.ids
            if end.experts is not None:
                choice["routed_experts"] = end.experts[len(prompt) :].tolist()
            choices.append(choice)
        answer: dict[str, Any] = {
            "id": self._id, "created": self._created, "model": self._model, "usage": self._usage(),
        }  # fmt: skip
        first = self._ends[0]
        if first.experts is not None:
            answer["prompt_routed_experts"] = first.experts[: len(prompt)].tolist()
        if not self._style.message:
            for choice, ids, text in zip(choices, self._job.prompts, self._texts, strict=True):
                choice |= {"text": text} | ({"prompt_token_ids": ids} if body.return_token_ids else {})
            return TextAnswer(choices=[TextChoice(**choice) for choice in choices], **answer).model_dump(
                exclude_none=True
            )
        if body.return_token_ids:
            answer["prompt_token_ids"] = prompt
        messages = [AssistantMessage(content=text) for text in self._texts]
        made = [ChatChoice(message=message, **choice) for message, choice in zip(messages, choices, strict=True)]
        return ChatAnswer(choices=made, **answer).model_dump(exclude_none=True)

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events; the last one with content has the usage, and `[DONE]` follows it."""
        try:
            if self._style.message:
                for row in range(len(self._job.prompts)):
                    yield self._event(row, {"role": "assistant", "content": ""})
            async for row, text, end in self.pieces():
                yield self._event(row, {"content": text}, end)
        except Refused as error:  # too late for another status
            form = error.form.model_dump(exclude_none=True)
            yield _sse(form | {"error": form})  # OpenAI's client looks for "error"
            return
        yield "data: [DONE]\n\n"

    def _event(self, row: int, delta: dict[str, str], end: End | None = None) -> str:
        choice: dict[str, Any] = {"index": row, "finish_reason": None if end is None else end.reason}
        choice |= {"delta": delta} if self._style.message else {"text": delta["content"]}
        chunk = {"id": self._id, "object": self._style.chunk, "created": self._created, "model": self._model}
        more: dict[str, Any] = {}
        if end is not None and self._body.return_token_ids:
            choice["token_ids"] = end.ids
            more["prompt_token_ids"] = self._job.prompts[row]
        if len(self._ends) == len(self._job.prompts):
            more["usage"] = self._usage().model_dump()
        return _sse(chunk | {"choices": [choice]} | more)

    def _usage(self) -> Usage:
        """Tokens read, each prompt once, and tokens written, the end tokens among them."""
        read = sum(map(len, self._job.prompts)) // (self._body.n or 1)
        written = sum(len(end.ids) for end in self._ends.values())
        return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events, with something to be called at the end, even if the client leaves before the first one."""

    def __init__(self, events: AsyncIterator[str], at_the_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._at_the_end = at_the_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_the_end()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, unless the client leaves first: then it is cancelled, and `ClientLeft` raised."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for one in (task, left):
            one.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
