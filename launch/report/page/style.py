"""The style of the page: colors for light and dark, of which the series' are told apart by the color-blind."""

from __future__ import annotations

CSS = """\
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --quiet: #57606a;
  --line: #d5dae0; --bad: #b3430a; --good: #00745a;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b4578d; --c4: #b87a00; --c5: #3a94c9; --c6: #444c56;
  --waiting: #b9c0c8; --fewer: #7fc8b0; --shutdown: #8b949e; --compile: #8a6fb0; --restore: #a0522d; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0f1318; --card: #181d24; --ink: #e6e9ed; --quiet: #9aa4af; --line: #333b45; --bad: #ff9e64;
    --good: #4fd1a5; --c0: #4aa8e0; --c1: #f0803c; --c2: #2cc295; --c3: #dd8fbd; --c4: #e8b13c; --c5: #86c8ee;
    --c6: #c3cad2; --waiting: #57606a; --fewer: #2f7d68; --shutdown: #7d8691; --compile: #b59add;
    --restore: #d08a62; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 20px 24px 48px; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 6px; } h2 { font-size: 18px; margin: 34px 0 8px; }
h3 { font-size: 15px; margin: 0 0 8px; }
.grid + h3 { margin-top: 16px; } p { margin: 4px 0; } .quiet { color: var(--quiet); font-size: 13px; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.card, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.card { min-width: 0; max-width: 640px; } .wide { max-width: none; grid-column: 1 / -1; }
.tiles { display: grid; gap: 12px; margin: 18px 0 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr)); }
.tile b { display: block; font-size: 22px; line-height: 1.3; }
.tile small { color: var(--quiet); font-size: 13px; } .bad b { color: var(--bad); } .good b { color: var(--good); }
.tile .name { font-size: 13px; font-weight: 600; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, "Liberation Sans", sans-serif;
  fill: var(--ink); }
svg .axis { fill: var(--quiet); } svg .rule { stroke: var(--line); fill: none; }
svg .ideal { stroke: var(--quiet); stroke-dasharray: 5 4; fill: none; }
svg .heat { image-rendering: pixelated; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; list-style: none; margin: 8px 0 0; padding: 0;
  font-size: 13px; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 6px;
  vertical-align: -1px; }
.bar { display: grid; grid-template-columns: minmax(90px, 170px) 1fr; gap: 10px; align-items: center; margin: 6px 0; }
.bar > span { font-size: 13px; }
.bar > div { display: flex; height: 26px; border-radius: 4px; overflow: hidden; background: var(--line); }
.bar i { font-style: normal; font-size: 12px; font-weight: 600; color: var(--paper); overflow: hidden;
  text-align: center; line-height: 26px; white-space: nowrap; }
.bar .pale { color: var(--ink); }
.fall { display: grid; grid-template-columns: minmax(110px, 34%) 1fr 62px; gap: 2px 10px; align-items: center;
  font-size: 13px; }
.fall > div { position: relative; height: 18px; border-left: 1px solid var(--line);
  border-right: 1px dashed var(--quiet); }
.fall i { position: absolute; top: 1px; bottom: 1px; border-radius: 2px; min-width: 1px; }
.fall b { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; } .total { font-weight: 700; }
.causes { grid-template-columns: minmax(110px, 34%) 1fr 116px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 5px 10px; text-align: left; border-bottom: 1px solid var(--line); vertical-align: bottom;
  overflow-wrap: normal; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td:first-child { font-weight: 600; }
td:first-child:not(.n) { min-width: 130px; overflow-wrap: anywhere; } ul { padding-left: 20px; } li { margin: 4px 0; }
.tabs > input { position: absolute; opacity: 0; }
.tabs > label { display: inline-block; max-width: 100%; padding: 5px 12px; margin: 0 6px 8px 0;
  border: 1px solid var(--line); border-radius: 16px; font-size: 13px; cursor: pointer; }
.tabs > input:checked + label { background: var(--c0); border-color: var(--c0); color: var(--paper); font-weight: 600; }
.tabs > input:focus-visible + label { outline: 2px solid var(--c1); outline-offset: 2px; }
.tabs > .pane { display: none; } details summary { cursor: pointer; margin: 10px 0; }
"""
