"""The endpoints: read a request, see whether it can be done, put it in line, send what is written."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import fastapi
import torch
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer

from mixtral_lab.generate import Sampling, check_ids
from mixtral_lab.lab import Lab
from mixtral_lab.serve.gate import Gate, answer_errors_in_form
from mixtral_lab.serve.protocol import (
    Capabilities,
    ChatAnswer,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ErrorForm,
    FimRequest,
    Generation,
    Health,
    ModelCard,
    ModelCards,
    Refused,
    TextAnswer,
)
from mixtral_lab.serve.reply import CHAT, FILL_IN, TEXT, ClientLeft, EventStream, Reply, Style, while_connected
from mixtral_lab.serve.worker import Job, Limits, LineFull, Worker
from mixtral_lab.tokenizer import TokenizerError

USUAL_NEW_TOKENS = 256  # as in `Lab.chat`
RETRY_AFTER = {"Retry-After": "2"}  # seconds
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorForm}, "5XX": {"model": ErrorForm}}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The answer; with `stream`, as server-sent events."}
}


def make_app(lab: Lab, limits: Limits | None = None, api_key: str | None = None) -> fastapi.FastAPI:
    """A web application that answers for one model, while its lifespan lasts (any ASGI server sees to that)."""
    limits = limits or Limits()
    worker = Worker(lab, limits)
    card = model_card(lab)

    @asynccontextmanager
    async def life(_app: fastapi.FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.close)

    # FastAPI's own pages of documentation come from a CDN, so there are none: /openapi.json has it all.
    app = fastapi.FastAPI(
        title="mixtral_lab", version=version("mixtral-lab"), docs_url=None, redoc_url=None, lifespan=life,
        responses=ERRORS,
    )  # fmt: skip
    app.add_middleware(Gate, key=api_key, most_bytes=limits.request_bytes)
    answer_errors_in_form(app)
    v1 = fastapi.APIRouter(prefix="/v1", dependencies=[fastapi.Depends(HTTPBearer(auto_error=False))] * bool(api_key))

    @v1.post("/chat/completions", response_model=ChatAnswer, responses=EVENTS)
    async def chat(request: fastapi.Request, body: ChatRequest) -> Response:
        """The assistant's next message."""
        body.refuse_what_cannot_be_done()
        messages = [{"role": message.role, "content": message.text} for message in body.messages]
        ids = await asyncio.to_thread(lab.tokenizer.chat, messages)
        return await answer(request, body, [ids], CHAT, body.max_completion_tokens)

    @v1.post("/completions", response_model=TextAnswer, responses=EVENTS)
    async def completions(request: fastapi.Request, body: CompletionRequest) -> Response:
        """How a text goes on."""
        body.refuse_what_cannot_be_done()
        ids = [
            await asyncio.to_thread(lab.tokenizer.encode, one) if isinstance(one, str) else one for one in body.prompts
        ]
        return await answer(request, body, ids, TEXT)

    @v1.post("/fim/completions", response_model=ChatAnswer, responses=EVENTS)
    async def fill_in(request: fastapi.Request, body: FimRequest) -> Response:
        """The text between a prompt and a suffix, for models whose tokenizer can say so."""
        body.refuse_what_cannot_be_done()
        ids = await asyncio.to_thread(lab.tokenizer.fill_in, body.prompt, body.suffix or "")
        return await answer(request, body, [ids], FILL_IN)

    @v1.post("/embeddings", response_model=None)
    async def embeddings(body: EmbeddingRequest) -> Response:
        """Always refused: the models of this package were trained to write, not to embed."""
        raise Refused(
            400,
            f"{lab.name} was trained to write, and its inner vectors do not measure what texts mean, so it gives no "
            "embeddings. To study the vectors themselves: lab.trace(text, sites=['final_norm']).",
            "unsupported",
        )

    @v1.get("/models")
    async def models() -> ModelCards:
        return ModelCards(data=[card])

    @v1.get("/models/{model_id}")
    async def model(model_id: str) -> ModelCard:
        if model_id != card.id:
            raise Refused(404, f"There is no model {model_id!r} here, only {card.id}.", "model_not_found", "model")
        return card

    @app.get("/health", responses={503: {"model": Health}})
    async def health() -> Response:
        """Whether the server can write, and what it has done so far. Needs no key."""
        found = Health(status="ok" if worker.alive else "failed", model=lab.name, **worker.counts())
        return JSONResponse(found.model_dump(), status_code=200 if worker.alive else 503)

    async def answer(
        request: fastapi.Request,
        body: Generation,
        prompts: list[list[int]],
        style: Style,
        max_completion_tokens: int | None = None,
    ) -> Response:
        job = plan(lab, limits, body, prompts, max_completion_tokens)
        try:
            worker.submit(job)
        except LineFull as error:
            raise Refused(429, str(error), "line_full", kind="rate_limit_error", headers=RETRY_AFTER) from None
        reply = Reply(lab.name, body, job, style)
        try:
            await while_connected(request, started(worker, job, limits.wait))
            if not body.stream:
                await while_connected(request, reply.listen())
        except BaseException as error:
            worker.cancel(job)
            if isinstance(error, ClientLeft):
                return Response(status_code=499)  # nobody reads it
            raise
        if body.stream:
            return EventStream(reply.events(), at_the_end=lambda: worker.cancel(job))
        return JSONResponse(reply.whole())

    app.include_router(v1)
    return app


def model_card(lab: Lab) -> ModelCard:
    config = lab.config
    try:
        lab.tokenizer.chat([{"role": "user", "content": "Hello"}])
        chats = True
    except TokenizerError:
        chats = False
    try:
        lab.tokenizer.fill_in("a", "b")
        fills = True
    except TokenizerError:
        fills = False
    experts = f", {config.n_experts} experts of which a token takes {config.n_choices}" if config.n_experts else ""
    return ModelCard(
        id=lab.name,
        created=int(time.time()),
        name=lab.name,
        description=f"{config.parameters:,} parameters in {config.n_layers} layers{experts}; {lab.dtype} on {lab.device}",
        max_context_length=config.context,
        capabilities=Capabilities(completion_chat=chats, completion_fim=fills),
    )


def plan(lab: Lab, limits: Limits, body: Generation, prompts: list[list[int]], max_tokens: int | None) -> Job:
    """What is to be written, once it is certain that the model and the limits allow it. Raises `LabError`."""
    max_tokens = max_tokens or body.max_tokens
    rows = [ids for ids in prompts for _ in range(body.n or 1)]
    longest = max(map(len, prompts))
    if len(rows) > limits.texts:
        raise Refused(
            400, f"{len(rows)} texts were asked for at once; at most {limits.texts} are allowed.", "too_many", "n"
        )
    if longest > limits.prompt_tokens:
        message = f"The prompt has {longest} tokens; at most {limits.prompt_tokens} are allowed."
        raise Refused(400, message, "prompt_too_long")
    if max_tokens is not None and max_tokens > limits.new_tokens:
        message = f"max_tokens is {max_tokens}; at most {limits.new_tokens} are allowed."
        raise Refused(400, message, "max_tokens_too_high", "max_tokens")
    room = limits.new_tokens if lab.config.window else lab.config.context - longest
    if room < (max_tokens or 1):
        asked = f" and max_tokens is {max_tokens}" if max_tokens else ""
        message = f"The prompt has {longest} tokens{asked}, but the model reads at most {lab.config.context} together."
        raise Refused(400, message, "context_length_exceeded", "max_tokens" if max_tokens else None)
    for ids in prompts:
        check_ids(lab.config, torch.tensor([ids]))
    if body.return_routed_experts:
        _check_routing_can_be_sent(lab, body, len(prompts))
    sampling = Sampling(
        0.0 if body.temperature is None else body.temperature,
        1.0 if body.top_p is None else body.top_p,
        body.top_k,
        body.random_seed if body.seed is None else body.seed,
    )
    new_tokens = max_tokens or min(USUAL_NEW_TOKENS, limits.new_tokens)
    return Job(rows, new_tokens, sampling, body.stops, bool(body.return_routed_experts))


def _check_routing_can_be_sent(lab: Lab, body: Generation, n_prompts: int) -> None:
    why = None
    if lab.config.n_experts is None:
        why = f"{lab.name} is a dense model: every token takes the same way"
    elif body.stream:
        why = "routed experts are not sent in a stream: ask without stream"
    elif n_prompts > 1:
        why = "routed experts are sent for one prompt at a time"
    if why is not None:
        raise Refused(400, f"{why[0].upper()}{why[1:]}.", "unsupported", "return_routed_experts")


async def started(worker: Worker, job: Job, wait: float) -> None:
    """Wait until the worker takes a job up. Raises `Refused` where that takes too long."""
    try:
        async with asyncio.timeout(wait):
            await job.started.wait()
    except TimeoutError:
        worker.cancel(job, "expired")
        message = f"The request waited {wait:g} seconds in line, the limit here: try again later."
        raise Refused(503, message, "waited_too_long", kind="server_error", headers=RETRY_AFTER) from None
