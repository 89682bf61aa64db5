"""From recorded decisions to small arrays: what a picture shows, as numbers."""

from mixtral_lab.analysis.routing import (
    AnalysisError,
    assignment_counts,
    assignment_shares,
    domain_counts,
    domain_information,
    domain_shares,
)

__all__ = [
    "AnalysisError",
    "assignment_counts",
    "assignment_shares",
    "domain_counts",
    "domain_information",
    "domain_shares",
]
