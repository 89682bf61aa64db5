"""Training text as ids on disk, and batches that draw evenly from every domain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor
from tqdm.auto import tqdm

from mixtral_lab.config import LabError
from mixtral_lab.tokenizer import BPETokenizer
from mixtral_lab.train.corpus import DOMAINS, documents

TRAIN, HELD_OUT = "train", "heldout"


@dataclass(frozen=True)
class Tokens:
    """One split of the corpus: for every domain its documents end to end, each from `<s>` to `</s>`."""

    domains: tuple[str, ...]
    ids: tuple[Integer[np.ndarray, " seq"], ...]

    def batch(self, step: int, rows: int, seq: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draw `rows` stretches of `seq + 1` ids, domains in turn, starts at random but the same for each step.

        Returns ids `batch seq+1` and the domain of each row `batch`.
        """
        random = np.random.default_rng((seed, step))
        domain = (np.arange(rows) + random.integers(len(self.domains))) % len(self.domains)
        drawn = []
        for d in domain:
            start = random.integers(len(self.ids[d]) - seq)
            drawn.append(self.ids[d][start : start + seq + 1])
        return torch.from_numpy(np.stack(drawn).astype(np.int64)), torch.from_numpy(domain)

    def stretches(self, domain: int, rows: int, seq: int) -> Int[Tensor, "rows seq_in"]:
        """`rows` stretches of `seq + 1` ids of one domain, evenly spaced: the fixed sample for held-out loss."""
        ids = self.ids[domain]
        rows = min(rows, (len(ids) - 1) // seq)
        if rows < 1:
            raise LabError(f"Domain {self.domains[domain]} holds {len(ids)} tokens: fewer than one stretch of {seq}.")
        starts = np.linspace(0, len(ids) - seq - 1, rows).astype(int)
        return torch.from_numpy(np.stack([ids[s : s + seq + 1] for s in starts]).astype(np.int64))


def train_tokenizer(corpus: Path, vocab: int, megabytes_per_domain: float = 3.0) -> BPETokenizer:
    """Learn the tokenizer from the first megabytes of every domain, so that no domain rules the merges."""

    def sample() -> Iterator[str]:
        for domain in tqdm(DOMAINS, desc="reading text for the tokenizer"):
            room = megabytes_per_domain * 1e6
            for document in documents(corpus, domain, TRAIN):
                text = plain_text(document)
                room -= len(text)
                if room < 0:
                    break
                yield text

    return BPETokenizer.train(sample(), vocab=vocab)


def plain_text(document: dict) -> str:
    """A document's own words; of a conversation, its messages one below the other."""
    if "messages" in document:
        return "\n".join(message["content"] for message in document["messages"])
    return document["text"]


def encode_corpus(corpus: Path, tokenizer: BPETokenizer, out: Path) -> None:
    """Write `<domain>.<split>.npy` (uint16 ids) for every domain and split; what is there already is kept."""
    if tokenizer.vocab > 2**16:
        raise LabError(f"Ids are kept in 16 bits, but this tokenizer has {tokenizer.vocab} tokens.")
    out.mkdir(parents=True, exist_ok=True)
    for domain in tqdm(DOMAINS, desc="tokenizing"):
        for split in (TRAIN, HELD_OUT):
            path = out / f"{domain}.{split}.npy"
            if not path.exists():
                parts = [_ids(document, tokenizer) for document in documents(corpus, domain, split)]
                np.save(path, np.concatenate(parts))


def load_tokens(folder: Path, split: str) -> Tokens:
    """Map the ids of one split, in the order of `DOMAINS`."""
    return Tokens(DOMAINS, tuple(np.load(folder / f"{domain}.{split}.npy", mmap_mode="r") for domain in DOMAINS))


def _ids(document: dict, tokenizer: BPETokenizer) -> Integer[np.ndarray, " seq"]:
    if "messages" in document:
        ids, _ = tokenizer.chat_training_ids(document["messages"])
    else:
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        ids = tokenizer.encode(document["text"]) + end
    return np.asarray(ids, dtype=np.uint16)


def bigram_loss(train: Integer[np.ndarray, " seq"], held_out: Integer[np.ndarray, " held"], vocab: int) -> float:
    """Nats per token of the best bigram model of one domain: the baseline that context must beat.

    `p(b | a) = (count(a, b) + m p(b)) / (count(a) + m)`, with counts from the training split; the strength `m` of
    the pull towards single-token frequencies is the best on the held-out text itself, in the baseline's favour.
    """
    ids = np.asarray(train, dtype=np.int64)
    pairs = np.bincount(ids[:-1] * vocab + ids[1:], minlength=vocab * vocab)
    before = np.bincount(ids[:-1], minlength=vocab)
    single = (np.bincount(ids, minlength=vocab) + 1) / (len(ids) + vocab)
    test = np.asarray(held_out, dtype=np.int64)
    a, b = test[:-1], test[1:]
    losses = [
        -np.log((pairs[a * vocab + b] + m * single[b]) / (before[a] + m)).mean()
        for m in (3.0, 10.0, 30.0, 100.0, 300.0)
    ]
    return float(min(losses))
