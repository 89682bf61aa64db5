"""What goes over the wire: requests and answers of Mistral's API, which are those of OpenAI's, and its errors.

Fields that nobody here knows are accepted, as clients send many. Those that ask for something which this server cannot do
are refused with a reason (`CANNOT`), never left aside in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from mixtral_lab.config import LabError

# A field, the values that ask for nothing, and why it is refused with any other.
NO_TOOLS = "the model was not trained to call tools"
NO_SHAPE = "tokens are drawn freely, so no form of the answer can be promised"
NO_PENALTY = "tokens are drawn by temperature, top_p and top_k alone"
NO_LOGPROBS = "probabilities are not sent; lab.trace(text, sites=['logits']) records them"
CANNOT: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": ((None, []), NO_TOOLS),
    "tool_choice": ((None, "none", "auto"), NO_TOOLS),
    "functions": ((None, []), NO_TOOLS),
    "function_call": ((None, "none", "auto"), NO_TOOLS),
    "response_format": ((None, {"type": "text"}), NO_SHAPE),
    "presence_penalty": ((None, 0), NO_PENALTY),
    "frequency_penalty": ((None, 0), NO_PENALTY),
    "repetition_penalty": ((None, 1), NO_PENALTY),
    "logit_bias": ((None, {}), NO_PENALTY),
    "min_p": ((None, 0), NO_PENALTY),
    "min_tokens": ((None, 0), "an answer ends where the model ends it"),
    "logprobs": ((None, False), NO_LOGPROBS),
    "top_logprobs": ((None, 0), NO_LOGPROBS),
    "prompt_logprobs": ((None, False), NO_LOGPROBS),
    "top_prompt_logprobs": ((None, 0), NO_LOGPROBS),
    "echo": ((None, False), "only what is written is sent, not the prompt"),
    "suffix": ((None, ""), "text between two others is written by /v1/fim/completions"),
    "best_of": ((None, 1), "answers are not ranked"),
    "guardrails": ((None, []), "there is no moderation here"),
    "safe_prompt": ((None, False), "there is no safety prompt here: send a system message of your own"),
    "prompt_mode": ((None,), "the model has no reasoning mode"),
    "reasoning_effort": ((None, "none"), "the model has no reasoning mode"),
    "modalities": ((None, ["text"]), "the model writes text only"),
    "audio": ((None,), "the model writes text only"),
}

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Prompt = Annotated[str, StringConstraints(min_length=1)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]


class Refused(LabError):
    """A request that gets an error: its HTTP status, and the fields of the API's error form."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.form = ErrorForm(message=message, type=kind, param=param, code=code)


class Request(BaseModel):
    """Types are taken at their word ("5" is no number), fields nobody knows are let through."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Generation(Request):
    """What all requests for text have in common."""

    model: str | None = Field(None, max_length=256, description="Any name: the one model of this server answers.")
    max_tokens: int | None = Field(None, ge=1, description="The longest answer, in tokens; 256 unless given.")
    temperature: float | None = Field(None, ge=0, le=2, description="0, the default, takes the most likely token.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=128, description="How many answers; the i-th is drawn with seed + i.")
    random_seed: Seed | None = Field(None, description="Mistral's name for `seed`.")
    seed: Seed | None = Field(None, description="OpenAI's name for `random_seed`.")
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool | None = None
    return_token_ids: bool | None = Field(None, description="As in vLLM: add `prompt_token_ids` and `token_ids`.")
    return_routed_experts: bool | None = Field(
        None, description="Add `prompt_routed_experts` and `routed_experts`, nested as token, layer, choice."
    )

    @model_validator(mode="after")
    def _one_seed(self) -> Generation:
        if None not in (self.seed, self.random_seed) and self.seed != self.random_seed:
            raise ValueError("seed and random_seed are two names for one number, but two numbers were given")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def refuse_what_cannot_be_done(self) -> None:
        """Raise `Refused` for a field that asks for something this server does not do."""
        for name, value in (self.model_extra or {}).items():
            nothing, why = CANNOT.get(name, ((value,), ""))
            if value not in nothing:
                raise Refused(400, f"{name} is not supported here: {why}.", "unsupported", name)


class TextChunk(Request):
    type: Literal["text"]
    text: str


class Message(Request):
    """One turn of a conversation. A list of texts counts as one, with empty lines between, as in mistral-common."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextChunk]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n\n".join(chunk.text for chunk in self.content)


class ChatRequest(Generation):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="OpenAI's newer name for `max_tokens`.")


class CompletionRequest(Generation):
    prompt: Prompt | TokenIds | Annotated[list[Prompt | TokenIds], Field(min_length=1)]

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        whole = [one for one in self.prompt if not isinstance(one, int)]
        return whole or [[one for one in self.prompt if isinstance(one, int)]]


class FimRequest(Generation):
    prompt: Prompt
    suffix: str | None = None


class EmbeddingRequest(Request):
    model: str | None = Field(None, max_length=256)
    input: str | list[str] | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


Experts = list[list[list[int]]]  # token, layer, choice
Reason = Literal["stop", "length"]


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int
    finish_reason: Reason
    token_ids: list[int] | None = None
    routed_experts: Experts | None = Field(None, description="Of the answer, but for its last token.")


class ChatChoice(Choice):
    message: AssistantMessage


class TextChoice(Choice):
    text: str
    prompt_token_ids: list[int] | None = None


class Answer(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage
    prompt_routed_experts: Experts | None = None


class ChatAnswer(Answer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    prompt_token_ids: list[int] | None = None


class TextAnswer(Answer):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class Capabilities(BaseModel):
    completion_chat: bool
    completion_fim: bool
    function_calling: bool = False
    fine_tuning: bool = False
    vision: bool = False
    classification: bool = False


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    type: Literal["base"] = "base"
    created: int
    owned_by: str = "mixtral-lab"
    name: str
    description: str
    max_context_length: int
    aliases: list[str] = []
    default_model_temperature: float = 0.0
    capabilities: Capabilities


class ModelCards(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Requests being written and in line now; since the start, what became of them and how many tokens were written."""

    status: Literal["ok", "failed"]
    model: str
    active: int
    waiting: int
    accepted: int
    finished: int
    left: int = Field(description="The client went away before the end.")
    expired: int = Field(description="Waited too long in line (503).")
    turned_away: int = Field(description="The line was full (429).")
    failed: int
    tokens: int


class Detail(BaseModel):
    loc: list[str | int]
    msg: str
    type: str


class ErrorForm(BaseModel):
    """The API's error form. `detail` is there where fields of the request are wrong (422)."""

    object: Literal["error"] = "error"
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    detail: list[Detail] | None = None
