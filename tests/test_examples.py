"""Every script under examples/ runs as a user would run it, on the embedded model with small arguments."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from test_readme import ROOT, weights_missing

SCRIPTS = {  # name -> (arguments, what the output must hold)
    "snapkv": ([], "expected"),
    "batch": (["--lengths", "256", "400"], "400 tokens, a layer holds"),
    "turns": (["--length", "400"], "turn 3: "),
    "compare_methods": (["--length", "300", "--samples", "2"], "pyramidkv"),
    "own_method": ([], "budget: a guess"),
    "device_map": (["--length", "400", "--device-map", "cpu"], "cpu: layers 0 to 7"),
}
PROCESSES = {"tensor_parallel": 43, "server": 100}  # run as processes of their own -> lines they may have
needs_weights = pytest.mark.skipif(weights_missing(), reason="the embedded model's weights are not in this checkout")


def output(monkeypatch, capsys, name, *arguments):
    from attnpatch import patch

    before = dict(patch.list_patches())
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    try:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    finally:  # a script that registers a method must not leak it into other tests
        patch._REGISTRY.clear()
        patch._REGISTRY.update(before)
    return capsys.readouterr().out


def test_every_script_is_run_and_short():
    files = {p.stem: p for p in (ROOT / "examples").glob("*.py")}
    assert set(files) == set(SCRIPTS) | set(PROCESSES)
    assert all(len(p.read_text(encoding="utf-8").splitlines()) <= PROCESSES.get(n, 43) for n, p in files.items())


@needs_weights
@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs(monkeypatch, capsys, name):
    arguments, wanted = SCRIPTS[name]
    assert wanted in output(monkeypatch, capsys, name, *arguments)


@needs_weights
def test_answers(monkeypatch, capsys):
    """The scripts that show a method at work show it working."""
    text = output(monkeypatch, capsys, "batch", "--lengths", "512", "1024")
    text += output(monkeypatch, capsys, "own_method") + output(monkeypatch, capsys, "device_map", "--length", "1024")
    pairs = re.findall(r"expected (\d+), got (\d+)", text)
    assert len(pairs) == 4 and all(a == b for a, b in pairs)


@needs_weights
def test_own_model(monkeypatch, capsys):
    """--model takes a folder; a sibling of another family stands in for a user's model."""
    folder = str(ROOT / "tests" / "models" / "qwen3")
    for name, small in (("batch", ["--lengths", "256", "300"]), ("own_method", [])):
        assert "expected" in output(monkeypatch, capsys, name, "--model", folder, *small)
    assert "turn 3" in output(monkeypatch, capsys, "turns", "--model", folder, "--length", "300")
    assert "dense" in output(
        monkeypatch, capsys, "compare_methods", "--model", folder, "--samples", "1", "--length", "256"
    )


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@needs_weights
def test_tensor_parallel():
    """Two processes hold half of the heads each, keep as much as one process would, and give its answer."""
    script = str(ROOT / "examples" / "tensor_parallel.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    ranks = re.findall(r"rank (\d): 2 KV heads, (\d+) of 20\d\d held, got (\d+)", done.stdout)
    assert sorted(rank for rank, _, _ in ranks) == ["0", "1"], done.stdout + done.stderr[-3000:]
    expected = re.search(r"expected (\d+)", done.stdout)[1]
    assert ranks[0][1] == ranks[1][1] and {answer for _, _, answer in ranks} == {expected}


def test_tensor_parallel_needs_torchrun(monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as stopped:
        output(monkeypatch, capsys, "tensor_parallel")
    assert stopped.value.code == 2 and "start it with torchrun" in capsys.readouterr().err


@pytest.fixture(scope="module")
def server():
    """The address of a running server."""
    script = str(ROOT / "examples" / "server.py")
    command = [sys.executable, script, "--port", "0", "--budget", "64"]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        try:
            yield re.search(r"http://\S+", run.stdout.readline())[0]
        finally:
            run.terminate()


def post(address, body):
    """(status, body) of a request; body as text or as what becomes JSON."""
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data), timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@needs_weights
def test_server_answers(server):
    from concurrent.futures import ThreadPoolExecutor

    def ask(number):
        text = "The clerk walked home. " * 60 + f"The code of amber fox is {number}. What is the code of amber fox?"
        return post(server, {"messages": [{"role": "user", "content": text}], "max_tokens": 12})

    with ThreadPoolExecutor(4) as pool:  # requests at the same time do not disturb each other
        got = list(pool.map(ask, (48213, 59321, 61734, 70425)))
    for number, (code, body) in zip((48213, 59321, 61734, 70425), got, strict=True):
        assert code == 200 and body["choices"][0]["message"] == {"role": "assistant", "content": str(number)}
        assert body["choices"][0]["finish_reason"] == "stop"
        assert 0 < body["kv"]["bytes"] < body["kv"]["bytes_without_patch"] / 3


USER = {"role": "user", "content": "hello"}
WRONG = {  # what is sent -> what the answer says
    "no JSON": ("{", "Expecting property name"),
    "a list": ([], "give one JSON object"),
    "no messages": ({}, "give one JSON object"),
    "messages as a number": ({"messages": 5}, "give one JSON object"),
    "no message": ({"messages": []}, "at least one object"),
    "a message as text": ({"messages": ["hello"]}, "both strings"),
    "a message without content": ({"messages": [{"role": "user"}]}, "both strings"),
    "no tokens": ({"messages": [USER], "max_tokens": 0}, "at least 1"),
    "tokens as text": ({"messages": [USER], "max_tokens": "9"}, "whole number"),
    "too many tokens": ({"messages": [USER], "max_tokens": 10**6}, "of this model"),
    "streaming": ({"messages": [USER], "stream": True}, "leave stream out"),
    "an unknown keyword": ({"messages": [USER], "temperature": 1}, "'temperature' is not supported"),
}


@needs_weights
def test_server_refuses(server):
    """Each in words that say what to do; in one test, so that one server does for all."""
    for name, (body, wanted) in WRONG.items():
        code, answer = post(server, body)
        assert code == 400 and wanted in answer["error"]["message"], (name, answer)
    code, answer = post(server.removesuffix("/chat/completions"), {})
    assert code == 404 and "POST to /v1/chat/completions" in answer["error"]["message"]
