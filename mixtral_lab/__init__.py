"""Open a mixture-of-experts language model, watch every decision it makes, and change one.

    import mixtral_lab

    lab = mixtral_lab.load("mini-mixtral")
    print(lab.generate("Once upon a time"))
    trace = lab.trace("Once upon a time")
    trace.routing.experts  # layer seq choice: who read each token

One vocabulary of axes runs through code, tables, figures and docstrings:

    batch, seq              texts; positions in a text (`query` and `key` inside attention)
    kv, group, head_dim     key/value heads; query heads that share one; width of a head
    dim, hidden             residual stream; inside an expert
    expert, choice          all experts of a layer; the chosen ones, best first
    layer, vocab, ring      blocks; tokens of the vocabulary; slots of the rolling cache

Query heads stand as `(kv group)`, kv outermost. Axis names never depend on the model: ordinary multi-head
attention is grouped attention with a group of 1, and a dense model is one with `n_experts=None`.
"""

from mixtral_lab.bundled import excerpts
from mixtral_lab.config import PRESETS, Config, LabError
from mixtral_lab.hugging_face import from_transformers
from mixtral_lab.lab import Lab, load
from mixtral_lab.model import Routing, Transformer
from mixtral_lab.trace import Trace

__all__ = [
    "PRESETS", "Config", "Lab", "LabError", "Routing", "Trace", "Transformer", "excerpts", "from_transformers", "load",
]  # fmt: skip
