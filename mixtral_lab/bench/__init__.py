"""This package beside transformers: the same weights, files and prompts, in one process, in random order.

For each shape and dtype a checkpoint is written once, and both sides load it. Before anything is timed their logits
must agree. Then every repeat draws a new prompt and runs all contenders on it in turn, so that whatever the machine does
in that minute befalls them all; what counts is the ratio within a repeat. Loading is timed and memory is weighed in a
fresh process, with the files in the page cache. Rooflines are measured between the contenders: what the memory's bandwidth
and the processor's rate of matrix products would allow.

`run` does it all and returns a `Report`; `profile` says where the time of a single pass goes.
"""

from mixtral_lab.bench.profiling import ProfileError, profile
from mixtral_lab.bench.report import (
    OURS,
    OURS_COMPILED,
    PORTABLE,
    ROOFLINE,
    THEIRS,
    BenchError,
    Comparison,
    Measurement,
    Report,
)
from mixtral_lab.bench.sections import SECTIONS, Lengths
from mixtral_lab.bench.session import run
from mixtral_lab.bench.shapes import RANDOM_075B, Shape, published, usual_shapes, windowed
from mixtral_lab.bench.tables import table

__all__ = [
    "OURS",
    "OURS_COMPILED",
    "PORTABLE",
    "RANDOM_075B",
    "ROOFLINE",
    "SECTIONS",
    "THEIRS",
    "BenchError",
    "Comparison",
    "Lengths",
    "Measurement",
    "ProfileError",
    "Report",
    "Shape",
    "profile",
    "published",
    "run",
    "table",
    "usual_shapes",
    "windowed",
]
