"""What a trained model is worth: `python -m mixtral_lab.train.evaluate --help`.

Measures, on text held out of training: loss per domain beside a bigram model of the same domain, how much the
chosen experts tell about the domain, and how evenly experts are used. Prints the tables that `data/README.md` shows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from jaxtyping import Float, Integer
from tqdm.auto import tqdm

import mixtral_lab
from mixtral_lab.analysis.routing import domain_information
from mixtral_lab.lab import Lab
from mixtral_lab.sites import recording
from mixtral_lab.terminal import in_one_sentence
from mixtral_lab.tokenizer import BPETokenizer
from mixtral_lab.train import stream

PROMPTS = (
    "Once upon a time",
    "def read(",
    "The president said that",
    "Compute 12 + 7.",
    "Au commencement",
    "Im Anfang",
)
QUESTIONS = ("Who are you?", "What is the capital of France?", "What is 3 + 4?")
CHUNK = 8  # stretches read at once


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on held-out text; `routing` parts are empty for a dense model."""

    model: str
    dtype: str
    tokens_per_domain: dict[str, int]
    loss: dict[str, float]  # nats per token
    bigram: dict[str, float]
    bits_per_byte: dict[str, float]
    information: list[float]  # bits between domain and expert, per layer
    shuffled: list[float]  # the same with every token's domain label drawn anew
    largest_share: list[float]  # of any expert's assignments over the even mix, per layer
    smallest_share: list[float]


@torch.inference_mode()
def evaluate(lab: Lab, corpus: Path, rows: int, seq: int = 256) -> Evaluation:
    """Read up to `rows` stretches of `seq` held-out tokens of every domain; a progress bar shows how far it is."""
    held_out = stream.load_tokens(corpus / "ids", stream.HELD_OUT)
    train = stream.load_tokens(corpus / "ids", stream.TRAIN)
    tokens, loss, bigram, bits = {}, {}, {}, {}
    chosen: list[Integer[np.ndarray, "layer token choice"]] = []
    experts = ["layers.*.router.experts"] if lab.config.n_experts else []
    for d, domain in enumerate(tqdm(held_out.domains, desc="reading held-out text")):
        ids = held_out.stretches(d, rows, seq)
        losses = []
        for part in ids.split(CHUNK):
            with recording(lab.model, experts) as recorder:
                logits = lab.model(part[:, :-1].to(lab.device))
            losses.append(F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten().to(lab.device)).item())
            if lab.config.n_experts:
                for row in range(len(part)):
                    chosen.append(torch.stack(list(recorder.values(row).values())).numpy().astype(np.int16))
        sizes = [len(part) for part in ids.split(CHUNK)]
        tokens[domain] = ids[:, 1:].numel()
        loss[domain] = float(np.average(losses, weights=sizes))
        bigram[domain] = stream.bigram_loss(train.ids[d], held_out.ids[d], lab.config.vocab)
        read = sum(len(lab.tokenizer.token_bytes(int(i))) for i in ids[:, 1:].flatten())
        bits[domain] = loss[domain] * tokens[domain] / np.log(2) / read
    label = np.repeat(np.arange(len(tokens)), list(tokens.values()))
    routing_parts = _routing_measures(chosen, label, lab.config.n_experts) if chosen else ([], [], [], [])
    return Evaluation(lab.name, lab.dtype, tokens, loss, bigram, bits, *routing_parts)


def _routing_measures(
    chosen: list[Integer[np.ndarray, "layer token choice"]],
    label: Integer[np.ndarray, " token"],
    n_experts: int | None,
) -> tuple[list[float], list[float], list[float], list[float]]:
    experts = np.concatenate(chosen, axis=1)
    random = np.random.default_rng(0)
    information, shuffled, largest, smallest = [], [], [], []
    for layer in experts:
        information.append(domain_information(_table(label, layer, n_experts)))
        shuffled.append(float(np.mean([_shuffled_information(random, label, layer, n_experts) for _ in range(5)])))
        table = _table(label, layer, n_experts)
        share = (table / table.sum(1, keepdims=True)).mean(0)  # every domain weighs the same
        largest.append(float(share.max()))
        smallest.append(float(share.min()))
    return information, shuffled, largest, smallest


def _shuffled_information(
    random: np.random.Generator, label: np.ndarray, layer: np.ndarray, n_experts: int | None
) -> float:
    return domain_information(_table(random.permutation(label), layer, n_experts))


def _table(
    label: Integer[np.ndarray, " token"], experts: Integer[np.ndarray, "token choice"], n_experts: int | None
) -> Float[np.ndarray, "domain expert"]:
    table = np.zeros((label.max() + 1, n_experts or 1))
    for choice in experts.T:
        np.add.at(table, (label, choice), 1)
    return table


def samples(lab: Lab, new: int = 60) -> list[tuple[str, str]]:
    """Greedy continuations and answers, as they come out."""
    found = [(prompt, lab.generate(prompt, max_new_tokens=new)) for prompt in PROMPTS]
    return found + [(q, lab.chat([{"role": "user", "content": q}], max_new_tokens=new)) for q in QUESTIONS]


def main(
    model: Annotated[str, typer.Argument(help="A folder, or the name of a bundled model.")] = "mini-mixtral",
    corpus: Annotated[Path, typer.Option(help="Folder that mixtral_lab.train.corpus built.")] = Path("corpus"),
    rows: Annotated[int, typer.Option(help="Held-out stretches of 256 tokens per domain.")] = 64,
    json_to: Annotated[Path | None, typer.Option("--json", help="Also write the numbers here.")] = None,
) -> None:
    """Measure a mini model on held-out text and print tables in Markdown."""
    lab = mixtral_lab.load(model)
    if isinstance(lab.tokenizer, BPETokenizer):
        stream.encode_corpus(corpus, lab.tokenizer, corpus / "ids")
    found = evaluate(lab, corpus, rows)
    print("| domain | held-out tokens | nats/token | bigram | bits/byte |\n|---|---|---|---|---|")
    for domain, loss in found.loss.items():
        numbers = f"{loss:.2f} | {found.bigram[domain]:.2f} | {found.bits_per_byte[domain]:.2f}"
        print(f"| {domain} | {found.tokens_per_domain[domain]:,} | {numbers} |")
    if found.information:
        print("\n| layer | bits between domain and expert | labels shuffled | largest share | smallest share |")
        print("|---|---|---|---|---|")
        columns = zip(found.information, found.shuffled, found.largest_share, found.smallest_share, strict=True)
        for layer, (bits, chance, high, low) in enumerate(columns):
            print(f"| {layer} | {bits:.3f} | {chance:.5f} | {100 * high:.1f} % | {100 * low:.1f} % |")
    for prompt, text in samples(lab):
        print(f"\n> **{prompt}**{'' if prompt in PROMPTS else ' →'} {text!r}")
    if json_to is not None:
        json_to.write_text(json.dumps(asdict(found), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    typer.run(in_one_sentence(main))
