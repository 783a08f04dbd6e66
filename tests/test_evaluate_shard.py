"""attnpatch evaluate --shard in two real processes (gloo): the same file as one process, fresh, and after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import evaluation
import pytest

from attnpatch.cli import evaluate as command
from attnpatch.cli import main
from attnpatch.errors import ConfigError
from attnpatch.evaluate.results import Ledger

DIES = """
import os, signal, sys
from attnpatch.cli import main
from attnpatch.evaluate.runner import Runner
asked, ask = [], Runner.ask
def dies(self, batch):
    asked.append(batch)
    if os.environ["RANK"] == "1" and len(asked) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return ask(self, batch)
Runner.ask = dies
sys.exit(main.run(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and six samples in its words."""
    path = tmp_path_factory.mktemp("shard")
    evaluation.model().save_pretrained(path / "tiny")
    evaluation.tokenizer().save_pretrained(path / "tiny")
    samples = [evaluation.sample(i, length=40 + i) for i in range(6)]
    lines = [{"id": s.id, "context": s.context, "questions": s.questions, "answers": s.answers, "metric": "qa_f1",
              "max_new_tokens": 4} for s in samples]  # fmt: skip
    (path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def argv(folder, out, *more):
    method = ("--patch", "snapkv", "--set", "budget=16", "--set", "window_size=4")
    data = ("--model", folder / "tiny", "--data", folder / "data.jsonl")
    return [str(x) for x in ("evaluate", *data, *method, "--out", out, *more)]


def launch(*command):
    """Two processes of one command line, as torchrun starts them."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, command)]
    done = subprocess.run(start, env=env, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout + done.stderr


def rows(path):
    """(run, id, scores, predictions) of a ledger, in order."""
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [(r["run"], r["id"], r["scores"], r["predictions"]) for r in lines]


@pytest.fixture(scope="module")
def one(folder):
    """The result file of one process."""
    assert main.run(argv(folder, folder / "one.json")) == 0
    return folder / "one.json"


def test_two_processes_leave_the_file_of_one(folder, one, tmp_path):
    """Fresh: what earlier runs left, of three processes say, is gone, and nobody stumbles over it."""
    out = tmp_path / "r.json"
    for rank in ("", ".1", ".2"):
        (tmp_path / f"r.samples{rank}.jsonl").write_text('{"header": {"seed": 9}}\n')
    code, told = launch("-m", "attnpatch.cli.main", *argv(folder, out, "--shard", "--fresh"))
    assert code == 0 and "error" not in told, told[-3000:]
    assert out.read_bytes() == one.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"r.json", "r.samples.jsonl", "r.samples.1.jsonl"}
    mine, theirs = (rows(tmp_path / f"r.samples{rank}.jsonl") for rank in ("", ".1"))
    assert [r[1] for r in mine] == ["s0", "s0", "s2", "s2", "s4", "s4"] and [r[1] for r in theirs][::2] == [
        "s1", "s3", "s5",
    ]  # fmt: skip
    assert sorted(mine + theirs) == sorted(rows(one.with_suffix(".samples.jsonl")))


def test_one_process_is_killed_and_the_same_command_goes_on(folder, one, tmp_path):
    out, script = tmp_path / "r.json", tmp_path / "dies.py"
    script.write_text(DIES)
    code, told = launch(script, *argv(folder, out, "--shard"))
    assert code and not out.exists(), told[-3000:]
    assert len(rows(tmp_path / "r.samples.1.jsonl")) == 3
    code, told = launch("-m", "attnpatch.cli.main", *argv(folder, out, "--shard"))
    assert code == 0 and "goes on behind" in told, told[-3000:]
    assert out.read_bytes() == one.read_bytes()


def test_several_processes_without_shard_are_refused(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main.run(argv(folder, tmp_path / "r.json", "--fresh")) == 2
    error = capsys.readouterr().err
    assert "2 processes were started and each would write the same --out; add --shard" in error
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("WORLD_SIZE", "1")
    with command.processes(False) as (rank, count, device, _):
        assert (rank, count, device) == (0, 1, None)


def test_somebody_else_removes_a_ledger_meanwhile(tmp_path, monkeypatch):
    gone = tmp_path / "r.samples.1.jsonl"
    monkeypatch.setattr("attnpatch.evaluate.results.ledgers", lambda out: [gone])
    Ledger.remove(tmp_path / "r.json")
    with pytest.raises(ConfigError, match=r"r\.samples\.1\.jsonl: No such file .* no second attnpatch evaluate has"):
        Ledger(tmp_path / "r.json", {"seed": 0})


def test_a_ledger_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    waits, job = [], object.__new__(command.Job)
    job.header = {"seed": 0}
    (tmp_path / "r.samples.jsonl").write_text('{"header": {"seed": 9}}\n')

    def refuses(self, missing_ok):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuses)
    with pytest.raises(ConfigError, match=r"r\.samples\.jsonl: Permission denied; check the folder"):
        job.ledger(tmp_path / "r.json", True, 0, lambda: waits.append(0))
    assert len(waits) == 2  # the others are not left waiting
    with pytest.raises(ConfigError, match=r"r\.samples\.jsonl could not be removed for --fresh"):
        job.ledger(tmp_path / "r.json", True, 1, lambda: None)
