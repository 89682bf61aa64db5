"""Routing that was recorded elsewhere, as serving engines and loggers write it, read into plain arrays.

`Trace.from_vllm`, `Trace.from_sglang` and `Trace.from_jsonl` make traces of them. An engine says who was chosen and
little else: which expert is the best of a token's is taken from the order in which they stand.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer

from mixtral_lab.config import LabError

MOST_EXPERTS = 4096  # a higher id than any model has: the bytes were read in a wrong shape
SUM_ERROR = 0.02  # how far probabilities kept in few bits may be from a sum of 1

Rows = Integer[np.ndarray, "seq layer choice"]  # as engines order the axes


class EngineError(LabError, ValueError):
    """What an engine or a logger wrote is not a record of routing that we can read."""


class Recorded(NamedTuple):
    """What is known of one text from elsewhere; None is what nobody wrote down."""

    experts: Int[np.ndarray, "layer seq choice"]
    weights: Float[np.ndarray, "layer seq choice"] | None
    logits: Float[np.ndarray, "layer seq expert"] | None
    ids: list[int] | None
    n_prompt: int | None
    model: str


def read_vllm(response: object, choice: int = 0, prompt_start: int = 0, ids: Sequence[int] | None = None) -> Recorded:
    """The routed experts of one choice of a vLLM response, from a server with `--enable-return-routed-experts`.

    Both forms are read: the base64 of a `.npy` file for prompt and answer together (0.22 and later), and nested lists,
    the prompt's on the response and the answer's on the choice (around 0.21). `response` is the JSON as a dict, or the
    object of the openai client. Raises `EngineError` for anything else.
    """
    whole = _as_mapping(response, "response")
    choices = whole.get("choices")
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
        raise EngineError(
            f"The response has no choices, but {_keys(whole)}: give what /v1/completions or /v1/chat/completions returned."
        )
    if not 0 <= choice < len(choices):
        raise EngineError(f"There is no choice {choice}: the response has {len(choices)}, numbered from 0.")
    one = _as_mapping(choices[choice], f"choices[{choice}]")
    found = one.get("routed_experts")
    if found is None:
        raise EngineError(
            f"choices[{choice}] has no routed_experts, but {_keys(one)}: start vLLM with --enable-return-routed-experts, and "
            "ask without streaming."
        )
    prompt_ids = _ids(one.get("prompt_token_ids") or whole.get("prompt_token_ids"), "prompt_token_ids")
    new_ids = _ids(one.get("token_ids"), "token_ids")
    n_prompt = len(prompt_ids) if prompt_ids else _prompt_tokens(whole.get("usage"))
    if isinstance(found, str):
        rows = _from_npy(_from_base64(found, "routed_experts"))
        begin = _start(prompt_start, n_prompt)
    else:
        rows, before = _from_lists(found, "routed_experts"), one.get("prompt_routed_experts")
        before = whole.get("prompt_routed_experts") if before is None else before
        if before is None:  # only what was written is known
            begin = n_prompt or 0
        else:
            begin, prompt = _start(prompt_start, n_prompt), _from_lists(before, "prompt_routed_experts")
            if not len(rows):  # one token was written, and never fed back
                rows = prompt
            elif prompt.shape[1:] != rows.shape[1:]:
                raise EngineError(
                    f"The prompt's experts are for {prompt.shape[1]} layers with {prompt.shape[2]} choices, the answer's for "
                    f"{rows.shape[1]} with {rows.shape[2]}: they are not of one run."
                )
            else:
                rows = np.concatenate([prompt, rows])
    if ids is None and prompt_ids and new_ids is not None:
        ids = prompt_ids + new_ids
    return _recorded(rows, ids, n_prompt, begin, str(whole.get("model") or "vLLM"))


def read_sglang(meta_info: object, n_layers: int, k: int, ids: Sequence[int] | None = None) -> Recorded:
    """The routed experts in the `meta_info` of an SGLang answer to a request with `return_routed_experts`.

    They are the base64 of raw 32-bit integers `seq layer choice` without a header, so the caller says how many layers have
    experts and how many `k` of them a token takes. Raises `EngineError` where they do not fit that, or are none.
    """
    info = _as_mapping(meta_info, "meta_info")
    if "routed_experts" not in info and "meta_info" in info:
        raise EngineError('This is the whole answer: give its "meta_info" alone.')
    found = info.get("routed_experts")
    if not isinstance(found, str):
        raise EngineError(
            f"meta_info has no routed_experts in base64, but {_keys(info)}: start SGLang with --enable-return-routed-experts "
            "and send return_routed_experts=True."
        )
    if n_layers < 1 or k < 1:
        raise EngineError(f"n_layers ({n_layers}) and k ({k}) must be 1 or more.")
    data = _from_base64(found, "routed_experts")
    if not data or len(data) % (4 * n_layers * k):
        raise EngineError(
            f"routed_experts has {len(data)} bytes, which is no whole number of tokens: with {n_layers} layers and {k} choices "
            f"each takes {4 * n_layers * k}. Were n_layers and k those of the model that answered?"
        )
    rows = np.frombuffer(data, "<i4").reshape(-1, n_layers, k)
    n_prompt, written = _prompt_tokens(info), info.get("completion_tokens")
    if ids is None and n_prompt is not None and isinstance(written, int) and not isinstance(written, bool):
        _check_rows(len(rows), n_prompt + written, "")
    return _recorded(rows, ids, n_prompt, 0, "SGLang")


def read_jsonl(lines: Iterable[str], ids: Sequence[int] | None = None) -> Recorded:
    """JSON lines `{"layer": 0, "token_idx": 0, "experts": [3, 5], "gating_probs": [0.6, 0.2]}` of one text, in any order.

    `gating_probs` may be left out (of all lines); they belong to the chosen experts, or, if there are more of them, to all
    experts of the layer. The weights are theirs, divided by their sum, as Mixtral does it; choices are then put in order
    of weight. Of probabilities of all experts, the logarithms stand for the logits, which they equal but for one number
    per token. Other keys are left aside. Raises `EngineError`, with the number of the line, for anything else, and
    unless there is one line for every layer and token from 0 on.
    """
    found: dict[tuple[int, int], tuple[int, list[int], list[float] | None]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        layer, token, experts, probabilities = _record(line, number)
        if (layer, token) in found:
            raise EngineError(
                f"Line {number} tells of layer {layer}, token {token} again, after line {found[layer, token][0]}: "
                "give the lines of one text alone."
            )
        found[layer, token] = (number, experts, probabilities)
    if not found:
        raise EngineError("There is no line with a record.")
    layers, seq = (max(place[axis] for place in found) + 1 for axis in (0, 1))
    if len(found) < layers * seq:
        layer, token = next((at, t) for at in range(layers) for t in range(seq) if (at, t) not in found)
        raise EngineError(
            f"There are {len(found)} records for {layers} layers and {seq} tokens, which need {layers * seq}: "
            f"layer {layer}, token {token} is missing. Number layers with experts, and tokens, from 0 on."
        )
    ordered = [found[layer, token] for layer in range(layers) for token in range(seq)]
    first, k, n_probabilities = ordered[0][0], len(ordered[0][1]), len(ordered[0][2] or ())
    for number, experts, probabilities in ordered:
        if (len(experts), len(probabilities or ())) != (k, n_probabilities):
            raise EngineError(
                f"Line {number} has {len(experts)} experts and {len(probabilities or ())} gating_probs, but line {first} "
                f"has {k} and {n_probabilities}: all must have as many."
            )
    chosen = np.array([experts for _, experts, _ in ordered], np.int64).reshape(layers, seq, k)
    weights = logits = None
    if n_probabilities:
        given = np.array([probabilities for _, _, probabilities in ordered]).reshape(layers, seq, -1)
        if n_probabilities > k:
            if chosen.max() >= n_probabilities:
                raise EngineError(f"Expert {chosen.max()} was chosen, but there are gating_probs of {n_probabilities}.")
            with np.errstate(divide="ignore"):
                logits = np.log(given).astype(np.float32)
            given = np.take_along_axis(given, chosen, axis=-1)
        if not given.sum(-1).all():
            raise EngineError("A token's chosen experts all have probability 0, so its weights are unknown.")
        order = np.argsort(-given, axis=-1, kind="stable")
        chosen, given = np.take_along_axis(chosen, order, axis=-1), np.take_along_axis(given, order, axis=-1)
        weights = (given / given.sum(-1, keepdims=True)).astype(np.float32)
    rows = chosen.transpose(1, 0, 2)
    return _recorded(rows, ids, None, 0, "JSON lines")._replace(weights=weights, logits=logits)


def _record(line: str, number: int) -> tuple[int, int, list[int], list[float] | None]:
    """Layer, token, experts and probabilities of one line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise EngineError(f"Line {number} is not JSON: {line.strip()[:80]!r}.") from None
    if not isinstance(record, dict):
        raise EngineError(f"Line {number} is not a record with layer, token_idx and experts: {line.strip()[:80]!r}.")
    for key in ("layer", "token_idx", "experts"):
        if key not in record:
            raise EngineError(f"Line {number} has no {key}, but {_keys(record)}.")
    layer, token = record["layer"], record["token_idx"]
    for key, value in (("layer", layer), ("token_idx", token)):
        if not _is_id(value):
            raise EngineError(f"Line {number}: {key} is {value!r}, not a whole number from 0 on.")
    experts, probabilities = record["experts"], record.get("gating_probs")
    if not isinstance(experts, list) or not experts or not all(_is_id(expert) for expert in experts):
        raise EngineError(f"Line {number}: experts are {experts!r}, not a list of whole numbers from 0 on.")
    if probabilities is None:
        return layer, token, experts, None
    if not isinstance(probabilities, list) or not all(
        isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p < 1e9 for p in probabilities
    ):
        raise EngineError(f"Line {number}: gating_probs are {probabilities!r}, not a list of probabilities.")
    if len(probabilities) < len(experts):
        raise EngineError(f"Line {number} has {len(experts)} experts but {len(probabilities)} gating_probs.")
    total = sum(probabilities)
    if total > 1 + SUM_ERROR or (len(probabilities) > len(experts) and total < 1 - SUM_ERROR):
        raise EngineError(f"Line {number}: gating_probs sum to {total:.3g}, so they are no probabilities.")
    return layer, token, experts, [float(p) for p in probabilities]


def _recorded(rows: Rows, ids: Sequence[int] | None, n_prompt: int | None, start: int, model: str) -> Recorded:
    """Check `rows`, which begin at token `start` of the text, against the text, and put the axes in our order.

    The last token written may have no row: it was never fed back, so nothing is known of it, and its id is left out.
    """
    seq, layers, k = rows.shape
    if not rows.size:
        raise EngineError(f"routed_experts are of {seq} tokens, {layers} layers and {k} choices: none may be 0.")
    if (rows < 0).any() or (rows >= MOST_EXPERTS).any():
        wrong = rows.min() if (rows < 0).any() else rows.max()
        raise EngineError(f"{wrong} is no expert: were layers and choices those of the model that answered?")
    ordered = np.sort(rows, axis=-1)
    token, layer = np.nonzero((ordered[..., 1:] == ordered[..., :-1]).any(-1))
    if len(token):
        raise EngineError(
            f"Token {token[0]} chose {rows[token[0], layer[0]].tolist()} in layer {layer[0]}, one expert twice: "
            "were layers and choices those of the model that answered?"
        )
    if ids is not None:
        ids = _ids(ids, "ids") or []
        _check_rows(seq, len(ids), f" from token {start} on" if start else "", start)
        ids = ids[start : start + seq]
    if n_prompt is not None:
        n_prompt = max(n_prompt - start, 0)
        if n_prompt > seq:
            raise EngineError(f"The prompt has {n_prompt} tokens, but the experts of {seq} tokens were recorded.")
    return Recorded(
        np.ascontiguousarray(rows.transpose(1, 0, 2)).astype(np.int64),
        weights=None, logits=None, ids=ids, n_prompt=n_prompt, model=model,
    )  # fmt: skip


def _check_rows(rows: int, tokens: int, where: str, start: int = 0) -> None:
    if rows not in (tokens - start, tokens - start - 1):
        raise EngineError(
            f"The experts of {rows} tokens{where} were recorded, but the text has {tokens} tokens: they must be as many, or one "
            "fewer (the last one written is never fed back)."
        )


def _start(prompt_start: int, n_prompt: int | None) -> int:
    """The token that the first row is about, where the request set `routed_experts_prompt_start`."""
    if prompt_start < 0 or (n_prompt is not None and prompt_start > n_prompt):
        raise EngineError(f"prompt_start is {prompt_start}, but the prompt's tokens are 0 to {(n_prompt or 1) - 1}.")
    return prompt_start


def _as_mapping(found: object, what: str) -> Mapping[str, Any]:
    """A dict as it is, a client's object as the dict that it was made from."""
    dump = getattr(found, "model_dump", None)
    found = dump() if callable(dump) else found
    if not isinstance(found, Mapping):
        raise EngineError(f"{what} must be the answer's JSON as a dict, but it is {type(found).__name__}.")
    return found


def _keys(found: Mapping[str, Any]) -> str:
    return ", ".join(map(str, found)) or "nothing"


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _ids(found: object, what: str) -> list[int] | None:
    """Token ids as a list, None if there are none to know."""
    if found is None:
        return None
    if not isinstance(found, Sequence) or isinstance(found, str) or not all(_is_id(one) for one in found):
        raise EngineError(f"{what} must be a list of token ids, whole numbers from 0 on.")
    return list(found)


def _prompt_tokens(found: object) -> int | None:
    """`prompt_tokens` of a record of usage, if there is one."""
    n = found.get("prompt_tokens") if isinstance(found, Mapping) else None
    return n if _is_id(n) else None


def _from_base64(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise EngineError(f"{what} is not base64: {error}.") from None


def _from_npy(data: bytes) -> Rows:
    """The array of a `.npy` file of whole numbers. Its header is checked before anything is read: no objects, no pickles."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"its version is {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
    except Exception as error:  # numpy parses the header with whatever errors that brings
        raise EngineError(f"routed_experts is not the base64 of a .npy file: {error}.") from None
    if dtype.kind not in "iu" or len(shape) != 3:
        raise EngineError(
            f"routed_experts must be whole numbers of shape (tokens, layers, choices), but these are {dtype} of shape {shape}."
        )
    left, needed = len(data) - file.tell(), math.prod(shape) * dtype.itemsize
    if min(shape) < 0 or left != needed:
        raise EngineError(
            f"routed_experts has {left} bytes of numbers, but {dtype} of shape {shape} take {needed}: was it cut off?"
        )
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran_order else "C")


def _from_lists(found: object, what: str) -> Rows:
    """Nested lists `seq layer choice` as an array; an empty list is no token."""
    try:
        rows = np.array(found)
    except ValueError:
        raise EngineError(
            f"{what} is ragged: every token must have as many layers, every layer as many choices."
        ) from None
    if rows.shape == (0,):
        return np.zeros((0, 0, 0), np.int64)
    if rows.dtype.kind not in "iu" or rows.ndim != 3:
        raise EngineError(
            f"{what} must be whole numbers nested as tokens, layers, choices, but it is {rows.dtype} of shape {rows.shape}."
        )
    return rows
