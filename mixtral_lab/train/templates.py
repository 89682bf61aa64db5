"""The generated domains in one place: stories, maths and chat, each made from a ``random.Random``."""

from mixtral_lab.train.arithmetic import maths
from mixtral_lab.train.dialogue import chat
from mixtral_lab.train.languages import tale
from mixtral_lab.train.pages import page
from mixtral_lab.train.stories import story

__all__ = ["chat", "maths", "page", "story", "tale"]
