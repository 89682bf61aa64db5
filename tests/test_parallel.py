"""Two processes with half of the experts each say what one says: logits, routing, counts, text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mixtral_lab
from mixtral_lab.edit import ablate
from mixtral_lab.parallel import ParallelError, owned

PROMPT = "Once upon a time, there was a little"
SITES = ["layers.*.router.logits", "layers.*.experts.hidden", "layers.*.experts.out", "logits"]
TOGETHER = """
import sys
import torch
import torch.distributed as dist
import mixtral_lab
from mixtral_lab.edit import ablate

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
lab = mixtral_lab.load("mini-mixtral", device="cpu", dtype=sys.argv[2], share=(rank, size))
held = [e for e, ffn in enumerate(lab.model.layers[0].experts.ffn) if ffn.gate.weight.numel()]
assert held == list(range(rank * 8 // size, (rank + 1) * 8 // size)), held
sites = ["layers.*.router.logits", "layers.*.router.experts", "layers.*.experts.hidden", "layers.*.experts.out", "logits"]
trace = lab.trace(sys.argv[3], max_new_tokens=12, sites=sites)
with lab.edit(ablate(2, 5, how="next_best")):
    edited = lab.generate(sys.argv[3], max_new_tokens=12)
texts = lab.generate(["One", "Two and three"], max_new_tokens=5)
trace.save(f"{sys.argv[1]}/{rank}.safetensors")
open(f"{sys.argv[1]}/{rank}.txt", "w").write(repr([edited, *texts]))
dist.destroy_process_group()
"""


def torchrun(size: int, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("size", "dtype"), [(2, "float32"), (4, "float32"), (2, "bfloat16")])
def test_processes_that_share_the_experts_agree_with_one(size, dtype, tmp_path):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    done = torchrun(size, str(script), str(tmp_path), dtype, PROMPT)
    assert done.returncode == 0, done.stderr[-3000:]
    lab = mixtral_lab.load("mini-mixtral", device="cpu", dtype=dtype)
    for rank in range(size):
        trace = mixtral_lab.Trace.load(tmp_path / f"{rank}.safetensors")
        expected = lab.trace(PROMPT, max_new_tokens=12, sites=["layers.*.router.experts", *SITES])
        same = trace.ids.equal(expected.ids)
        if dtype == "float32":
            assert same
            assert torch.equal(trace.experts, expected.experts)
            for site in SITES:
                assert torch.allclose(trace[site].float(), expected[site].float(), atol=1e-4), site
            with lab.edit(ablate(2, 5, how="next_best")):
                edited = lab.generate(PROMPT, max_new_tokens=12)
            texts = lab.generate(["One", "Two and three"], max_new_tokens=5)
            assert (tmp_path / f"{rank}.txt").read_text() == repr([edited, *texts])
        else:
            prompt = slice(None, trace.n_prompt)
            assert (trace.experts[:, prompt] == expected.experts[:, prompt]).float().mean() > 0.9
            assert (tmp_path / f"{rank}.txt").read_text() == (tmp_path / "0.txt").read_text()


def test_the_command_writes_the_text_and_the_trace_of_one_process(tmp_path):
    lab = mixtral_lab.load("mini-mixtral", device="cpu")
    done = torchrun(2, "-m", "mixtral_lab.run", "generate", "mini-mixtral", PROMPT, "--new", "8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == (PROMPT + lab.generate(PROMPT, max_new_tokens=8)).strip()
    file = tmp_path / "a.safetensors"
    done = torchrun(2, "-m", "mixtral_lab.run", "trace", "mini-mixtral", PROMPT, "--new", "8", "--save", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(mixtral_lab.Trace.load(file).experts, lab.trace(PROMPT, max_new_tokens=8).experts)


def test_a_study_by_several_processes_is_the_study_of_one(tmp_path, monkeypatch):
    """Four texts, shared by two and by three; the report and every table are the same, byte by byte."""
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")  # no PNG files: they take long
    monkeypatch.setenv(
        "OMP_NUM_THREADS", "1"
    )  # what torchrun gives several processes, but not one alone: logits differ by it
    texts, folders = tmp_path / "texts", {size: tmp_path / str(size) for size in (1, 2, 3)}
    for at, domain in enumerate(("code", "code", "prose", "prose")):
        (texts / domain).mkdir(parents=True, exist_ok=True)
        (texts / domain / f"{at}.txt").write_text(f"{PROMPT} {domain} number {at}, and so it went on.\n" * (at + 1))
    for size, folder in folders.items():
        words = ("-m", "mixtral_lab.run", "study", "mini-mixtral", "--texts", str(texts), "--out", str(folder))
        done = torchrun(size, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("Report: ") == 1 and str(folder / "report.html") in done.stdout
    for size in (2, 3):
        assert_same_study(folders[1], folders[size])


def assert_same_study(mine: Path, theirs: Path) -> None:
    assert (mine / "study.json").read_text() == (theirs / "study.json").read_text()
    assert (mine / "report.html").read_text() == (theirs / "report.html").read_text()
    tables = sorted(path.name for path in (mine / "tables").iterdir())
    assert tables == sorted(path.name for path in (theirs / "tables").iterdir()) and len(tables) > 20
    for name in tables:
        assert (mine / "tables" / name).read_bytes() == (theirs / "tables" / name).read_bytes(), name


def test_a_study_refuses_a_folder_with_something_else_in_it(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    done = torchrun(2, "-m", "mixtral_lab.run", "study", "mini-mixtral", "--domains", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "not a study; it was left alone" in " ".join(done.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_without_torchrun_one_sentence_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mixtral_lab.run", "generate", "mini-mixtral", "x"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Start this with torchrun" in done.stderr
    assert "Traceback" not in done.stderr


def test_who_owns_what():
    assert [list(owned(8, rank, 4)) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ParallelError, match="8 experts cannot be shared evenly by 3"):
        owned(8, 0, 3)
    with pytest.raises(ParallelError, match="dense"):
        owned(None, 0, 1)


def test_the_plain_definition_is_refused():
    lab = mixtral_lab.load("mini-mixtral", device="cpu", share=(0, 1))
    lab.model.layers[0].experts.dispatch = "dense"
    with pytest.raises(ParallelError, match="all experts in one place"):
        lab.trace(PROMPT)
