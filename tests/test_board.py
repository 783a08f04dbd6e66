"""The board of attnpatch.bench.quality: methods that need a profile, and methods added to a file there is."""

from __future__ import annotations

import json

import pytest

from attnpatch.bench import board, quality
from attnpatch.bench.board import Method, Run, Task
from attnpatch.errors import ConfigError

BASE = ["--tiny", "--device", "cpu"]


def rows_of(path):
    return json.loads(path.read_text())["rows"]


def labels(path):
    return list(dict.fromkeys(row["label"] for row in rows_of(path)))


def test_methods_are_added_to_a_board(tmp_path, capsys):
    """What the file holds stays as it is; the new rows are those of a run of their own, and are resumed, too."""
    out, alone = tmp_path / "board.json", tmp_path / "alone.json"
    quality.main([*BASE, "--methods", "snapkv", "quest", "--commit", "a" * 7, "--out", str(out)])
    before = rows_of(out)
    more = [*BASE, "--methods", "recycled", "pyramidkv", "--commit", "b" * 7]
    quality.main([*more, "--out", str(alone)])
    quality.main([*more, "--resume", "--seconds", "0", "--table", "--out", str(out)])
    assert labels(out) == ["dense", "snapkv 10%", "quest", "recycled", "pyramidkv 10%"]
    assert [r for r in rows_of(out) if r["label"] in ("dense", "quest", "snapkv 10%")] == before
    assert "| recycled | - | - | - |" in capsys.readouterr().out
    quality.main([*more, "--resume", "--table", "--out", str(out)])
    assert rows_of(out)[:3] == before[:3] and len(rows_of(out)) == 15
    new = [r for r in rows_of(out) if r["label"] in ("recycled", "pyramidkv 10%")]
    assert new == [r for r in rows_of(alone) if r["label"] != "dense"]
    assert "| recycled | " in capsys.readouterr().out
    (earlier,) = json.loads(out.read_text())["earlier"]
    assert earlier["commit"] == "a" * 7 and earlier["methods"] == ["dense", "snapkv 10%", "quest"]
    assert json.loads(out.read_text())["commit"] == "b" * 7


def test_what_is_not_asked_now_needs_the_same_tasks_and_dense(tmp_path):
    task, other = Task("needle", 64, 1, 4, 2), Task("lines", 64, 1, 4, 2)
    run = Run([task], [Method("dense"), Method("quest")])
    run.go(lambda t, first, count, tally, methods: [[True] * count for _ in methods], float("inf"))
    rows = run.rows()
    with pytest.raises(ConfigError, match="holds other tasks"):
        Run([task, other], [Method("dense"), Method("snapkv", 0.1)]).restore(rows)
    with pytest.raises(ConfigError, match="no rows of dense"):
        Run([task], [Method("dense"), Method("snapkv", 0.1)]).restore(rows[1:])


def test_only_what_is_missing_is_asked():
    task, asked = Task("needle", 64, 1, 6, 4), []
    old = Run([task], [Method("dense"), Method("quest")])
    old.go(lambda t, first, count, tally, methods: [[True] * count for _ in methods], float("inf"))
    run = Run([task], [Method("dense"), Method("quest"), Method("hip")])
    run.restore(old.rows())

    def ask(t, first, count, tally, methods):
        asked.append((first, count, [m.name for m in methods]))
        return [[False] * count for _ in methods]

    run.go(ask, float("inf"))
    assert asked == [(0, 4, ["hip"]), (4, 2, ["hip"])]
    dense, quest, hip = run.rows()
    assert (dense["correct"], quest["correct"], hip["correct"], hip["n"]) == (6, 6, 0, 6)
    assert hip["over_dense"][0] == -1


def test_a_row_with_fewer_samples_is_compared_on_those_and_says_so():
    task = Task("needle", 64, 1, 6, 3)
    old = Run([task], [Method("dense")])
    old.go(lambda t, first, count, tally, methods: [[first == 0] * count for _ in methods], float("inf"))
    run = Run([task], [Method("dense"), Method("hip")])
    run.restore(old.rows())
    run.hits[task, Method("hip")] += [True, True, True]
    row = run.rows()[1]
    assert row["n"] == 3 and row["over_dense"][0] == 0
    assert "| hip | 100 (44 to 100, n=3) |" in board.markdown(run.rows())


def test_a_profile_is_named_by_its_folder_alone():
    made = Method("duoattention", None, (("profile", "/somewhere/else/retrieval-heads"), ("heads", None)))
    assert made.label == "duoattention profile=retrieval-heads"
    assert board.named("profile", "a/b") == "b" and board.named("budget", "a/b") == "a/b"
