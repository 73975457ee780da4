"""The style sheet of the page of a plan: light and dark as the reader's system is, and narrow on a phone."""

from __future__ import annotations

STYLE = """\
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --panel: #f3f5f7; --red: #c62828;
  --blue: #3b78c3; --sky: #8fbbe8; --navy: #1f4e87; --violet: #8763b8; --orange: #e07b39; --yellow: #e3b341;
  --green: #4d9a6a; --rose: #cf6a8d; --grey: #8c959f; --pale: #c3cad1; --waiting: #a5adb6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --ink: #e4e8ec; --soft: #9aa5b1; --line: #353c45; --panel: #1d232a; --red: #ff6b62;
    --blue: #5b98e0; --sky: #a9cdf2; --navy: #2f67a8; --violet: #a585d3; --orange: #e98c4e; --yellow: #e9c05a;
    --green: #62b181; --rose: #dd84a3; --grey: #7d8792; --pale: #566069; --waiting: #69737e;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.2rem; }
h3 { margin: 1.2rem 0 .3rem; font-size: 1rem; font-weight: 500; }
p { margin: 0 0 .75rem; max-width: 46rem; }
.under { color: var(--soft); }
.warnings { padding: .6rem 1rem .6rem 2rem; border-left: 4px solid var(--red); background: var(--panel); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1rem 0 0; }
.figures div { padding: .7rem .9rem; background: var(--panel); border-radius: 6px; }
.figures dt, .figures dd + dd { color: var(--soft); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.35rem; font-weight: 600; }
.figures dd + dd { font-weight: 400; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 0 0 .6rem; padding: 0; list-style: none; }
.legend, .row span, .numbers, .rows { font-size: .9rem; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
.row { display: grid; grid-template-columns: 13rem minmax(0, 1fr) 8.5rem; gap: 0 .8rem; align-items: center; }
.tight { grid-template-columns: 4rem minmax(0, 1fr) 6rem; }
.row > span:last-child { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.row > span:first-child { white-space: nowrap; }
svg { display: block; width: 100%; height: 1.25rem; margin: .1rem 0; background: var(--panel); }
.gap { stroke: var(--paper); stroke-width: 1px; vector-effect: non-scaling-stroke; }
.mark { stroke-width: 3px; vector-effect: non-scaling-stroke; }
.over { color: var(--red); }
.ends { display: flex; justify-content: space-between; color: var(--soft); }
.ends i { font-style: normal; }
summary { margin-top: .5rem; cursor: pointer; color: var(--soft); }
.numbers { overflow-x: auto; }
table { border-collapse: collapse; }
.numbers th, .numbers td { padding: .25rem .7rem; text-align: right; white-space: nowrap; }
.numbers th:first-child { padding-left: 0; text-align: left; }
.numbers tbody tr { border-top: 1px solid var(--line); }
.numbers, .rows { font-variant-numeric: tabular-nums; }
thead th { color: var(--soft); font-weight: 500; }
tbody th { font-weight: 600; }
.rows { width: 100%; }
.rows td { padding: .25rem .8rem .25rem 0; border-top: 1px solid var(--line); vertical-align: top; }
.rows td { overflow-wrap: anywhere; }
.rows td:first-child { width: 13rem; }
.rows td:nth-child(2) { min-width: 12rem; }
.rows td:last-child { color: var(--soft); }
.rows th { padding: 1rem 0 .3rem; text-align: left; }
@media (max-width: 40rem) {
  h1 { font-size: 1.25rem; }
  .row:not(.tight) { grid-template-columns: minmax(0, 1fr) auto; margin-bottom: .35rem; }
  .row:not(.tight) svg { grid-row: 2; grid-column: 1 / -1; }
  .tight { grid-template-columns: 3.4rem minmax(0, 1fr) 5.2rem; gap: 0 .5rem; }
  .rows td { display: inline-block; border: 0; padding: 0 .6rem 0 0; }
  .rows td:first-child, .rows td:nth-child(2) { width: auto; min-width: 0; }
  .rows td:nth-child(2) { font-weight: 600; }
  .rows td:last-child { display: block; }
  .rows tr { display: block; padding: .3rem 0; border-top: 1px solid var(--line); }
}
"""
