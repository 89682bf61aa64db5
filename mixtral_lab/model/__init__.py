"""A Mistral or Mixtral language model in a few short files. Start with `moe.py`."""

from mixtral_lab.model.attention import RollingCache
from mixtral_lab.model.moe import Routing
from mixtral_lab.model.transformer import Transformer

__all__ = ["RollingCache", "Routing", "Transformer"]
