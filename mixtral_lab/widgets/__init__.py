"""Traces and models under controls: widgets for JupyterLab and VS Code, each of which is also a page of its own.

Every widget is a Python class with traits that can be read and set, and a plain script beside it. They ask no server for
anything, and say inside themselves what is missing.
"""

from mixtral_lab.widgets.base import LabWidget, WidgetError
from mixtral_lab.widgets.chat_panel import ChatPanel
from mixtral_lab.widgets.expert_atlas import ExpertAtlas
from mixtral_lab.widgets.inference_stepper import InferenceStepper
from mixtral_lab.widgets.intervene import Intervene
from mixtral_lab.widgets.router_explorer import RouterExplorer
from mixtral_lab.widgets.window_explorer import WindowExplorer

__all__ = [
    "ChatPanel",
    "ExpertAtlas",
    "InferenceStepper",
    "Intervene",
    "LabWidget",
    "RouterExplorer",
    "WidgetError",
    "WindowExplorer",
]
