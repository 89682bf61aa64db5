"""Teach an open model something new from conversations: `mixtral-lab finetune --help`.

The data is a JSONL file in the format of Mistral's fine-tuning: on every line `{"messages": [{"role", "content"}, ...]}`, where
an assistant's message may have a `weight` of 0 (read, but not learned) or 1. All of it is checked before training begins.
The model's weights stay as they are; a low-rank adapter (`lora.py`) learns beside them, from the assistant's words alone.

A run lives in its own folder: the best adapter so far in peft's layout, `log.jsonl` (a line per step), `run.json` (what
was asked for) and `state.safetensors` (what `resume` goes on from, to the same result as an uninterrupted run).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm

from mixtral_lab import bundled
from mixtral_lab.checkpoint import CheckpointError, open_checkpoint, stored_dtype, write_json
from mixtral_lab.config import LabError
from mixtral_lab.lab import Lab, load
from mixtral_lab.lora import (
    Adapter,
    LoRA,
    attached,
    base_of,
    new_adapter,
    save_adapter,
    with_tensors,
)
from mixtral_lab.model import Transformer
from mixtral_lab.tokenizer import MISTRAL_FILES, BPETokenizer, Tokenizer, TokenizerError
from mixtral_lab.train.saved_state import STATE, load_state, save_state
from mixtral_lab.upcycled import is_upcycled
from mixtral_lab.weights import save_model

MOST_PROBLEMS = 20  # so many are listed; of the others their number
ROLES = ("system", "user", "assistant")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
RUN, LOG = "run.json", "log.jsonl"


class DataError(LabError, ValueError):
    """A file of conversations cannot be learned from. `problems` has the line and a sentence for each reason."""

    def __init__(self, message: str, problems: Sequence[tuple[int, str]] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class FineTuningError(LabError):
    """A run cannot begin or go on; the message says why, and what to do."""


class Example(NamedTuple):
    """One conversation as token ids, and which of them the assistant wrote and the model shall learn to write."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]


# --- Data -----------------------------------------------------------------------------------------


def read_conversations(path: str | Path, tokenizer: Tokenizer, longest: int) -> list[Example]:
    """Read and check a whole JSONL file; empty lines are passed over.

    Raises `DataError` with every line that cannot be used (up to 20 are named), or if the file is missing or empty.
    """
    path = Path(path)
    _check_speaks(tokenizer)
    examples, problems = [], []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(tqdm(file, desc=f"reading {path.name}", unit=" lines", delay=2), start=1):
                if not line.strip():
                    continue
                try:
                    examples.append(_example(_record(line, number), tokenizer, longest))
                except DataError as error:
                    problems.append((number, str(error)))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    if problems:
        raise DataError(_listed(path, problems), problems)
    if not examples:
        raise DataError(f"{path} holds no conversation: every line should be one, as JSON.")
    return examples


def as_examples(
    conversations: Iterable[Sequence[Mapping[str, Any]]], tokenizer: Tokenizer, longest: int
) -> list[Example]:
    """The same for conversations that are in memory. Raises `DataError`; conversations are counted from 1."""
    _check_speaks(tokenizer)
    examples, problems = [], []
    for number, messages in enumerate(conversations, start=1):
        try:
            examples.append(_example({"messages": messages}, tokenizer, longest))
        except DataError as error:
            problems.append((number, str(error)))
    if problems:
        raise DataError(_listed("The data", problems, "conversation"), problems)
    if not examples:
        raise DataError("There is no conversation to learn from.")
    return examples


def _check_speaks(tokenizer: Tokenizer) -> None:
    """Raises `TokenizerError` if it has no chat format: once, not for every line."""
    tokenizer.chat_training_ids([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def _listed(source: object, problems: Sequence[tuple[int, str]], unit: str = "line") -> str:
    some = "a problem" if len(problems) == 1 else f"problems in {len(problems)} {unit}s"
    lines = [f"  {unit} {number}: {sentence}" for number, sentence in problems[:MOST_PROBLEMS]]
    if len(problems) > MOST_PROBLEMS:
        lines.append(f"  and {len(problems) - MOST_PROBLEMS} more.")
    return "\n".join([f"{source} has {some}; nothing was trained.", *lines])


def _record(line: bytes, number: int) -> dict[str, Any]:
    try:
        text = line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"It is not UTF-8: byte {error.start + 1} of the line cannot be read.") from None
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"It is not JSON: {error.msg} at character {error.colno}.") from None
    except (RecursionError, ValueError):
        raise DataError("It is not JSON that can be read: brackets too deep, or a number too long.") from None
    if not isinstance(record, dict):
        raise DataError(f'It is a {_kind(record)}, but {{"messages": [...]}} was expected.')
    return record


def _kind(value: object) -> str:
    return {list: "list", dict: "record", str: "text", type(None): "null", bool: "true or false"}.get(
        type(value), "number"
    )


def _example(record: Mapping[str, Any], tokenizer: Tokenizer, longest: int) -> Example:
    if "messages" not in record:
        raise DataError(f'It has no "messages"; it has {", ".join(map(repr, record)) or "nothing"}.')
    if record.get("tools"):
        raise DataError('It has "tools", which cannot be learned here: leave tool calls out.')
    messages = record["messages"]
    if not isinstance(messages, (list, tuple)):
        raise DataError(f'"messages" is a {_kind(messages)}, but a list was expected.')
    for number, message in enumerate(messages, start=1):
        _check_message(number, message)
    try:
        ids, learned = tokenizer.chat_training_ids(messages)
    except TokenizerError as error:
        raise DataError(str(error)) from None
    if len(ids) > longest:
        raise DataError(f"It has {len(ids)} tokens, but a conversation may have {longest}: shorten or split it.")
    weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
    learned = _weighted(learned, weights)
    if not any(learned):
        raise DataError("Every message of the assistant has weight 0: there is nothing to learn.")
    return Example(tuple(ids), tuple(learned))


def _check_message(number: int, message: object) -> None:
    """What is wrong with one message in itself; the order is the tokenizer's to judge."""
    if not isinstance(message, Mapping):
        raise DataError(f'Message {number} is a {_kind(message)}, but a record with "role" and "content" was expected.')
    for key in ("role", "content"):
        if key not in message and not message.get("tool_calls"):
            raise DataError(f'Message {number} has no "{key}".')
    role, content, weight = message.get("role"), message.get("content"), message.get("weight")
    if role == "tool" or message.get("tool_calls"):
        raise DataError(f"Message {number} is about tools, which cannot be learned here: leave tool calls out.")
    if role not in ROLES:
        raise DataError(f"Message {number} is by {role!r}, but a role is one of {', '.join(ROLES)}.")
    if not isinstance(content, str):
        raise DataError(f"Message {number} has a {_kind(content)} as content, but a text was expected.")
    if any("\ud800" <= letter <= "\udfff" for letter in content):
        raise DataError(f"Message {number} holds half a surrogate pair (\\ud800 to \\udfff), which UTF-8 cannot hold.")
    if role == "assistant" and not content.strip():
        raise DataError(f"Message {number} is an empty answer: the assistant must say something.")
    if weight is not None and role != "assistant":
        raise DataError(f"Message {number} has a weight, but only the assistant's messages are learned.")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f"Message {number} has weight {weight!r}, but 0 (not learned) or 1 was expected.")


def _weighted(learned: Sequence[bool], weights: Sequence[Any]) -> list[bool]:
    """`learned` without the answers of weight 0; an answer is an unbroken row of learned tokens."""
    answer, found, before = -1, [], False
    for now in learned:
        answer += now and not before
        found.append(now and weights[answer] != 0)
        before = now
    return found


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Deal out conversations: the larger part to learn from, `share` of them (at least one) held out.

    A conversation that stands there several times is dealt out once: what is held out is never learned. Raises
    `DataError` if nothing would be left to learn from.
    """
    if not 0 < share < 1:
        raise DataError(f"A share of {share} cannot be held out: it must lie between 0 and 1.")
    different = list(dict.fromkeys(examples))
    order = np.random.default_rng((seed, 1)).permutation(len(different)).tolist()
    n = max(1, round(share * len(different)))
    if n >= len(different):
        raise DataError(
            f"Of {len(different)} different conversation{'s' * (len(different) > 1)}, {n} would be held out and none learned: "
            "give more."
        )
    held_out = dict.fromkeys(different[i] for i in sorted(order[:n]))
    return [example for example in examples if example not in held_out], list(held_out)


# --- The loop -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a run learns. Raises `FineTuningError` for numbers that cannot be."""

    epochs: int = 3
    batch_size: int = 8  # conversations read at once
    accumulate: int = 1  # so many times, before each step
    lr: float = 1e-3  # at its highest; it rises over the first 5 % of the steps, then falls along a cosine to 0
    weight_decay: float = 0.0
    clip: float = 1.0  # the longest gradient
    evaluate_every: int | None = None  # steps; None: after every epoch
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = {"seed": 0, "weight_decay": 0, "lr": 0, "clip": 0}.get(name, 1)
            above = name in ("lr", "clip")
            if value is not None and not (value > least if above else value >= least):
                raise FineTuningError(f"{name} is {value}, but it must be {'above' if above else 'at least'} {least}.")
        if self.lr == math.inf:
            raise FineTuningError("lr is infinite: it must be a number.")


class Finetuned(NamedTuple):
    """What came of a run. Losses are nats per learned token on the held-out conversations."""

    folder: Path
    step: int
    steps: int
    loss_before: float
    best_loss: float
    best_step: int

    @property
    def finished(self) -> bool:
        return self.step == self.steps


def token_losses(
    model: Transformer, ids: Int[Tensor, "batch seq"], learned: Bool[Tensor, "batch seq"]
) -> Float[Tensor, " token"]:
    """Nats of every learned token, given all before it: `-log p(token)`, in float32 whatever the model's dtype."""
    chosen = learned[:, 1:]
    logits = model(ids)[:, :-1][chosen]
    return F.cross_entropy(logits.float(), ids[:, 1:][chosen], reduction="none")


def padded(
    examples: Sequence[Example], pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Conversations as rows, filled up on the right. No token looks to its right, so what stands there changes nothing."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_id)
    learned = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        learned[row, : len(example.ids)] = torch.tensor(example.learned)
    return ids.to(device), learned.to(device)


@torch.no_grad()
def held_out_loss(lab: Lab, examples: Sequence[Example], batch_size: int = 8) -> float:
    """Nats per learned token, over all examples: 0 if every one was certain."""
    total, count = 0.0, 0
    by_length = sorted(examples, key=lambda example: len(example.ids))
    for start in range(0, len(by_length), batch_size):
        losses = token_losses(
            lab.model, *padded(by_length[start : start + batch_size], lab.tokenizer.pad_id, lab.device)
        )
        total, count = total + losses.double().sum().item(), count + len(losses)
    return total / count


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The rate of step 0, 1, ..., `steps` - 1."""
    rise = max(1, round(0.05 * steps))
    return recipe.lr * min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / steps))


class _State:
    """Everything that changes while a run goes on, and is saved with it."""

    def __init__(self, parameters: dict[str, nn.Parameter], recipe: Recipe) -> None:
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.step, self.seconds = 0, 0.0
        self.loss_before = self.best_loss = math.inf
        self.best_step = 0

    def save(self, folder: Path) -> None:
        numbers = (self.loss_before, self.best_loss, self.seconds)
        meta = {"step": str(self.step), "best_step": str(self.best_step)}
        meta |= dict(zip(("loss_before", "best_loss", "seconds"), map(float.hex, numbers), strict=True))
        save_state(folder, self.parameters, self.optimizer, meta)

    def load(self, folder: Path) -> None:
        """Raises `FineTuningError` for a state that is not of this run."""
        try:
            self._load(folder)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FineTuningError(f"{folder / STATE} is damaged, or not of this run: {error}.") from None

    def _load(self, folder: Path) -> None:
        meta = load_state(folder, self.parameters, self.optimizer)
        self.step, self.best_step = int(meta["step"]), int(meta["best_step"])
        numbers = (float.fromhex(meta[key]) for key in ("loss_before", "best_loss", "seconds"))
        self.loss_before, self.best_loss, self.seconds = numbers


def finetune(
    lab: Lab,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    folder: str | Path,
    settings: LoRA | None = None,
    recipe: Recipe | None = None,
    base: str | None = None,
    resume: bool = False,
) -> Finetuned:
    """Train an adapter on the examples, and keep the one with the lowest loss on those held out.

    `settings` and `recipe` are `LoRA()` and `Recipe()` if not given; `base` is the name or path of the model that the adapter
    is for (`lab.source`, if not given). The lab's model computes as before when this returns. Ctrl-C ends the run after the step
    at hand and saves it; `resume=True` goes on from there. On a CPU with as many threads, the result is then
    the same bit for bit. Raises `FineTuningError` if the folder holds anything but this very run, or if the loss stops
    being a number; `AdapterError` if the model cannot take the adapter.
    """
    settings, recipe, folder = settings or LoRA(), recipe or Recipe(), Path(folder)
    base = base or lab.source
    if base is None:
        raise FineTuningError(
            f"No file holds {lab.name} as it is: merge its adapter first (mixtral-lab merge), or say as `base` which model "
            "the new adapter is for."
        )
    asked = {
        "model": base,
        "shape": asdict(lab.config),
        "dtype": lab.dtype,
        "norms": _digest(
            p.detach().float().cpu().numpy() for name, p in lab.model.named_parameters() if "norm" in name
        ),
        "lora": asdict(settings) | {"parts": list(settings.parts)},
        "recipe": asdict(recipe),
        "examples": _digest(np.array([*example.ids, *example.learned]) for example in examples),
        "held_out": _digest(np.array([*example.ids, *example.learned]) for example in held_out),
    }
    if not examples or not held_out:
        raise DataError("There must be conversations to learn from, and others to hold out.")
    going_on = _open_folder(folder, asked, resume)
    adapter = new_adapter(lab.config, settings, recipe.seed)
    parameters = {name: nn.Parameter(tensor.to(lab.device)) for name, tensor in adapter.tensors().items()}
    run = _Run(
        lab, with_tensors(adapter, parameters), _State(parameters, recipe), recipe, examples, held_out, folder, base
    )
    try:
        with attached(lab.model, run.adapter), _asked_to_stop() as stop:
            if going_on:
                run.go_back()
            else:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / RUN, asked)
            return run.go(stop)
    except (OSError, SafetensorError) as error:
        raise FineTuningError(f"The run in {folder} could not be read or written: {error}.") from error


class _Run:
    def __init__(
        self, lab: Lab, adapter: Adapter, state: _State, recipe: Recipe,
        examples: Sequence[Example], held_out: Sequence[Example], folder: Path, base: str,
    ) -> None:  # fmt: skip
        self.lab, self.adapter, self.state, self.recipe = lab, adapter, state, recipe
        self.examples, self.held_out, self.folder, self.base = examples, held_out, folder, base
        self.per_epoch = math.ceil(len(examples) / (recipe.batch_size * recipe.accumulate))
        self.steps = self.per_epoch * recipe.epochs

    def go(self, stop: threading.Event) -> Finetuned:
        state, every = self.state, self.recipe.evaluate_every or self.per_epoch
        saved = time.monotonic()
        with (self.folder / LOG).open("a", encoding="utf-8") as log, self._bar() as bar:
            if state.step == 0 and math.isinf(state.loss_before):
                self._evaluate(log)
                state.save(self.folder)
            while state.step < self.steps and not stop.is_set():
                begun = time.monotonic()
                report = self._learn()
                state.seconds += time.monotonic() - begun
                _write(log, step=state.step, **report, seconds=round(state.seconds, 2))
                bar.update()
                bar.set_postfix_str(f"loss {report['loss']:.3f}, held out {state.best_loss:.3f} at best")
                at_end = state.step == self.steps
                if state.step % every == 0 or at_end:
                    self._evaluate(log)
                if state.step % every == 0 or at_end or stop.is_set() or time.monotonic() - saved > 60:
                    state.save(self.folder)
                    saved = time.monotonic()
        return Finetuned(self.folder, state.step, self.steps, state.loss_before, state.best_loss, state.best_step)

    def go_back(self) -> None:
        """To where the state was last saved; to the beginning, if the run was ended before that."""
        if (self.folder / STATE).is_file():
            self.state.load(self.folder)
            _shorten(self.folder / LOG, self.state.step)
        else:
            (self.folder / LOG).unlink(missing_ok=True)

    def _bar(self) -> tqdm:
        return tqdm(total=self.steps, initial=self.state.step, unit="step", desc="fine-tuning")

    def _learn(self) -> dict[str, float]:
        """One step: the mean loss over all learned tokens of its conversations, however they are cut into batches."""
        state, recipe = self.state, self.recipe
        rate = learning_rate(recipe, state.step, self.steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        chosen = self._examples_of(state.step)
        count = sum(sum(example.learned[1:]) for example in chosen)
        total = 0.0
        for start in range(0, len(chosen), recipe.batch_size):
            batch = padded(chosen[start : start + recipe.batch_size], self.lab.tokenizer.pad_id, self.lab.device)
            loss = token_losses(self.lab.model, *batch).sum() / count
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise FineTuningError(
                f"At step {state.step + 1} the loss was {total}: nothing can be learned from there. Take a lower learning "
                f"rate (--lr) in another folder; the best adapter so far, of step {state.best_step}, is in {self.folder}."
            )
        norm = torch.nn.utils.clip_grad_norm_(list(state.parameters.values()), recipe.clip)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        return {"loss": total, "lr": rate, "grad_norm": norm.item(), "tokens": count}

    def _examples_of(self, step: int) -> list[Example]:
        """The conversations of a step, long ones last: drawn without return in every epoch, the same for a seed and a step."""
        epoch, place = divmod(step, self.per_epoch)
        order = np.random.default_rng((self.recipe.seed, 2, epoch)).permutation(len(self.examples))
        size = self.recipe.batch_size * self.recipe.accumulate
        chosen = [self.examples[i] for i in order[place * size : (place + 1) * size].tolist()]
        return sorted(chosen, key=lambda example: len(example.ids))

    def _evaluate(self, log: Any) -> None:
        """Measure the held-out loss; keep the adapter if it is the best so far."""
        state = self.state
        lost = held_out_loss(self.lab, self.held_out, self.recipe.batch_size)
        if state.step == 0:
            state.loss_before = lost
        if lost < state.best_loss:
            state.best_loss, state.best_step = lost, state.step
            save_adapter(self.adapter, self.folder, self.base)
        _write(log, step=state.step, held_out=lost, best=state.best_step == state.step)


def _write(log: Any, **entry: object) -> None:
    log.write(json.dumps(entry) + "\n")
    log.flush()


def _shorten(log: Path, step: int) -> None:
    """Take out what was logged after the state was saved: those steps are done again."""
    kept = []
    for line in log.read_text("utf-8").splitlines(keepends=True) if log.is_file() else []:
        if line.endswith("\n") and json.loads(line)["step"] <= step:  # the last may have been cut short
            kept.append(line)
    partial = log.with_name(f"{log.name}.partial")
    partial.write_text("".join(kept), "utf-8")
    partial.replace(log)


def _digest(arrays: Iterable[np.ndarray]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def save_merged(adapter: str | Path, folder: str | Path, model: str | None = None, dtype: str = "stored") -> Path:
    """Write the model with the adapter merged into it as an ordinary Hugging Face folder, tokenizer included.

    `model` is the one that the adapter names, if not given. "stored" keeps the dtype of the model's files; float32 keeps the
    smallest change. Raises `AdapterError` and `CheckpointError` for files that do not fit or a folder that is not free.
    """
    model = model or base_of(adapter)
    folder, where = Path(folder).absolute(), Path(model).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is there already: take a new folder for the merged model.")
    if not where.exists() and model in bundled.MODELS:
        where = bundled.folder(model)
    files = where.exists() and not is_upcycled(where)  # else it is put together on load, in bfloat16's fineness
    if dtype == "stored":
        dtype = str(stored_dtype(open_checkpoint(where))).removeprefix("torch.") if files else "bfloat16"
    lab = load(where if files else model, device="cpu", dtype=dtype, adapter=adapter)
    tokenizer = lab.tokenizer
    save_model(lab.model, folder, bos=tokenizer.bos_id, eos=tokenizer.eos_id, pad=tokenizer.pad_id)
    try:
        if files and where.is_dir():
            for name in (*MISTRAL_FILES, *TOKENIZER_FILES):
                if (where / name).is_file():
                    shutil.copyfile(where / name, folder / name)
        elif isinstance(tokenizer, BPETokenizer):
            tokenizer.save(folder)
    except OSError as error:
        raise CheckpointError(f"The tokenizer could not be written to {folder}: {error}.") from error
    return folder


def check_folder(folder: str | Path, resume: bool = False) -> None:
    """Raises `FineTuningError` unless a run may begin (or, with `resume`, go on) there. For asking before a model is loaded."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FineTuningError(f"{folder} is a file, not a folder to keep a run in.")
    ours = (folder / RUN).is_file()
    if resume and not ours:
        raise FineTuningError(f"{folder} holds no run to go on with: begin one without --resume.")
    if ours and not resume:
        raise FineTuningError(f"{folder} holds a run already: go on with it (--resume), or take another folder.")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise FineTuningError(f"{folder} holds other files, and a run must not mix with them: take a new folder.")


def _open_folder(folder: Path, asked: dict[str, Any], resume: bool) -> bool:
    check_folder(folder, resume)
    if not resume:
        return False
    try:
        before = dict(json.loads((folder / RUN).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise FineTuningError(f"{folder / RUN} cannot be read: {error}.") from None
    then, now = _flat(before), _flat(asked)
    changed = [name for name in now if name != "model" and then.get(name) != now[name]]
    if changed:
        told = ", ".join(
            f"{name} {then.get(name)!r} instead of {now[name]!r}"
            if name.startswith(("recipe", "lora", "dtype"))
            else name
            for name in changed
        )
        raise FineTuningError(
            f"The run in {folder} was begun with other settings or data ({told}): give what it had, or take another folder."
        )
    return True


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Records inside a record as `recipe.epochs`."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= {f"{name}.{inner}": it for inner, it in value.items()} if isinstance(value, dict) else {name: value}
    return found


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that is set by Ctrl-C or SIGTERM, so that a step is never cut in half; a second Ctrl-C ends at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread hears signals
        return

    def ask(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
