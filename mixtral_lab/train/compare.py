"""A trained mixture beside its dense parent: `python -m mixtral_lab.train.compare --help`.

Measures, on text held out of training: loss by domain of both on the same tokens, how much the chosen experts tell about the
domain, how evenly they are used; and puts ten questions to both. Prints the tables that `data/README.md` shows.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from jaxtyping import Integer
from torch import Tensor
from tqdm.auto import tqdm

import mixtral_lab
from mixtral_lab.analysis.routing import assignment_counts, domain_information, shuffled_information
from mixtral_lab.config import LabError
from mixtral_lab.lab import Lab
from mixtral_lab.sites import recording
from mixtral_lab.terminal import in_one_sentence
from mixtral_lab.tokenizer import BPETokenizer
from mixtral_lab.train import stream
from mixtral_lab.train.upcycle import Marks, encode, learned
from mixtral_lab.upcycled import parent_file, read_adapter
from mixtral_lab.weights import memory_needed

QUESTIONS = (
    "What is the capital of France?",
    "What is the opposite of hot?",
    "How many days are there in a week?",
    "Name three colours.",
    "Who wrote Romeo and Juliet?",
    "What is water made of?",
    "What do bees make?",
    "Why is the sky blue?",
    "Write one sentence about the sea.",
    "What is the largest planet in our solar system?",
)
CHUNK = 4  # stretches read at once


@dataclass(frozen=True)
class Comparison:
    """Everything measured; losses in nats per token, `information` in bits."""

    parent: str
    mixture: str
    dtype: str
    seconds_to_load: float
    gigabytes: float
    tokens_counted: dict[str, int]
    parent_loss: dict[str, float]
    mixture_loss: dict[str, float]
    information: list[float]  # between domain and expert, per layer
    shuffled: list[list[float]]  # the same with the domains dealt out at random to whole texts: 100 times, per layer
    share: list[list[float]]  # of every layer's assignments, by expert; every domain weighs the same
    answers: list[dict[str, str]]

    @property
    def worse(self) -> list[str]:
        """The domains in which the mixture is worse than its parent."""
        return [domain for domain, loss in self.mixture_loss.items() if loss > self.parent_loss[domain]]


@torch.inference_mode()
def losses(
    lab: Lab, ids: Integer[Tensor, "rows seq_in"], counts: Tensor
) -> tuple[float, Integer[np.ndarray, "rows layer expert"]]:
    """Mean nats over the tokens that count, and each text's assignments by layer and expert (none for a dense model)."""
    total, assigned = 0.0, []
    experts = ["layers.*.router.experts"] if lab.config.n_experts else []
    for part, counted in zip(ids.split(CHUNK), counts.split(CHUNK), strict=True):
        with recording(lab.model, experts) as recorder:
            logits = lab.model(part[:, :-1].to(lab.device))
        wanted = part[:, 1:][counted].to(lab.device)
        total += F.cross_entropy(logits[counted.to(lab.device)].float(), wanted, reduction="sum").item()
        for row in range(len(part) if experts else 0):
            chosen = torch.stack(list(recorder.values(row).values())).cpu().numpy().astype(np.int64)
            assigned.append(assignment_counts(chosen, lab.config.n_experts or 1))
    nothing = np.zeros((len(ids), lab.config.n_layers, 1), np.int64)
    return total / int(counts.sum()), np.stack(assigned) if assigned else nothing


def compare(parent: Lab, mixture: Lab, held_out: stream.Tokens, rows: int, seq: int, seconds: float) -> Comparison:
    """Read `rows` stretches of `seq` held-out tokens of every domain with both, and ask both the questions."""
    if not isinstance(mixture.tokenizer, BPETokenizer):
        raise LabError(f"{mixture.name} has no byte-pair tokenizer, so the corpus cannot be read in its tokens.")
    marks = Marks.of(mixture.tokenizer)
    tokens, loss, parent_loss = {}, {}, {}
    assigned, of_domain = [], []
    for d, domain in enumerate(tqdm(held_out.domains, desc="reading held-out text")):
        ids = held_out.stretches(d, rows, seq)
        counts = learned(ids, torch.full((len(ids),), d), marks)[:, 1:]
        tokens[domain] = int(counts.sum())
        parent_loss[domain], _ = losses(parent, ids, counts)
        loss[domain], found = losses(mixture, ids, counts)
        assigned.append(found)
        of_domain += [domain] * len(found)
    per_text = np.concatenate(assigned)
    table = np.stack([found.sum(0) for found in assigned])  # domain layer expert
    chance = shuffled_information(per_text, of_domain)
    share = (table / table.sum(-1, keepdims=True)).mean(0)
    answers = []
    for question in tqdm(QUESTIONS, desc="asking"):
        said = {
            lab.name: lab.chat([{"role": "user", "content": question}], max_new_tokens=60) for lab in (parent, mixture)
        }
        answers.append({"question": question, "parent": said[parent.name], "mixture": said[mixture.name]})
    return Comparison(
        parent=parent.name,
        mixture=mixture.name,
        dtype=mixture.dtype,
        seconds_to_load=round(seconds, 1),
        gigabytes=round(memory_needed(mixture.config, mixture.dtype) / 1e9, 2),
        tokens_counted=tokens,
        parent_loss={domain: round(x, 4) for domain, x in parent_loss.items()},
        mixture_loss={domain: round(x, 4) for domain, x in loss.items()},
        information=[round(domain_information(table[:, layer]), 4) for layer in range(table.shape[1])],
        shuffled=[[round(float(x), 4) for x in row] for row in chance],
        share=[[round(float(x), 4) for x in row] for row in share],
        answers=answers,
    )


def as_markdown(found: Comparison) -> str:
    """The tables and answers, for a README."""
    lines = ["| domain | tokens | parent | mixture |", "|---|---|---|---|"]
    for domain, loss in found.mixture_loss.items():
        lines.append(f"| {domain} | {found.tokens_counted[domain]:,} | {found.parent_loss[domain]:.2f} | {loss:.2f} |")
    lines += ["", f"Worse than its parent in: {', '.join(found.worse) or 'no domain'}.", ""]
    lines += [
        "| layer | bits between domain and expert | labels shuffled: mean | largest of 100 | share of each expert, % |",
        "|---|---|---|---|---|",
    ]
    rows = zip(found.information, zip(*found.shuffled, strict=True), found.share, strict=True)
    for layer, (bits, chance, share) in enumerate(rows):
        shares = " ".join(f"{100 * x:.0f}" for x in share)
        lines.append(f"| {layer} | {bits:.3f} | {np.mean(chance):.3f} | {max(chance):.3f} | {shares} |")
    lines.append("")
    for answer in found.answers:
        lines += [
            f"> **{answer['question']}**",
            f"> mixture: {answer['mixture']!r}  ",
            f"> parent: {answer['parent']!r}",
            "",
        ]
    return "\n".join(lines)


def main(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")] = Path("data/smolmixtral-adapter"),
    corpus: Annotated[Path, typer.Option(help="Folder that mixtral_lab.train.corpus built.")] = Path("corpus"),
    ids: Annotated[Path, typer.Option(help="The corpus in the parent's tokens; made if it is not there.")] = Path(
        "runs/smolmixtral/ids"
    ),
    rows: Annotated[int, typer.Option(help="Held-out stretches of 256 tokens per domain.")] = 20,
) -> None:
    """Measure an upcycled model beside its parent; write report.json into the adapter's folder, print Markdown."""
    start = time.perf_counter()
    mixture = mixtral_lab.load(adapter, device="cpu", dtype="float32")
    seconds = time.perf_counter() - start
    parent = mixtral_lab.load(parent_file(read_adapter(adapter).record["parent"]), device="cpu", dtype="float32")
    if isinstance(mixture.tokenizer, BPETokenizer):
        encode(corpus, mixture.tokenizer, ids)
    found = compare(parent, mixture, stream.load_tokens(ids, stream.HELD_OUT), rows, 256, seconds)
    partial = adapter / "report.json.partial"
    partial.write_text(json.dumps(asdict(found) | {"worse": found.worse}, indent=1, ensure_ascii=False) + "\n", "utf-8")
    partial.replace(adapter / "report.json")
    print(as_markdown(found))


if __name__ == "__main__":
    typer.run(in_one_sentence(main))
