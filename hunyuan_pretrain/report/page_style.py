"""What the page of a report adds to the style sheet of a plan's page."""

from __future__ import annotations

from hunyuan_pretrain.plan.page_style import STYLE as OF_PLAN

STYLE = (
    OF_PLAN
    + """\
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1.4rem 2rem; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 1.2rem 2rem; }
.plot { margin: 0; min-width: 0; }
.plot.wide { grid-column: 1 / -1; }
.plot figcaption { margin-bottom: .3rem; color: var(--soft); font-size: .9rem; }
.plot figcaption b { color: var(--ink); }
.plot .legend { margin: .15rem 0 0; overflow-wrap: anywhere; }
.plot .frame { display: grid; grid-template-columns: 3.6rem minmax(0, 1fr); }
.plot .frame svg { height: 10.5rem; margin: 0; }
.plot.wide .frame svg { height: 15rem; }
.plot .ticks { position: relative; }
.plot .ticks i, .plot .layers i, .ends.steps i { color: var(--soft); font: .75rem/1 system-ui, sans-serif; }
.plot .ticks i { position: absolute; right: .45rem; transform: translateY(50%); }
.plot .layers { display: flex; flex-direction: column; justify-content: space-between; }
.plot .layers { align-items: end; padding-right: .45rem; }
.heat .frame svg { height: 9rem; background: none; }
.heat + .legend { margin: .5rem 0 0; }
.ends.steps { margin: .25rem 0 0 3.6rem; }
.grid { fill: none; stroke: var(--line); stroke-width: 1px; vector-effect: non-scaling-stroke; }
.line { fill: none; stroke-width: 1.6px; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.band { fill-opacity: .22; stroke: none; }
.at { stroke-width: 1px; vector-effect: non-scaling-stroke; }
.planned { fill: none; stroke: var(--ink); stroke-width: 1.4px; stroke-dasharray: 5 4; }
.planned { vector-effect: non-scaling-stroke; }
.look { fill: transparent; }
.zoomable { cursor: crosshair; touch-action: pan-y pinch-zoom; -webkit-user-select: none; user-select: none; }
.zoomable:focus { outline: none; }
.zoomable:focus-visible, .zoom button:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
.chosen { fill: var(--blue); fill-opacity: .25; pointer-events: none; }
.zoom { position: fixed; inset: auto 0 .8rem; margin: auto; width: fit-content; max-width: calc(100% - 1.6rem); }
.zoom { display: flex; gap: .3rem 1rem; align-items: center; padding: .45rem .6rem .45rem .9rem; border-radius: 6px; }
.zoom { background: var(--ink); color: var(--paper); font-size: .9rem; }
.zoom[hidden] { display: none; }
.zoom button { flex: none; padding: .3rem .8rem; border: 0; border-radius: 4px; font: inherit; cursor: pointer; }
.zoom button { background: var(--paper); color: var(--ink); }
.look:hover { fill: var(--ink); fill-opacity: .08; }
.state { display: inline-block; padding: 0 .5rem; border-radius: 1rem; background: var(--panel); }
.run { overflow-wrap: anywhere; }
.events td:last-child { overflow-wrap: anywhere; white-space: normal; text-align: left; min-width: 14rem; }
.events td, .events th { vertical-align: top; text-align: left; }
.diff { overflow-wrap: anywhere; padding-left: 1.2rem; }
"""
)
