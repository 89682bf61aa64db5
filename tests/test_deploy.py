"""The Dockerfile, read: there is no engine here to build it, but what it names is there, and what it runs is our command."""

from __future__ import annotations

import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import typer

from mixtral_lab.bundled import MODELS
from mixtral_lab.cli import app

ROOT = Path(__file__).parents[1]


def instructions() -> list[tuple[str, str]]:
    lines = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ").splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line and not line.startswith("#")]  # type: ignore[misc]


def said(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def sent_to_the_engine(name: str) -> bool:
    """Whether .dockerignore lets a top-level name through: of its lines, the last that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text("utf-8").split():
        if fnmatch(name, line.removeprefix("!")):
            sent = line.startswith("!")
    return sent


def test_what_is_copied_is_there_and_sent():
    copied = [source for rest in said("COPY") for source in rest.split()[:-1]]
    assert {"mixtral_lab", "data", "pyproject.toml", "constraints.txt"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists() and sent_to_the_engine(source), source
    for kept_out in (".git", ".venv", "corpus", "runs", "notebooks", "tests"):
        assert not sent_to_the_engine(kept_out)


def test_what_the_build_needs_of_the_project_is_copied_before_it_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    order = [f"{name} {rest}" for name, rest in instructions()]
    install = next(at for at, line in enumerate(order) if "'.[serve]'" in line)
    before = " ".join(order[:install])
    needed = [project["project"]["readme"], *project["project"]["license-files"], "data", "mixtral_lab"]
    assert all(name in before for name in needed)
    assert "serve" in project["project"]["optional-dependencies"]


def test_versions_are_pinned():
    (base,) = said("FROM")
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    installs = [rest for rest in said("RUN") if "pip install" in rest]
    assert all("--constraint constraints.txt" in rest or re.search(r"torch==[\d.]+$", rest) for rest in installs)
    (torch,) = (match[1] for rest in installs if (match := re.search(r"torch==([\d.]+)$", rest)))
    (allowed,) = re.findall(r'"torch>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert numbers(allowed[0]) <= numbers(torch) < numbers(allowed[1])
    pinned = (ROOT / "constraints.txt").read_text("utf-8")
    assert re.search(r"^fastapi==", pinned, re.M) and re.search(r"^uvicorn==", pinned, re.M)


def numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def test_it_runs_as_nobody_special():
    names = [name for name, _ in instructions()]
    (user,) = said("USER")
    assert any(f"useradd --create-home --uid 10001 {user}" in rest for rest in said("RUN"))
    assert names.index("USER") < names.index("ENTRYPOINT") and "RUN" not in names[names.index("USER") :]


def test_it_starts_our_command_with_options_that_it_has():
    (entry,), (more,) = said("ENTRYPOINT"), said("CMD")
    program, command, *given = json.loads(entry) + json.loads(more)
    known = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    options = {option for parameter in known for option in parameter.opts}
    assert program == "mixtral-lab"
    assert {word for word in given if word.startswith("--")} == {"--host", "--port"} <= options
    assert given[given.index("--port") + 1] == said("EXPOSE")[0] and given[-1] in MODELS
    assert "MIXTRAL_LAB_API_KEY" in {parameter.envvar for parameter in known}


def test_the_health_check_asks_what_the_server_answers():
    from fastapi.testclient import TestClient

    import mixtral_lab
    from mixtral_lab.serve import make_app

    (check,) = said("HEALTHCHECK")
    path = re.search(r"127\.0\.0\.1:8000(/\w+)", check)
    assert path is not None
    with TestClient(make_app(mixtral_lab.load("mini-mixtral"), api_key="a key that the check does not know")) as client:
        assert client.get(path[1]).status_code == 200
