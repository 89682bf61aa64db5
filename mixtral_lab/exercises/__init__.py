"""Checkers for the exercises of the lessons: each says whether an answer is right, and if not, what went wrong.

One module for each lesson; a lesson imports its checkers from here.
"""

from mixtral_lab.exercises.router import check_repetition, check_route_by_hand
from mixtral_lab.exercises.verdict import Verdict

__all__ = ["Verdict", "check_repetition", "check_route_by_hand"]
