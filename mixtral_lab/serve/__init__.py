"""A model behind Mistral's chat-completions API, on this machine: `mixtral-lab serve MODEL --port 8000`.

    from mixtral_lab.serve import Limits, make_app, serve

    serve(mixtral_lab.load("mini-mixtral"), port=8000)  # until Ctrl-C

`make_app` gives the ASGI application alone, for a server or a test of your own. Whoever talks to Mistral's or OpenAI's
platform can talk to this one with nothing but the address changed; docs/platform.md says what differs.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable

import uvicorn

from mixtral_lab.config import LabError
from mixtral_lab.lab import Lab
from mixtral_lab.serve.app import make_app
from mixtral_lab.serve.worker import Limits

__all__ = ["Limits", "make_app", "serve"]

LAST_WORDS = 5  # seconds that answers have to end when the server is told to stop


def serve(
    lab: Lab,
    port: int = 8000,
    host: str = "127.0.0.1",
    api_key: str | None = None,
    limits: Limits | None = None,
    when_ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Answer requests until Ctrl-C or SIGTERM. `port=0` takes a free one; `when_ready` is told the address.

    Raises `LabError` if the port is taken, or if others on the network could ask without a key.
    """
    if not api_key and not _is_here(host):
        raise LabError(
            f"On {host} anyone on the network could use the model: give a key (--api-key, or MIXTRAL_LAB_API_KEY), or "
            "listen on 127.0.0.1."
        )
    app = make_app(lab, limits, api_key or None)
    config = uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=LAST_WORDS)
    with _listen(host, port) as listening:
        when_ready(f"http://{host}:{listening.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listening])


def _is_here(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        why = os.strerror(number) if number is not None and number > 0 else str(error)
        raise LabError(
            f"Cannot listen on {host} port {port}: {why}. Choose another --port (0 takes a free one)."
        ) from None
