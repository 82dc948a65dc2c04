"""How the run's report looks."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: #1b1f24; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 0.75rem; }
header, section { background: #fff; border: 1px solid #d5d9df; border-radius: 8px; padding: 1rem; margin: 0 0 1rem; }
p { margin: 0 0 0.75rem; }
.state { display: inline-block; padding: 0.15rem 0.7rem; border-radius: 1rem; font-weight: 600; }
.state { overflow-wrap: anywhere; }
.good { background: #d8f0dd; color: #0b4f1d; }
.bad { background: #fde3df; color: #7d1508; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: 0.25rem 1rem; margin: 0; }
dt { color: #4b535d; }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.counts { display: flex; flex-wrap: wrap; gap: 0.75rem 2rem; list-style: none; margin: 0; padding: 0; }
.counts strong { display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 0.75rem 0.35rem 0; border-bottom: 1px solid #e4e7eb; }
th { color: #4b535d; font-weight: 600; white-space: nowrap; }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.share { display: flex; align-items: center; gap: 0.5rem; }
.bar { flex: 1; min-width: 3rem; height: 0.8rem; background: #e4e7eb; }
.bar span { display: block; height: 100%; background: #2b5fa8; }
.number { width: 3.2rem; text-align: right; white-space: nowrap; }
.word { white-space: nowrap; }
figure { margin: 0; }
figcaption { color: #4b535d; margin-bottom: 0.4rem; }
svg { display: block; width: 100%; height: 11rem; background: #f0f2f5; border-bottom: 2px solid #4b535d; }
svg rect { fill: #2b5fa8; }
.axis { display: flex; justify-content: space-between; color: #4b535d; }
a { color: #14458a; }
@media (max-width: 40rem) {
  main { padding: 0.5rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 0.5rem; }
  thead { position: absolute; clip-path: inset(50%); height: 1px; overflow: hidden; }
  table, tbody, tr, td { display: block; width: 100%; }
  tr { padding: 0.5rem 0; border-bottom: 1px solid #d5d9df; }
  td { display: grid; grid-template-columns: 7rem 1fr; gap: 0.5rem; border: 0; padding: 0.1rem 0; }
  td::before { content: attr(data-name); color: #4b535d; }
}
@media print { body { background: #fff; } header, section { border: 0; padding: 0; } }
"""
