"""The report's style sheet and script, as text that is set into the page.

They live in a module and not in files of their own so that a wheel cannot be built without them.
"""

STYLE = """\
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f6f7f9; --ink: #1c2026; --quiet: #5f6774; --line: #e3e6ea;
  --tuned: #2563eb; --base: #8a93a0; --second: #d97706; --third: #0d9488; --fourth: #9333ea;
  --better: #15803d; --worse: #b91c1c; --warning: #fff7e6; --warning-line: #f0b429; --code: #f0f2f5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --panel: #1c2027; --ink: #e7eaee; --quiet: #9aa3b0; --line: #2d333c;
    --tuned: #6ea0ff; --base: #8f98a5; --second: #f0a848; --third: #3fc4b4; --fourth: #c084fc;
    --better: #4ade80; --worse: #f87171; --warning: #2b2413; --warning-line: #b98a1e; --code: #22272f;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
main, header { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 21px; margin: 52px 0 6px; letter-spacing: -0.005em; }
h3 { font-size: 16px; margin: 26px 0 8px; }
p { margin: 6px 0 14px; max-width: 78ch; }
.quiet, figcaption, .hint { color: var(--quiet); }
.hint { font-size: 14px; }
.lead { font-size: 18px; margin: 14px 0 4px; }
nav { margin: 14px 0 0; font-size: 14px; display: flex; flex-wrap: wrap; gap: 4px 18px; }
a { color: var(--tuned); text-decoration: none; }
a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 12px; margin: 24px 0 8px; }
.tile { background: var(--panel); border-radius: 10px; padding: 12px 16px; }
.tile b { display: block; font-size: 22px; line-height: 1.25; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.tile .label { font-size: 13px; color: var(--quiet); }
.tile .under { font-size: 13px; color: var(--quiet); }
.gain { color: var(--better); } .loss { color: var(--worse); }
.findings { margin: 18px 0 0; padding: 0; list-style: none; display: grid; gap: 8px; }
.findings li { background: var(--panel); border-left: 4px solid var(--line); border-radius: 4px; padding: 10px 14px; }
.findings li.warning { background: var(--warning); border-color: var(--warning-line); }
.findings b { display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 14px; }
.chart { margin: 0; background: var(--panel); border-radius: 10px; padding: 12px 12px 6px; position: relative;
  break-inside: avoid; }
.chart svg { width: 100%; height: auto; display: block; }
.chart svg text { font-family: inherit !important; }
.chart figcaption { font-size: 13px; padding: 0 6px 6px; }
.chart .cursor { position: absolute; width: 1px; background: var(--quiet); opacity: .55; pointer-events: none;
  display: none; }
.chart .reading {
  position: absolute; top: 10px; background: var(--paper); border: 1px solid var(--line); border-radius: 6px;
  padding: 4px 8px;
  font-size: 12.5px; line-height: 1.4; pointer-events: none; display: none; white-space: nowrap;
  font-variant-numeric: tabular-nums;
}
.toolbar { display: flex; flex-wrap: wrap; gap: 10px 18px; align-items: center; font-size: 14px; margin: 8px 0 14px; }
select, input[type="search"] {
  font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: 5px 9px;
}
input[type="search"] { width: min(380px, 100%); }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); gap: 14px; }
.pair { margin: 0; background: var(--panel); border-radius: 10px; padding: 12px; break-inside: avoid; }
.pair .both { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
.pair img, .evolution img { width: 100%; height: auto; border-radius: 6px; display: block; background: #fff; }
.pair .prompt { color: var(--ink); font-weight: 600; line-height: 1.3; margin: 0 0 8px; overflow-wrap: anywhere; }
.pair .seed { font-weight: 400; color: var(--quiet); font-size: 12.5px; white-space: nowrap; }
.pair .score { font-size: 13.5px; margin-top: 4px; font-variant-numeric: tabular-nums; text-align: center; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; width: 100%; }
th, td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.evolution { table-layout: fixed; min-width: 640px; }
.evolution td, .evolution th { border: 0; padding: 4px; text-align: center; }
.evolution th[scope="row"] { text-align: left; font-weight: 500; font-size: 13.5px; vertical-align: middle;
  overflow-wrap: anywhere; }
.evolution .score { font-size: 12px; color: var(--quiet); font-variant-numeric: tabular-nums; }
.whole img { max-width: 100%; height: auto; border-radius: 6px; background: #fff; }
.bar { display: block; position: relative; height: 10px; min-width: 140px; background: var(--line);
  border-radius: 5px; margin-top: 6px; }
.bar i { position: absolute; top: 0; bottom: 0; border-radius: 5px; background: var(--better); }
.bar i.down { background: var(--worse); }
.bar u { position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--ink); }
details { background: var(--panel); border-radius: 8px; margin: 8px 0; padding: 0 14px; }
summary { cursor: pointer; padding: 9px 0; font-weight: 600; }
details > *:last-child { margin-bottom: 14px; }
details td:first-child { width: 44%; }
pre, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13.5px; }
pre { background: var(--code); border-radius: 8px; padding: 12px 14px; overflow-x: auto; line-height: 1.5;
  margin: 6px 0 16px; }
td code { overflow-wrap: anywhere; }
.chosen { color: var(--tuned); font-weight: 600; }
footer { max-width: 1120px; margin: 56px auto 0; padding: 18px 24px 40px; border-top: 1px solid var(--line);
  font-size: 13.5px; color: var(--quiet); }
[hidden] { display: none !important; }
@media print {
  :root { color-scheme: light; --paper: #fff; --panel: #fff; --ink: #000; --quiet: #444; --line: #ccc;
  --tuned: #2563eb;
    --base: #777; --better: #15803d; --worse: #b91c1c; --warning: #fff; --code: #f5f5f5; }
  nav, .toolbar, .cursor, .reading { display: none !important; }
  body { font-size: 11pt; } header { padding-top: 0; }
  .tile, .chart, .pair, details { border: 1px solid var(--line); }
  .charts { grid-template-columns: 1fr 1fr; } .pairs { grid-template-columns: repeat(3, 1fr); }
  h2 { break-after: avoid; } pre { white-space: pre-wrap; }
}
"""

SCRIPT = """\
"use strict";
// The page says everything without this script; it adds exact readings on the curves, sorting and searching.
(() => {
  const written = (value) => {
    if (value === null) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-4 || size >= 1e7)) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  };

  for (const chart of document.querySelectorAll(".chart[data-curves]")) {
    const data = JSON.parse(chart.dataset.curves);
    const svg = chart.querySelector("svg");
    const cursor = chart.appendChild(Object.assign(document.createElement("div"), { className: "cursor" }));
    const reading = chart.appendChild(Object.assign(document.createElement("div"), { className: "reading" }));
    const steps = [...new Set(data.series.flatMap((series) => series.x))].sort((a, b) => a - b);
    const hide = () => { cursor.style.display = reading.style.display = "none"; };
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), outer = chart.getBoundingClientRect();
      const [left, width] = [data.area.left * box.width, data.area.width * box.width];
      const at = (event.clientX - box.left - left) / width;
      if (at < -0.02 || at > 1.02) return hide();
      const [low, high] = data.area.x_range;
      const wanted = low + at * (high - low);
      const step = steps.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
      const x = box.left - outer.left + left + ((step - low) / (high - low)) * width;
      const top = box.top - outer.top + (1 - data.area.bottom - data.area.height) * box.height;
      cursor.style.cssText = `display:block;left:${x}px;top:${top}px;height:${data.area.height * box.height}px`;
      reading.textContent = "";
      const line = (text) => reading.appendChild(Object.assign(document.createElement("div"), { textContent: text }));
      line(`step ${step}`);
      for (const series of data.series) {
        const index = series.x.indexOf(step);
        if (index >= 0) line(`${series.label}: ${written(series.y[index])}`);
      }
      reading.style.display = "block";
      reading.style.left = x > outer.width / 2 ? `${x - reading.offsetWidth - 8}px` : `${x + 8}px`;
    });
  }

  const order = document.getElementById("pair-order");
  if (order) {
    const list = document.querySelector(".pairs");
    const given = [...list.children];
    order.addEventListener("change", () => {
      const gain = (pair) => Number(pair.dataset.gain);
      const sorted = [...given];
      if (order.value === "best") sorted.sort((a, b) => gain(b) - gain(a));
      if (order.value === "worst") sorted.sort((a, b) => gain(a) - gain(b));
      list.append(...sorted);
    });
  }

  const search = document.getElementById("settings-search");
  if (search) {
    const groups = [...document.querySelectorAll("#settings details")];
    search.addEventListener("input", () => {
      const wanted = search.value.trim().toLowerCase();
      for (const group of groups) {
        let shown = 0;
        for (const row of group.querySelectorAll("tr")) {
          row.hidden = wanted !== "" && !row.textContent.toLowerCase().includes(wanted);
          shown += row.hidden ? 0 : 1;
        }
        group.hidden = shown === 0;
        group.open = wanted !== "" && shown > 0;
      }
    });
  }
})();
"""
