"""A page of its own: a conversation, and the routing of its answers beside it, served to a browser on this machine.

Python and the page exchange what ipywidgets would send through a notebook: new values of traits, and messages. So the
widgets are those of the notebooks, without Jupyter around them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import html
import json
import signal
import socket
import webbrowser
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from threading import Thread
from typing import Any

import traitlets
from comm.base_comm import BaseComm
from rich.console import Console
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler
from tornado.websocket import WebSocketHandler

import mixtral_lab
from mixtral_lab.config import LabError
from mixtral_lab.widgets import ChatPanel
from mixtral_lab.widgets.base import LabWidget
from mixtral_lab.widgets.page import as_json

POLICY = (  # scripts and connections of this address alone
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MOST_HEARD = 4_000_000  # bytes of one message from the page


class AppError(LabError):
    """The page cannot be served."""


class Hub:
    """The widgets that pages show, and the open pages; what a widget sends goes to all of them."""

    def __init__(self) -> None:
        self.widgets: dict[str, LabWidget] = {}
        self.pages: set[Socket] = set()
        self.speaking: Socket | None = None  # whose message is being handled

    def host(self, widget: LabWidget) -> None:
        """Let pages show this widget, until it is closed."""
        key = widget.model_id or ""
        self.widgets[key] = widget
        widget.comm = Wire(self, comm_id=key)

    def tell(self, key: str, method: str, **what: Any) -> None:
        message = as_json({"id": key, "method": method, **what})
        for page in list(self.pages):
            if not (method == "echo_update" and page is self.speaking):  # it knows what it said itself
                page.write_message(message)

    def hear(self, page: Socket, message: dict[str, Any]) -> None:
        """A page asks for a widget, sets traits, or sends a message to one."""
        widget = self.widgets.get(message.get("id", ""))
        if widget is None:
            return  # closed in the meantime
        method = message.get("method")
        if method == "open":
            answer = {"id": message["id"], "method": "open", "name": type(widget).__name__, "state": widget.state()}
            page.write_message(as_json(answer))
            return
        if method == "custom":
            widget._handle_msg({"content": {"data": message}, "buffers": []})
        elif method == "update":
            self.change(page, widget, message["state"])

    def change(self, page: Socket, widget: LabWidget, state: dict[str, Any]) -> None:
        """Set traits as a page wants it; what is not allowed is said in the widget, and taken back."""
        before = {name: getattr(widget, name) for name in state if name in widget.keys}
        self.speaking = page
        try:
            widget.set_state(state)
        except (LabError, traitlets.TraitError) as error:
            for name, value in before.items():
                setattr(widget, name, value)
            widget.notice = str(error)
            widget.send_state(list(before))
        finally:
            self.speaking = None


class Wire(BaseComm):
    """A widget's end of the line to its pages."""

    def __init__(self, hub: Hub, **kwargs: Any) -> None:
        self.hub = hub
        super().__init__(**kwargs)

    def publish_msg(
        self, msg_type: str, data: Any = None, metadata: Any = None, buffers: Any = None, **keys: Any
    ) -> None:
        if msg_type == "comm_close":
            self.hub.widgets.pop(self.comm_id, None)
            self.hub.tell(self.comm_id, "close")
        elif msg_type == "comm_msg" and data["method"] == "custom":
            self.hub.tell(self.comm_id, "custom", content=data["content"], buffers=[bytes(b) for b in buffers or ()])
        elif msg_type == "comm_msg":
            state = dict(data["state"])
            for (name,), buffer in zip(data.get("buffer_paths", ()), buffers or (), strict=True):
                state[name] = bytes(buffer)
            self.hub.tell(self.comm_id, data["method"], state=state)


class Handler(RequestHandler):
    """Answers requests for this very address: another name for it may be a foreign page's trick (DNS rebinding)."""

    def prepare(self) -> None:
        if self.request.host_name not in ("127.0.0.1", "localhost"):
            raise HTTPError(403)

    def set_default_headers(self) -> None:
        self.set_header("Content-Security-Policy", POLICY)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cache-Control", "no-store")
        self.clear_header("Server")


class Page(Handler):
    def initialize(self, hub: Hub, shown: LabWidget) -> None:
        self.hub, self.shown = hub, shown

    def get(self) -> None:
        page = Template(_file("app.html")).substitute(
            title=html.escape(self.shown.title), key=html.escape(self.shown.model_id or "")
        )
        self.finish(page)


class Part(Handler):
    """The page's own script and style, and those of the widgets it shows, by class."""

    def initialize(self, hub: Hub) -> None:
        self.hub = hub

    def get(self, name: str, kind: str) -> None:
        if name == "app":
            text = _file(f"app.{kind}")
        else:
            widget = next((one for one in self.hub.widgets.values() if type(one).__name__ == name), None)
            if widget is None:
                raise HTTPError(404)
            text = str(widget._esm if kind == "js" else widget._css)
        self.set_header("Content-Type", f"text/{'javascript' if kind == 'js' else 'css'}; charset=utf-8")
        self.finish(text)


class Socket(WebSocketHandler):
    """One open page. Tornado refuses pages that come from another address."""

    def initialize(self, hub: Hub) -> None:
        self.hub = hub

    def prepare(self) -> None:
        if self.request.host_name not in ("127.0.0.1", "localhost"):
            raise HTTPError(403)

    def open(self) -> None:
        self.hub.pages.add(self)

    def on_close(self) -> None:
        self.hub.pages.discard(self)

    def on_message(self, message: str | bytes) -> None:
        with contextlib.suppress(ValueError):
            said = json.loads(message)
            if isinstance(said, dict):
                self.hub.hear(self, said)


def application(panel: ChatPanel) -> Application:
    """The page with this conversation; the routing of every new answer opens in it."""
    hub = Hub()
    hub.host(panel)

    def opened(change: Any) -> None:
        if change["new"] and panel.opened is not None:
            hub.host(panel.opened)

    def answered(change: Any) -> None:
        turns = panel.conversation.turns
        if not change["new"] and panel.about["experts"] and turns and turns[-1].trace is not None:
            panel.open_routing()

    panel.observe(opened, "explorer")
    panel.observe(answered, "busy")
    return Application(
        [
            ("/", Page, {"hub": hub, "shown": panel}),
            (r"/([A-Za-z]+)\.(js|css)", Part, {"hub": hub}),
            ("/socket", Socket, {"hub": hub}),
        ],
        websocket_max_message_size=MOST_HEARD,
        log_function=lambda handler: None,
    )


def serve(model: str, port: int, browser: bool, device: str, dtype: str, err: Console) -> None:
    """Load a model and serve its page on 127.0.0.1 until Ctrl-C or a signal to end.

    Raises `AppError` if the port is taken or the model cannot hold a conversation.
    """
    sockets = _bound(port)  # before a large model is loaded
    with err.status("loading"):
        lab = mixtral_lab.load(model, device=device, dtype=dtype)
    panel = ChatPanel(lab)
    if panel.conversation.cannot:
        raise AppError(panel.conversation.cannot)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_until_stopped(panel, sockets, f"http://127.0.0.1:{port}", browser, err))
    err.print("Stopped.")


def _bound(port: int) -> list[socket.socket]:
    try:
        return bind_sockets(port, "127.0.0.1")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AppError(f"Port {port} is taken by another program: choose another one with --port.") from None
        raise AppError(f"Port {port} cannot be used: {error.strerror}. Choose another one with --port.") from None


async def _until_stopped(
    panel: ChatPanel, sockets: Sequence[socket.socket], address: str, browser: bool, err: Console
) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows
            loop.add_signal_handler(name, stopped.set)
    server = HTTPServer(application(panel))
    server.add_sockets(sockets)
    err.print(f"{panel.lab.name} answers at {address} (on this machine only). Ctrl-C ends it.", soft_wrap=True)
    if browser:
        Thread(target=webbrowser.open, args=(address,), daemon=True).start()  # a text browser would not return
    await stopped.wait()
    server.stop()
    panel.stop()


def _file(name: str) -> str:
    return files("mixtral_lab.widgets").joinpath(name).read_text("utf-8")
