"""The HTML page: one file, no resource from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape

from attnpatch.errors import ConfigError
from attnpatch.reporting import charts, story
from attnpatch.reporting.records import Records

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1a1a1a;--soft:#595959;--line:#d5d5d5;--panel:#f5f5f3;--blank:#e3e3e3;
--keep:47,111,176;--mark:#b3261e;
--s0:#0b62a8;--s1:#b34700;--s2:#1d7a46;--s3:#8a3b9c;--s4:#a31545;--s5:#3d6f78;--s6:#7a5c00;--s7:#444}
@media (prefers-color-scheme:dark){:root{--bg:#16181b;--ink:#e9e9e6;--soft:#a9adb3;--line:#3a3f45;--panel:#202327;
--blank:#33373c;--keep:88,150,215;--mark:#ff8a80;
--s0:#6db3f2;--s1:#f2a15f;--s2:#69c793;--s3:#cf97de;--s4:#f28ab0;--s5:#84c3cd;--s6:#dcc05a;--s7:#c8c8c8}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:24px 20px 60px;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;margin:0 0 .3em}h2{font-size:1.3rem;margin:2.2em 0 .6em;border-bottom:1px solid var(--line)}
h3{font-size:1.1rem;margin:1.4em 0 .3em}
.fine{color:var(--soft);font-size:.875rem;overflow-wrap:anywhere}nav a{margin-right:1.1em}a{color:var(--s0)}
.figures{display:flex;flex-wrap:wrap;gap:22px;align-items:flex-start}
figure{margin:0 0 18px;max-width:100%}
.figures>figure{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:12px 14px}
figcaption{font-weight:600;margin-bottom:8px;overflow-wrap:anywhere}
.figures>figure{min-width:260px}.figures figcaption,.figures details .wide,.figures .legend{contain:inline-size}
.wide{overflow-x:auto;max-width:100%}.wide:focus-visible,.text:focus-visible{outline:2px solid var(--s0)}
svg text{fill:var(--ink);font:12px system-ui,sans-serif}svg .axis{fill:var(--soft)}
svg .rule{stroke:var(--line);fill:none}svg .blank{fill:var(--blank)}svg .mark{fill:var(--mark)}
.series polyline{fill:none;stroke:currentColor;stroke-width:1.8}.series{fill:currentColor;stroke:none}
.series .whisker{stroke:currentColor;stroke-width:1;opacity:.55;fill:none}
.series .ring{fill:none;stroke:var(--ink);stroke-width:1.5}
.s0{color:var(--s0)}.s1{color:var(--s1)}.s2{color:var(--s2)}.s3{color:var(--s3)}
.s4{color:var(--s4)}.s5{color:var(--s5)}.s6{color:var(--s6)}.s7{color:var(--s7)}
.legend{list-style:none;margin:6px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:2px 16px;
font-size:.85rem}
.legend .key{vertical-align:-2px;margin-right:6px}.scale{font-size:.85rem;margin:4px 0 0}.scale svg{margin:0 8px}
table{border-collapse:collapse;font-size:.875rem;margin:8px 0}th,td{padding:3px 10px;border:1px solid var(--line);
text-align:left;font-variant-numeric:tabular-nums}th{background:var(--panel)}tbody th{font-weight:500}
summary{cursor:pointer;font-size:.9rem;margin-top:8px}
.verdict{border-left:4px solid var(--s0);padding:2px 14px;background:var(--panel);margin:14px 0}
.text{white-space:pre-wrap;overflow-wrap:anywhere;max-height:420px;overflow:auto;border:1px solid var(--line);
border-radius:6px;padding:12px;font-size:.9rem}
.k0{color:var(--soft)}.gap{color:var(--soft);font-style:italic}.keys>span{padding:0 6px}
.n{outline:2px solid var(--mark);outline-offset:-1px;font-weight:600}
@media print{.text{max-height:none}}
""" + "".join(f".k{i}{{background:rgba(var(--keep),{0.06 + 0.05 * i:.2f})}}" for i in range(1, 10))

SCRIPT = """"use strict";
const root = document.documentElement;
root.dataset.errors = "0";
window.addEventListener("error", e => {
  root.dataset.errors = String(Number(root.dataset.errors) + 1);
  root.dataset.error = String(e.message);
});
document.addEventListener("securitypolicyviolation", e => {
  root.dataset.errors = String(Number(root.dataset.errors) + 1);
  root.dataset.error = "blocked: " + e.violatedDirective;
});
document.addEventListener("DOMContentLoaded", () => {
  for (const menu of document.querySelectorAll("select.pick")) {
    const spans = document.getElementById(menu.dataset.text).querySelectorAll("span:not(.gap)");
    const show = () => {
      const kept = menu.selectedOptions[0].dataset.kept;
      spans.forEach((span, i) => { span.className = "k" + kept[i] + (span.classList.contains("n") ? " n" : ""); });
    };
    menu.addEventListener("change", show);
    show();
    const box = document.getElementById(menu.dataset.text), needle = box.querySelector(".n");
    if (needle) box.scrollTop = needle.offsetTop - box.offsetTop - box.clientHeight / 2;
  }
  root.dataset.ready = String(document.querySelectorAll("svg.chart").length);
});
"""


def build(records: Records, title: str = "attnpatch report") -> str:
    """The page's HTML. Raises ConfigError where the records hold nothing to draw."""
    ids = charts.Ids()
    traced = [story.section(t, ids) for t in records.traces]
    parts = [
        ("trace", "Eviction traces", "What each layer kept of one prompt, right after the prompt.", traced),
        ("needle", "Needles by length and depth", "Score of needles at each depth. Blank: none was asked for.",
         list(charts.needles(records, ids))),
        ("pareto", "Accuracy against what is kept",
         "Further left is smaller, higher is better; bars are 95 % intervals. A ring: no other run beats it in both.",
         list(charts.pareto(records, ids))),
        ("latency", "Latency against length", "Medians; bars from the least to the most, or 10th to 90th percentile.",
         list(charts.times(records, ids))),
        ("heads", "Layers and heads", "Blank: the layer ran dense.", list(charts.grids(records.grids, ids))),
    ]  # fmt: skip
    parts = [p for p in parts if p[3]]
    if not parts:
        names = ", ".join(name for name, _, _ in records.files) or "none"
        raise ConfigError(
            f"the files ({names}) hold nothing to draw: no scores below the whole KV, depths, times or densities; add "
            "results of evaluate, bench or a trace."
        )
    return _page(title, parts, records.files)


def _page(title: str, parts: Sequence[tuple[str, str, str, list[str]]], files: Sequence[tuple[str, str, str]]) -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    nav = "".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _, _ in parts)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{escape(heading)}</h2>'
        f'<p class="fine">{escape(lead)}</p>'
        f'<div class="{"traces" if name == "trace" else "figures"}">{"".join(drawn)}</div></section>'
        for name, heading, lead, drawn in parts
    )
    sources = charts.table(("file", "holds", "of"), files) if files else ""
    if sources:
        sources = f'<section id="files"><h2>Files</h2>{sources}</section>'
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style><script>{SCRIPT}</script></head>\n"
        f'<body><header><h1>{escape(title)}</h1><nav aria-label="sections">{nav}</nav></header>'
        f"<main>{body}{sources}</main></body></html>\n"
    )
