"""The page of `mixtral-lab app`, without a browser: what it serves, what it refuses, how it starts and ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import closing

import pytest
from tornado.httpclient import HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.websocket import websocket_connect
from typer.testing import CliRunner

import mixtral_lab
from mixtral_lab.app import application
from mixtral_lab.cli import app
from mixtral_lab.widgets import ChatPanel

HELLO = {"role": "user", "content": "Who are you?"}


@pytest.fixture(scope="module")
def lab():
    return mixtral_lab.load("mini-mixtral", device="cpu")


class Visitor:
    """A page's end of the socket."""

    def __init__(self, connection) -> None:
        self.connection = connection

    async def say(self, **message) -> None:
        await self.connection.write_message(json.dumps(message))

    async def until(self, wanted) -> list[dict]:
        """Messages up to the first that is `wanted`."""
        heard = []
        while not heard or not wanted(heard[-1]):
            text = await asyncio.wait_for(self.connection.read_message(), 30)
            assert text is not None, "the server hung up"
            heard.append(json.loads(text))
        return heard


def visit(panel: ChatPanel, scenario) -> None:
    """Serve the panel and let `scenario(connect, port)` happen in the server's own loop."""

    async def happen() -> None:
        server = HTTPServer(application(panel))
        listening, port = bind_unused_port()
        server.add_sockets([listening])

        async def connect(**headers) -> Visitor:
            request = HTTPRequest(f"ws://127.0.0.1:{port}/socket", headers=headers)
            return Visitor(await websocket_connect(request))

        try:
            await scenario(connect, port)
        finally:
            server.stop()
            await server.close_all_connections()

    asyncio.run(happen())


def test_a_question_over_the_socket_is_answered_and_its_routing_opens(lab):
    panel = ChatPanel(lab, max_new_tokens=30)

    async def scenario(connect, port):
        page, other = await connect(), await connect()
        await page.say(id=panel.model_id, method="open")
        (state,) = await page.until(lambda m: m["method"] == "open")
        assert state["name"] == "ChatPanel" and state["state"]["about"]["model"] == "mini-mixtral"
        await page.say(id=panel.model_id, method="custom", content={"do": "send", "text": HELLO["content"]})
        heard = await page.until(lambda m: m.get("state", {}).get("explorer"))
        pieces = [text for m in heard if m["method"] == "custom" for text, _ in m["content"]["tokens"]]
        assert "".join(pieces) == lab.chat([HELLO], max_new_tokens=30)
        key = heard[-1]["state"]["explorer"]
        await page.say(id=key, method="open")
        (*_, explorer) = await page.until(lambda m: m["method"] == "open" and m["id"] == key)
        assert explorer["name"] == "RouterExplorer"
        assert explorer["state"]["panes"][0]["tokens"] == list(panel.trace().tokens)
        assert explorer["state"]["selected_token"] == panel.trace().n_prompt
        assert await other.until(lambda m: m.get("state", {}).get("explorer") == key)

    visit(panel, scenario)


def test_a_trait_that_one_page_sets_is_told_to_the_others(lab):
    panel = ChatPanel(lab)

    async def scenario(connect, port):
        page, other = await connect(), await connect()
        await page.say(id=panel.model_id, method="update", state={"selected_layer": 2})
        (echo,) = await other.until(lambda m: True)
        assert (echo["method"], echo["state"]) == ("echo_update", {"selected_layer": 2})
        assert panel.selected_layer == 2
        await page.say(id=panel.model_id, method="update", state={"selected_layer": 99})
        heard = await page.until(lambda m: "selected_layer" in m.get("state", {}))
        assert heard[-1]["state"]["selected_layer"] == 2 == panel.selected_layer  # taken back
        assert "the layers are 0 to 7" in panel.notice
        for nonsense in ("", "[]", "{", '{"id": "none", "method": "open"}', json.dumps({"id": panel.model_id})):
            await page.connection.write_message(nonsense)
        await page.say(id=panel.model_id, method="open")
        await page.until(lambda m: m["method"] == "open")

    visit(panel, scenario)


def test_the_next_answer_takes_the_place_of_the_explorer(lab):
    panel = ChatPanel(lab, max_new_tokens=2)

    async def scenario(connect, port):
        page = await connect()
        keys, heard = [], []
        for _ in range(2):
            await page.say(id=panel.model_id, method="custom", content={"do": "send", "text": "Hi"})
            heard += await page.until(lambda m: m.get("state", {}).get("explorer"))
            keys.append(heard[-1]["state"]["explorer"])
        assert [m["id"] for m in heard if m["method"] == "close"] == keys[:1]
        assert keys[0] != keys[1] == panel.opened.model_id

    visit(panel, scenario)


def test_other_addresses_and_other_pages_are_refused(lab):
    panel = ChatPanel(lab)

    async def scenario(connect, port):
        address = f"http://127.0.0.1:{port}"

        def get(path, **headers):
            with urllib.request.urlopen(urllib.request.Request(address + path, headers=headers), timeout=10) as answer:
                return answer.headers, answer.read().decode()

        async def refused(path, **headers):
            with pytest.raises(urllib.error.HTTPError) as error:
                await asyncio.to_thread(get, path, **headers)
            return error.value.code

        headers, page = await asyncio.to_thread(get, "/")
        assert "A conversation with mini-mixtral" in page and "http" not in re.sub("http://www.w3.org", "", page)
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        _, script = await asyncio.to_thread(get, "/ChatPanel.js")
        assert script == panel._esm
        assert await refused("/", Host="evil.example") == 403
        for path in ("/nothing", "/Lab.js", "/../app.py", "/app.html", "/page.js"):
            assert await refused(path) == 404
        with pytest.raises(Exception, match="403"):
            await connect(Origin="http://evil.example")
        with pytest.raises(Exception, match="403"):
            await connect(Host="evil.example")

    visit(panel, scenario)


def test_a_dense_model_talks_without_an_explorer():
    panel = ChatPanel(mixtral_lab.load("mini-mistral", device="cpu"), max_new_tokens=3)

    async def scenario(connect, port):
        page = await connect()
        await page.say(id=panel.model_id, method="custom", content={"do": "send", "text": "Hi"})
        await page.until(lambda m: m.get("state", {}).get("busy") is False)
        assert panel.explorer == "" and "dense model" in panel.notice and len(panel.messages) == 2

    visit(panel, scenario)


def test_errors_are_one_sentence():
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["app", "--port", port, "--no-open"])
        assert result.exit_code == 1
        assert f"Port {port} is taken by another program: choose another one with --port." in " ".join(
            result.output.split()
        )
    for words in (["app", "no-such", "--port", port, "--no-open"],):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 1 and "Bundled models are" in " ".join(result.output.split())
        assert "Traceback" not in result.output


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly_and_can_start_again_at_once(name):
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mixtral_lab.cli", "app", "--port", str(port), "--no-open", "--device", "cpu"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        said = server.stderr.readline()
        assert said == f"mini-mixtral answers at http://127.0.0.1:{port} (on this machine only). Ctrl-C ends it.\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as page:
            assert page.status == 200
        server.send_signal(name)
        assert server.wait(60) == 0 and server.stderr.read() == "Stopped.\n"
    finally:
        server.kill()
        server.wait()
