"""The routing study of the Mixtral paper, and more, on any corpus: counts while reading, one offline report at the end.

    from mixtral_lab.study import read_texts, study

    study(mixtral_lab.load("mini-mixtral"), read_texts("texts"), "out").report

Texts are read piece by piece and only counts are kept, so that memory does not grow with the corpus. The measures are
those of `mixtral_lab.analysis`, the pictures those of `mixtral_lab.figures`; this package reads, adds up and writes.
"""

from mixtral_lab.study.corpus import Corpus, StudyError, Text, bundled_texts, given_texts, read_texts
from mixtral_lab.study.counting import Counts, count
from mixtral_lab.study.report import Study, check_folder, study, write
from mixtral_lab.study.sections import Section, all_sections

__all__ = [
    "Corpus", "Counts", "Section", "Study", "StudyError", "Text", "all_sections", "bundled_texts", "check_folder", "count",
    "given_texts", "read_texts", "study", "write",
]  # fmt: skip
