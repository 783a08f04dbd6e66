"""attnpatch report: what is read from result files, the charts of the page, escaping and errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_cli import one_error

from attnpatch.errors import ConfigError
from attnpatch.evaluate.results import by_depth
from attnpatch.evaluate.sample import Sample
from attnpatch.reporting import charts, page, reading, svg
from attnpatch.reporting.records import Cell, Score
from attnpatch.reporting.trace import Layer, Trace, verdict

EVIDENCE = Path(__file__).resolve().parents[1] / "recipes" / "evidence"
EVIL = "</script><img src=x onerror=alert(1)> & \"quoted\" 'too'"


# ---- files ---------------------------------------------------------------------------------------------------------
def times(median):
    return {"median": median, "min": 0.9 * median, "max": 1.2 * median, "n": 3}


def evaluation(tokens=1024, budget="0.25", score=60.0):
    lines = [("dense", 100.0, 1.0), ("snapkv", score, 0.26)]
    return {
        "model": "folder/tiny", "protocol": "query-aware", "device": "one CPU", "commit": "0123456789abc",
        "generated": {"names": ["needle"], "tokens": tokens},
        "runs": [{"label": "dense", "patches": {}}, {"label": "snapkv", "patches": {"snapkv": {"budget": budget}}}],
        "tasks": [{"task": "needle", "metric": "exact", "samples": 4, "runs": [
            {"run": run, "n": 4, "score": s, "low": s - 9, "high": min(100.0, s + 9), "kv_share": share, "depths": [
                {"tokens": tokens, "depth": depth, "n": 2, "score": s} for depth in (0.05, 0.95)
            ]} for run, s, share in lines]}],
    }  # fmt: skip


def bench():
    rows = [
        {"tokens": n, "batch": 2, "label": label, "first_token_ms": times(n * f), "decode_tokens_per_s": times(50 / f)}
        for n in (128, 4096)
        for label, f in (("dense", 1.0), ("snapkv", 0.5))
    ]
    rows.append({"tokens": 8192, "batch": 2, "label": "dense", "failed": "out of memory", "reason": "no"})
    return {"model": "tiny", "device": "one CPU", "grid": {}, "variants": [], "rows": rows}


def traced(text="w", needle=True):
    tokens = [f" {text}{i}" for i in range(12)]
    layers = [
        Layer(0, kept="900000000399", heads=[4, 3], needle=[0, 1], density=[0.5, 1.0], look=0.02, best=3, worst=9),
        Layer(1, reason="a sliding window"),
    ]
    spans = [(8, 10)] if needle else []
    return Trace("tiny", {"snapkv": {"budget": "4"}}, tokens, layers, spans, "w8", "w1", "w8" if needle else "", "", 2)


def status():
    layers = [{"index": 0, "density": None}, {"index": 1, "density": [[0.25, 0.75]]}]
    return {"patches": {"flexprefill": {}}, "layers": layers, "bytes_held": 1, "bytes_dense": 2}


FILES = {"eval": evaluation(), "bench": bench(), "trace": traced().as_dict(), "status": status()}


def written(folder, **bodies):
    paths = []
    for name, body in bodies.items():
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(body), encoding="utf-8")
    return paths


class Tags(HTMLParser):
    """Every element opened, and whether they close in order; texts of titles."""

    VOID = {"meta", "br"}

    def __init__(self, text):
        super().__init__()
        self.seen, self.open, self.ids = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in self.VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def count(self, tag, **wanted):
        return sum(t == tag and all(a.get(k) == v for k, v in wanted.items()) for t, a in self.seen)


# ---- what is read --------------------------------------------------------------------------------------------------
def test_depths_come_from_samples_that_tell_them():
    def sample(number, **meta):
        return Sample(f"s{number}", "t", "c", ("q",), (("a",),), "exact_match", 4, meta=meta)

    rows = [(sample(0, depth=0.31, tokens=1024), {"scores": [100.0], "tokens": 999}),
            (sample(1, depth=0.39, tokens=1024), {"scores": [0.0], "tokens": 999}),
            (sample(2, depths=(1.0,)), {"scores": [50.0], "tokens": 777}),
            (sample(3, depths=(0.1, 0.2)), {"scores": [50.0], "tokens": 777}),  # two needles: no one depth
            (sample(4), {"scores": [50.0], "tokens": 777}),
            (sample(5, depth=0.3, tokens=1024), {"failed": "out of memory"})]  # fmt: skip
    assert by_depth(rows) == [
        {"tokens": 777, "depth": 0.95, "n": 1, "score": 50.0},
        {"tokens": 1024, "depth": 0.35, "n": 2, "score": 50.0},
    ]


def test_embedded_needles_tell_their_depth():
    from attnpatch.evaluate import tasks_testbed
    from attnpatch.testbed import tasks

    made = tasks_testbed.case("testbed:needle", "n", None, 256, 3, None)
    assert made.meta["depth"] == round(tasks.make("needle", 256, seed=3).depth, 4)
    assert not tasks_testbed.case("testbed:vt", "n", None, 512, 3, None).meta


def test_an_evaluation_gives_scores_and_depths(tmp_path):
    found = reading.read(written(tmp_path, a=evaluation(1024), b=evaluation(2048, "0.5", 80.0)))
    assert [(s.run, s.share, s.axis) for s in found.scores][:2] == [("dense", 1.0, "kept"), ("snapkv", 0.26, "kept")]
    assert found.scores[1].group == "needle, 1024 tokens (tiny, query-aware)"
    runs = {(c.run, c.tokens) for c in found.cells}
    assert ("snapkv, budget 0.25", 1024) in runs and ("snapkv, budget 0.5", 2048) in runs and ("dense", 2048) in runs
    assert found.files[0][1] == "evaluation" and "commit 0123456" in found.files[0][2]


def test_a_bench_gives_times_of_both_phases(tmp_path):
    found = reading.read(written(tmp_path, a=bench()))
    first = [t for t in found.times if t.group.startswith("time to the first token, batch 2")]
    step = [t for t in found.times if t.group.startswith("time of a decode step")]
    assert [(t.label, t.tokens, t.ms) for t in first][:2] == [("dense", 128, 128.0), ("snapkv", 128, 64.0)]
    assert step[0].ms == pytest.approx(2 * 1000 / 50) and step[0].low < step[0].ms < step[0].high
    assert len(found.times) == 8  # the failed cell has none


@pytest.mark.parametrize(
    ("name", "what"),
    [("quality", "scores"), ("quality_sparse", "scores"), ("quality_decode", "scores"), ("first_token", "times"),
     ("prefill", "times"), ("decode", "times"), ("reweight", "times"), ("leaderboard", "scores")],
)  # fmt: skip
def test_evidence_is_read(name, what):
    found = reading.read([EVIDENCE / f"{name}.json"])
    assert getattr(found, what) and page.build(found).count('class="chart"')


def test_budgets_are_kv_only_for_methods_that_evict():
    found = reading.read([EVIDENCE / "quality.json", EVIDENCE / "quality_decode.json"])
    asked = {s.run: s.share for s in found.scores if s.axis == "asked" and s.share is not None}
    assert "snapkv" in asked and "quest" not in asked and "recycled" not in asked
    assert 0.02 in {s.share for s in found.scores if s.run == "snapkv"}


# ---- charts --------------------------------------------------------------------------------------------------------
def test_the_frontier_holds_what_no_other_beats():
    def score(run, share, value):
        return Score("g", run, value, value, value, 1, share)

    dense, good, dear, poor, tie = (
        score("dense", 1.0, 100), score("a", 0.2, 80), score("b", 0.5, 70), score("c", 0.1, 10), score("d", 0.2, 80),
    )  # fmt: skip
    assert charts.frontier([dense, good, dear, poor, tie]) == [dense, good, poor, tie]


def test_a_needle_map_averages_files_and_leaves_holes_blank():
    cells = [
        Cell("g", "r", 1024, 0.05, 100.0, 3),
        Cell("g", "r", 1024, 0.05, 0.0, 1),
        Cell("g", "r", 2048, 0.95, 0.0, 1),
    ]
    records = reading.Records(cells=cells)
    (made,) = charts.needles(records, charts.Ids())
    assert ">75</text>" in made and made.count('class="blank"') == 2
    assert "Mean score 60.0 of 100 over 5 needles" in made


@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
@pytest.mark.parametrize("values", [[5.0], [1.0, 1.0], [1e-3, 7e4], [0.97, 1.0]], ids=["one", "equal", "far", "near"])
def test_axes_hold_their_values(values, log):
    low, high, ticks = svg.axis(values, log, None)
    assert low <= min(values) and high >= max(values) and low < high and ticks
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in ticks) and len(ticks) < 30


def test_long_labels_leave_room_for_the_name_of_the_axis():
    chart = svg.Lines({"a": [(1, 0.02, 0.02, 0.02), (2, 0.2, 0.2, 0.2)]}, "x", "time", str, lambda t: f"{t:g} ms",
                      log_y=True).draw("", "", "n")  # fmt: skip
    labels = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="end">([^<]*)', chart)
    assert "0.05 ms" in [label for _, label in labels]
    assert all(float(x) - 6.5 * len(label) >= 20 for x, label in labels)  # the name's letters end there


def test_colours_have_readable_ink():
    assert svg.colour(0.0) == ("#440154", "#fff") and svg.colour(1.0)[1] == "#000"
    assert svg.colour(-3.0) == svg.colour(0.0) and svg.colour(7.0) == svg.colour(1.0)


# ---- the page ------------------------------------------------------------------------------------------------------
def test_a_file_of_which_nothing_is_drawn_says_so(tmp_path):
    whole = evaluation()
    for run in whole["tasks"][0]["runs"]:
        run.update(depths=[], kv_share=1.0)
    found = reading.read(written(tmp_path, a=evaluation(), b=whole))
    assert [kind for _, kind, _ in found.files] == [
        "evaluation", "evaluation; not drawn: perplexities, or scores at the whole KV only",
    ]  # fmt: skip


def test_the_page_has_every_section_and_nothing_from_elsewhere(tmp_path):
    found = reading.read(written(tmp_path, **FILES))
    text = page.build(found, "mine")
    assert "not drawn" not in text
    tags = Tags(text)
    for name in ("trace", "needle", "pareto", "latency", "heads", "files"):
        assert tags.count("section", id=name) == 1, name
    assert len(tags.ids) == len(set(tags.ids))
    images = [a for t, a in tags.seen if t == "svg" and a.get("class") == "chart"]
    assert len(images) >= 8
    for image in images:  # each says its title and description
        assert image["role"] == "img" and set(image["aria-labelledby"].split()) <= set(tags.ids)
    assert not re.search(r"""(?:src|href)=["'](?!#)|url\(|@import|https?://""", text)
    assert {a.get("scope") for t, a in tags.seen if t == "th"} == {"col", "row"}


def test_text_is_escaped_wherever_it_comes_from(tmp_path):
    body = evaluation()
    body["model"], body["tasks"][0]["task"] = EVIL, EVIL
    body["runs"][1]["label"] = body["tasks"][0]["runs"][1]["run"] = EVIL
    shape = bench()
    shape["device"], shape["rows"][0]["label"] = EVIL, EVIL
    trace = traced(EVIL)
    trace.model = trace.dense = trace.patched = trace.note = trace.layers[1].reason = trace.expected = EVIL
    trace.patches = {EVIL: {EVIL: EVIL}}
    state = status()
    state["patches"] = {EVIL: {}}
    found = reading.read(written(tmp_path, a=body, b=shape, c=trace.as_dict(), d=state))
    tags = Tags(page.build(found, EVIL))
    assert tags.count("script") == 1 and not tags.count("img")
    assert not [a for _, attrs in tags.seen for a in attrs if a.startswith("on")]


def test_the_trace_shows_its_text_and_layers(tmp_path):
    text = page.build(reading.read(written(tmp_path, a=traced().as_dict())))
    assert '<span class="k0"> w1 w2 w3 w4 w5 w6 w7</span>' in text  # evicted everywhere: one run
    assert '<span class="k0 n"> w8</span><span class="k3 n"> w9</span>' in text
    assert '<option data-kept="900399"' not in text and 'data-kept="90039"' in text  # w10 and w11 are one run
    assert "a sliding window" in text


def test_a_long_prompt_shows_the_needle_and_the_ends(monkeypatch):
    from attnpatch.reporting import story

    monkeypatch.setattr(story, "MOST", 10)
    monkeypatch.setattr(story, "AROUND", 2)
    made = traced()
    made.needle = [(6, 7)]
    assert story._shown(made) == [0, 1, 4, 5, 6, 7, 8, 10, 11]
    text = story.section(made, charts.Ids())
    assert "[2 tokens not shown]" in text and "[1 tokens not shown]" in text and " w3" not in text


@pytest.mark.parametrize("needle", [True, False], ids=["needle", "no-needle"])
def test_the_verdict_says_what_happened(needle):
    said = " ".join(verdict(traced(needle=needle)))
    assert "a head holds 3 to 4 of 12 tokens" in said
    assert ("Of 2 KV heads, 0 keep all of it, 1 a part, 1 none" in said) == needle
    assert ("has rank 9 at best (layer 0), and 4 tokens are held there" in said) == needle
    assert ("The dense model answers right, the patched one wrong" in said) == needle


def test_the_verdict_knows_methods_that_keep_by_position():
    made = traced()
    made.layers[0] = Layer(0, kept="990000000999", heads=[5, 5], needle=[0, 0], look=0.1, best=1, worst=2)
    assert "keeps the first 2 and the last 3 tokens whatever they say" in " ".join(verdict(made))
    made.layers[0] = Layer(0, kept="9" * 12, heads=[12, 12], needle=[2, 2])
    assert "eviction of the needle is not why" in " ".join(verdict(made))


# ---- errors --------------------------------------------------------------------------------------------------------
def damaged(**change):
    return {**traced().as_dict(), **change}


@pytest.mark.parametrize(
    ("body", "why"),
    [("{", "is not JSON, or was cut off"), ("[1]", "holds no results that a report knows"),
     ('{"rows": []}', "holds no results that a report knows"), ("{}", "evaluate"), ('{"rows": 5}', "first_token.json"),
     (json.dumps({**evaluation(), "tasks": [{"task": "x", "runs": [{"run": "y", "score": "high"}]}]}), "damaged"),
     (json.dumps({**bench(), "rows": [{"tokens": 5}]}), "damaged"),
     (json.dumps({"rows": [{"accuracy": None, "task": "t", "tokens": 4, "method": "m"}]}), "damaged"),
     (json.dumps({"rows": [{"tokens": 4, "times": {"a": {}}}]}), "damaged"),
     (json.dumps(damaged(version=99)), "traces of version 99 are not known"),
     (json.dumps(damaged(needle=[[5, 99]])), "lies outside the prompt"),
     (json.dumps(damaged(tokens=["a"], needle=[])), "was kept"),
     (json.dumps(damaged(layers=[{"index": 0, "heads": ["x"]}])), "layer 0"),
     (json.dumps(damaged(layers=[{"index": 0, "kept": "9" * 12}])), "layer 0"),
     (json.dumps(damaged(patches=[])), "damaged"),
     (json.dumps(damaged(dense=None)), "no text"), (json.dumps(damaged(layers=[{"kept": ""}])), "damaged"),
     (json.dumps({**status(), "layers": [5]}), "damaged")],
    ids=lambda x: x[:18].replace(" ", "-") if isinstance(x, str) else None,
)  # fmt: skip
def test_a_bad_file_is_named(body, why, tmp_path, capsys):
    (tmp_path / "bad.json").write_text(body, encoding="utf-8")
    error = one_error(capsys, "report", "--results", tmp_path / "bad.json", "--out", tmp_path / "r.html")
    assert "bad.json" in error and why in error and not (tmp_path / "r.html").exists()


def test_bytes_that_are_no_text(tmp_path, capsys):
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\x00")
    assert "is not JSON" in one_error(capsys, "report", tmp_path / "bad.json", "--out", tmp_path / "r.html")


@pytest.mark.parametrize(
    ("args", "why"),
    [(["--out", "r.html"], "nothing to report"), (["gone.json", "--out", "r.html"], "there is no result file"),
     ([".", "--out", "r.html"], "is a folder"), (["a.json", "--out", "r.pdf"], "ends in .html or .htm"),
     (["a.json", "--out", "no/r.html"], "there is no folder no"),
     (["a.json", "a.json", "--out", "r.html"], "named twice"),
     (["a.json", "--patch", "snapkv", "--out", "r.html"], "--patch goes with --trace"),
     (["--trace", "--out", "r.html"], "exactly one of --patch NAME and --recipe"),
     (["--trace", "--patch", "dense", "--out", "r.html"], "needs a method"),
     (["--trace", "--patch", "snapkv", "--needle", "x", "--out", "r.html"], "go with a prompt"),
     (["--trace", "--patch", "snapkv", "--prompt", "a b", "--needle", "x", "--out", "r.html"], "does not occur"),
     (["--trace", "--patch", "snapkv", "--prompt", "a", "--length", "2k", "--out", "r.html"], "the testbed's"),
     (["--trace", "--patch", "snapkv", "--model", "m", "--out", "r.html"], "needs a prompt; give --prompt-file"),
     (["--trace", "--patch", "snapkv", "--length", "x", "--out", "r.html"], "not a number of tokens"),
     (["--trace", "--patch", "snapkv", "--save-trace", "t.txt", "--out", "r.html"], "ends in .json")],
    ids=lambda x: "-".join(x)[:40].replace("/", "_") if isinstance(x, list) else None,
)  # fmt: skip
def test_refusals(args, why, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, a=evaluation())
    assert why in one_error(capsys, "report", *args)


def test_files_with_nothing_to_draw(tmp_path):
    body = evaluation()
    body["tasks"] = [{"task": "x", "metric": "m", "samples": 1, "runs": [{"run": "dense", "n": 0}]}]
    with pytest.raises(ConfigError, match=r"the files \(a.json\) hold nothing to draw"):
        page.build(reading.read(written(tmp_path, a=body)))


def test_a_page_of_results_needs_no_torch(tmp_path):
    (path,) = written(tmp_path, a=evaluation())
    code = (
        "import sys; from attnpatch.cli.main import run; "
        f"assert run(['report', '--results', {str(path)!r}, '--out', {str(tmp_path / 'r.html')!r}]) == 0; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
