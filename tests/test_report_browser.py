"""The page of attnpatch report in a headless browser: charts drawn, no errors, no foreign script, layers chosen."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from test_cli import outcome
from test_report_page import EVIL, FILES, evaluation, traced, written

from attnpatch.reporting import page, reading
from attnpatch.reporting.trace import Layer

CHROMIUM = next((found for n in ("chromium", "google-chrome", "chromium-browser") if (found := shutil.which(n))), None)


def browse(path, *options, folder):
    """The page's DOM after its scripts ran."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--virtual-time-budget=3000", "--window-size=1200,3000", f"--user-data-dir={folder / 'profile'}", *options,
        path.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_the_charts_without_errors(tmp_path, capsys):
    paths = written(tmp_path, **FILES, evil=traced(EVIL).as_dict())
    out = tmp_path / "r.html"
    code, said, _ = outcome(capsys, "report", *paths, "--out", out)
    assert code == 0 and "from 5 files" in said
    dom = browse(out, "--dump-dom", folder=tmp_path)
    html = re.search(r"<html[^>]*>", dom)[0]
    assert 'data-errors="0"' in html and "data-error=" not in html
    assert int(re.search(r'data-ready="(\d+)"', html)[1]) == dom.count('class="chart"') >= 8
    assert "<img" not in dom and dom.count("<script") == 1
    browse(out, f"--screenshot={tmp_path / 'r.png'}", folder=tmp_path)
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "r.png").stat().st_size > 20_000


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_runs_no_script_but_the_pages_own(tmp_path):
    """The policy would hold even if a text were not escaped; and the page counts what it blocked."""
    records = reading.read(written(tmp_path, a=evaluation()))
    text = page.build(records).replace("</main>", "<script>document.title='owned'</script></main>")
    (tmp_path / "r.html").write_text(text, encoding="utf-8")
    dom = browse(tmp_path / "r.html", "--dump-dom", folder=tmp_path)
    assert "<title>attnpatch report</title>" in dom
    assert 'data-errors="1"' in dom and "blocked: script-src" in dom


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_menu_of_layers_recolours_the_text(tmp_path):
    made = traced()
    made.layers[1] = Layer(1, kept="099999999000", heads=[8, 8], needle=[2, 1])
    text = page.build(reading.read(written(tmp_path, a=made.as_dict())))
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    pick = (  # what a user does
        "<script>addEventListener('load', () => { const menu = document.querySelector('select.pick');"
        "menu.selectedIndex = 2; menu.dispatchEvent(new Event('change')) })</script>"
    )
    (tmp_path / "r.html").write_text(text.replace("</main>", f"{pick}</main>"), encoding="utf-8")
    dom = browse(tmp_path / "r.html", "--dump-dom", folder=tmp_path)
    assert 'data-errors="0"' in dom
    assert '<span class="k0"> w0</span>' in dom and '<span class="k9 n"> w8</span>' in dom
