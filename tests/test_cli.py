"""The command line, as a person types it."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

import mixtral_lab
from mixtral_lab import bundled, lora
from mixtral_lab.cli import app
from mixtral_lab.weights import read_config

runner = CliRunner()


def run(*words: str, **options):
    result = runner.invoke(app, list(words), **options)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_trace_prints_the_continuation_and_a_table(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    result = run("trace", "Once upon a time", "--new", "5", "--device", "cpu")
    assert result.exit_code == 0, result.output
    lab = mixtral_lab.load("mini-mixtral", device="cpu")
    assert lab.generate("Once upon a time", max_new_tokens=5).strip() in flat(result.output)
    found = lab.trace("Once upon a time", max_new_tokens=5)
    first = found.routing.experts[:, 0].tolist()
    row = next(line for line in result.output.splitlines() if re.match(r"\s*0 <s>", line))
    assert re.findall(r"(\d),(\d)", row) == [(str(a), str(b)) for a, b in first]


def test_trace_writes_a_page_and_a_trace(tmp_path):
    page, trace = tmp_path / "a.html", tmp_path / "a.safetensors"
    result = run("trace", "x = 1", "--new", "2", "--html", str(page), "--save", str(trace), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert page.read_text("utf-8").lstrip().lower().startswith("<!doctype html>")
    state = json.loads(page.read_text("utf-8").split('id="state">')[1].split("</script>")[0])
    assert tuple(state["panes"][0]["tokens"]) == mixtral_lab.Trace.load(trace).tokens and state["part"]["whole"]
    assert len(mixtral_lab.Trace.load(trace)) == mixtral_lab.Trace.load(trace).n_prompt + 2


@pytest.mark.parametrize("name", list(mixtral_lab.PRESETS))
def test_info_on_every_published_shape(name):
    result = run("info", name)
    assert result.exit_code == 0, result.output
    config = mixtral_lab.PRESETS[name].config
    assert f"{config.parameters:,}" in result.output
    assert f"{config.active_parameters:,}" in result.output


def test_info_on_a_checkpoint_lists_its_tensors(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    result = run("info", "mini-mixtral")
    assert "model.embed_tokens.weight" in result.output
    assert "4096 x 256" in result.output
    assert "BF16" in result.output


def test_info_on_the_folder_of_a_fine_tuning_run(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    shape = read_config(bundled.folder("mini-mixtral"))
    adapter = lora.new_adapter(shape, lora.LoRA(rank=2, parts=("attention", "router")))
    lora.save_adapter(adapter, tmp_path / "captain", "mini-mixtral")
    result = run("info", str(tmp_path / "captain"))
    assert result.exit_code == 0, result.output
    assert f"rank 2, {adapter.numbers:,} numbers, on attention and router" in flat(result.output)
    assert "mini-mixtral" in result.output and "4096 x 256" in result.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["info", "no-such"], "There is no file or folder no-such. Published shapes are"),
        (["trace", "hello", "--model", "no-such"], "Bundled models are"),
        (["trace", ""], "The prompt is empty"),
        (["trace", "hello", "--dtype", "float8"], "float8"),
        (["trace", "hello", "--device", "toaster"], "toaster"),
        (["trace", "hello", "--model", "mini-mistral"], "dense model"),
    ],
)
def test_errors_are_one_sentence(words, says):
    result = run(*words)
    assert result.exit_code == 1
    assert says in flat(result.output)
    assert "Traceback" not in result.output


def test_chat_answers_until_the_input_ends():
    result = run("chat", "--new", "20", "--device", "cpu", input="Who are you?\n")
    assert result.exit_code == 0, result.output
    lab = mixtral_lab.load("mini-mixtral", device="cpu")
    answer = lab.chat([{"role": "user", "content": "Who are you?"}], max_new_tokens=20)
    assert flat(answer) in flat(result.output)


def test_info_says_what_fits(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    result = run("info", "mixtral-8x7b", "--memory", "24", "--bandwidth", "1000", "--link", "25")
    assert result.exit_code == 0, result.output
    assert re.search(r"bfloat16 +int4 +27\.17 +0\.54 +5 of 8 in each layer +9\.48 +10\.1", result.output)
    assert re.search(r"float32 +as the rest .* does not fit", result.output)
    result = run("info", "mini-mixtral", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert re.search(r"float32 +as the rest +0\.09 .* all ", result.output)
    result = run("info", "mini-mixtral", "--memory", "24")
    assert result.exit_code == 1
    assert "give both the memory and its bandwidth" in flat(result.output)
