"""Style sheet and script of the page."""

# Readable at the width of a phone, in the dark and in print.
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #5d6672; --rule: #dde2e8;
  --s0: #0b62c4; --s1: #c2410c; --pale: #c3cad3; --on: #ffffff }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --paper: #14171b; --soft: #9aa4b0; --rule: #2c333b;
  --s0: #6cb0ff; --s1: #ff9d5c; --pale: #4a545f; --on: #14171b } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid var(--rule) }
p { margin: .6rem 0 .3rem } .soft, .legend { color: var(--soft) } .legend { font-size: .85rem; margin: .1rem 0 }
a { color: var(--s0) } nav { font-size: .9rem; line-height: 1.9 } nav a { margin-right: .9rem; white-space: nowrap }
.big { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0 }
.big div { flex: 1 1 8.5rem; border: 1px solid var(--rule); border-radius: .5rem; padding: .6rem .9rem;
  color: var(--soft); font-size: .9rem }
.big b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; color: var(--ink) }
.scroll { overflow-x: auto } .plots { display: grid; gap: .5rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)) }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top }
th { color: var(--soft); font-weight: 500 } td { font-variant-numeric: tabular-nums; overflow-wrap: break-word }
td:first-child { min-width: 8rem; overflow-wrap: anywhere } td:last-child { min-width: 5rem; overflow-wrap: anywhere }
td:nth-child(n + 2):not(:last-child) { white-space: nowrap }
pre { background: color-mix(in srgb, var(--rule) 45%, transparent); padding: .6rem .8rem; border-radius: .4rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem } code { overflow-wrap: anywhere }
select { font: inherit; font-size: .9rem; max-width: 100% }
svg.plot { display: block; width: 100%; height: auto; max-width: 42rem }
svg text { fill: var(--soft); font-size: 12px }
svg text.in { fill: var(--ink); font-size: 11px; pointer-events: none } svg text.on { fill: var(--on) }
.grid { stroke: var(--rule) } .line { fill: none; stroke-width: 2 } .mark { fill: var(--s0) }
.line.s0, .bar.s0, .thin.s0 { stroke: var(--s0) } .line.s1 { stroke: var(--s1) }
.dot.s0 { fill: var(--s0) } .dot.s1 { fill: var(--s1) } .bar { stroke-width: 3; stroke-opacity: .55 }
.wide { stroke: var(--pale); stroke-width: 11 } .thin { stroke-width: 4 }
.before { fill: var(--pale) } .cell { fill: var(--s0) }
.cell.below { fill: var(--s1) } [data-site] { cursor: pointer } .cell[data-site]:hover { stroke: var(--ink) }
.end { stroke: var(--s1) } .end.old { stroke-dasharray: 3 3 }
.legend span::before { content: "■ "; }
.legend .s0::before { color: var(--s0) } .legend .s1::before { color: var(--s1) }
.legend .pale::before { color: var(--pale) }
@media (min-width: 48rem) { table.sites td:first-child { min-width: 21rem } }
@media (max-width: 30rem) { body { padding: 1rem .8rem 3rem } svg text { font-size: 14px }
  table.sites tr { display: grid; grid-template-columns: 4rem 6rem 1fr }
  table.sites :is(td, th):is(:first-child, :last-child) { grid-column: 1 / -1 }
  table.sites td:not(:last-child) { border: 0; padding-bottom: 0 }
  .big b { font-size: 1.2rem } }
@media print { :root { --ink: #000; --paper: #fff; --soft: #444; --rule: #ccc; --s0: #0b62c4; --s1: #c2410c;
  --pale: #c3cad3 } body { max-width: none; padding: 0; font-size: 11px } nav { display: none }
  select { appearance: none; border: 0; padding: 0; background: none; color: inherit }
  * { print-color-adjust: exact } h2, p { break-after: avoid } svg, tr, .plots > div { break-inside: avoid }
  .scroll { overflow: visible } svg.plot { min-width: 0 !important } .plots { grid-template-columns: 1fr 1fr } }
"""

# Draws the distribution that is chosen in the list, or by a cell of a heat map, or by a name in the table.
SCRIPT = """
const list = document.getElementById("site"), shape = document.getElementById("shape");
if (list) {
  const all = JSON.parse(document.getElementById("distributions").textContent);
  const draw = () => {
    const it = all[list.value];
    shape.querySelector(".before").setAttribute("d", it.before);
    shape.querySelector("path.line").setAttribute("d", it.after);
    for (const line of shape.querySelectorAll("[data-end]"))
      for (const x of ["x1", "x2"]) line.setAttribute(x, it.ends[line.dataset.end]);
    for (const text of shape.querySelectorAll("[data-text]")) text.textContent = it[text.dataset.text];
    document.getElementById("facts").textContent = it.facts;
  };
  list.addEventListener("change", draw);
  document.addEventListener("click", event => {
    const name = event.target.closest("[data-site]")?.dataset.site;
    if (!(name in all)) return;
    list.value = name;
    draw();
    document.getElementById("distribution").scrollIntoView({ behavior: "smooth" });
  });
  draw();
}
"""
