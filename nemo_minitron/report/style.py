"""The page's style sheet: system fonts only, light and dark by `prefers-color-scheme`, always light in print."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b2430; --soft: #586474; --rule: #dde2e8; --grid: #eceff3; --wash: #f6f8fa;
  --teacher: #14795a; --pruned: #bf3545; --distilled: #1f5fc4; --ce: #ad5a00; --scratch: #7b4fa3;
  --aligned: #8a6a00;
  --heat-0: #0f2f66; --heat-1: #2456a3; --heat-2: #5585cb; --heat-3: #93b4e2; --heat-4: #c6d8f0; --heat-5: #e6eef8;
  --cut: #d03b2f; --kept: #1f5fc41a;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #12161c; --ink: #e4e9ef; --soft: #98a4b3; --rule: #2e3742; --grid: #222a34; --wash: #191f27;
    --teacher: #4cc398; --pruned: #f07a85; --distilled: #6ea6ff; --ce: #eda24f; --scratch: #bb94e0;
    --aligned: #d8bd4a;
    --heat-0: #d8e7ff; --heat-1: #9cc1f7; --heat-2: #6596dc; --heat-3: #3f6bab; --heat-4: #2b4a78; --heat-5: #1f3048;
    --cut: #ff7a6b; --kept: #6ea6ff24;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { margin: 0 0 .9rem; font-size: 1.05rem; font-weight: 600; color: var(--soft); overflow-wrap: anywhere; }
h2 { margin: 3.2rem 0 .4rem; padding-top: 1.1rem; border-top: 2px solid var(--ink); font-size: 1.4rem;
     letter-spacing: -.01em; overflow-wrap: anywhere; }
h3 { margin: 2.4rem 0 .5rem; font-size: 1.1rem; }
h4 { margin: 0 0 .35rem; font-size: .95rem; }
p { margin: .5rem 0; max-width: 46rem; }
nav { margin: 1rem 0; } nav a { margin-right: 1.2rem; color: var(--distilled); }
.lead { margin: 0 0 .8rem; font-size: 1.5rem; line-height: 1.35; letter-spacing: -.012em; max-width: none; }
.summary { font-size: 1.05rem; }
.note, .caption, figcaption { color: var(--soft); font-size: .875rem; line-height: 1.5; }
.missing { padding: .7rem .9rem; border-left: 3px solid var(--rule); color: var(--soft); background: var(--wash); }
.warning { border-left-color: var(--cut); overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .85em; }
pre { margin: .6rem 0; padding: .8rem 1rem; overflow-x: auto; background: var(--wash); border: 1px solid var(--rule);
      border-radius: 6px; line-height: 1.5; }
p code, td code { white-space: nowrap; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: 12.5rem 1fr; gap: .55rem 1rem; margin: 1rem 0; font-size: .95rem; }
dt { font-weight: 600; } dd { margin: 0; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 0 1.6rem; margin: 1.2rem 0; }
.tile { padding: .8rem 0 .9rem; border-top: 1px solid var(--rule); }
.tile .name { font-size: .85rem; font-weight: 600; color: var(--soft); }
.tile .figure { font-size: 1.9rem; font-weight: 600; line-height: 1.25; letter-spacing: -.02em;
                font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile .figure .unit { font-size: .9rem; font-weight: 400; letter-spacing: 0; color: var(--soft); }
.tile p { margin: .15rem 0 0; font-size: .85rem; line-height: 1.45; color: var(--soft); }

.scroll { overflow-x: auto; margin: .7rem 0 .3rem; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem 0 .42rem .75rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid var(--rule); }
thead th { vertical-align: bottom; font-weight: 600; color: var(--soft); font-size: .8rem; line-height: 1.35; }
thead th .unit { display: block; font-weight: 400; }
tbody th, thead th:first-child { padding-left: 0; text-align: left; }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--paper); padding-right: .4rem; }
td.words { text-align: left; color: var(--soft); }
tr.strong th, tr.strong td { font-weight: 650; }
tr.total th, tr.total td { border-bottom: 0; font-weight: 600; }

figure { margin: 1.4rem 0 1.8rem; break-inside: avoid; }
figcaption { margin-top: .3rem; max-width: 46rem; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.2rem; margin: 0 0 .5rem; padding: 0; list-style: none;
          font-size: .85rem; color: var(--soft); }
.legend svg { width: 26px; height: 12px; margin-right: .45rem; vertical-align: -1px; }
svg.chart { display: block; width: 100%; height: auto; font-size: 12.5px; }
svg.narrow { display: none; }
svg text { fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .tick { fill: var(--soft); font-size: 12px; }
svg .end { text-anchor: end; } svg .centre { text-anchor: middle; } svg .middle { dominant-baseline: central; }
svg .strong, svg .label, svg .value { font-weight: 600; }
svg .label { fill: currentColor; }
.grid { stroke: var(--grid); } .axis { stroke: var(--soft); stroke-opacity: .6; }
.curve { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.curve.faint { stroke-width: 1.3; stroke-opacity: .45; }
.reference { stroke: currentColor; stroke-width: 1.5; stroke-dasharray: 5 4; }
.stem { stroke: currentColor; stroke-width: 2; stroke-opacity: .35; }
.mark { fill: currentColor; stroke: var(--paper); stroke-width: 1; }
.bar.kept { fill: var(--distilled); }
.bar.cut { fill: none; stroke: var(--cut); stroke-width: 1.3; stroke-dasharray: 3 2; }
.kept-area { fill: var(--kept); } .cut-line { stroke: var(--cut); stroke-width: 2; }
.strip.cut { opacity: .3; }
.heat-0 { fill: var(--heat-0); } .heat-1 { fill: var(--heat-1); } .heat-2 { fill: var(--heat-2); }
.heat-3 { fill: var(--heat-3); } .heat-4 { fill: var(--heat-4); } .heat-5 { fill: var(--heat-5); }
.teacher { color: var(--teacher); } .pruned { color: var(--pruned); } .distilled { color: var(--distilled); }
.ce { color: var(--ce); } .scratch, .scratch_until { color: var(--scratch); } .aligned { color: var(--aligned); }

@media screen and (max-width: 640px) {
  body { padding: 1.4rem 1rem 3rem; }
  .lead { font-size: 1.2rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 0 1.1rem; }
  th, td { padding-left: .6rem; } table { font-size: .82rem; } thead th { font-size: .75rem; }
  dl { grid-template-columns: 1fr; gap: .1rem; } dd { margin-bottom: .6rem; }
  .tile .figure { font-size: 1.5rem; }
  svg.wide { display: none; } svg.narrow { display: block; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  table { font-size: 8pt; } thead th { font-size: 7.5pt; } th, td { padding-left: .5rem; }
  .scroll { overflow: visible; } .tiles { grid-template-columns: repeat(4, 1fr); gap: 0 1rem; }
  .tile .figure { font-size: 1.4rem; }
  h2, h3, h4 { break-after: avoid; } tr, .tile { break-inside: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
