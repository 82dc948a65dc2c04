"""How the audit's report looks, beyond what all reports share."""

from wsi_gradcam.pages.style import STYLE

AUDIT_STYLE = (
    STYLE
    + """
h3 { font-size: 1rem; margin: 1.25rem 0 0.5rem; }
.open { background: #fdf0d0; color: #5c4200; }
.state { white-space: nowrap; }
header .state { white-space: normal; }
nav a { margin-right: 1rem; }
.how { color: #3a424c; max-width: 46rem; }
figure { margin: 0 0 1rem; }
figure svg { height: auto; background: none; border: 0; max-width: 100%; }
figure svg rect { fill: revert-layer; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
.patches { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
.verdict { display: grid; grid-template-columns: 7.5rem 1fr; gap: 0.25rem 1rem; padding: 0.6rem 0; }
.verdict { border-bottom: 1px solid #e4e7eb; }
.verdict p { margin: 0 0 0.25rem; }
.verdict ul { margin: 0; padding: 0; list-style: none; color: #4b535d; font-size: 0.9rem; }
.verdict ul { font-variant-numeric: tabular-nums; }
.of { color: #4b535d; }
.patches figure { border: 1px solid #e4e7eb; border-radius: 6px; padding: 0.5rem; }
.patches img { width: 49%; height: auto; image-rendering: auto; }
.patches .three > img { width: 32.5%; }
.overview { max-width: 100%; height: auto; }
.scale { width: 100%; max-width: 24rem; height: auto; display: block; }
.square { display: grid; grid-template-columns: max-content 1fr 1fr; gap: 0.5rem; }
.square > div { border: 1px solid #d5d9df; border-radius: 6px; padding: 0.6rem; }
.square > .name { border: 0; color: #4b535d; font-weight: 600; }
.square > .here { border: 2px solid #14458a; background: #eef4fc; }
td { overflow-wrap: break-word; }
details { overflow-x: auto; margin: 0.5rem 0; }
summary { cursor: pointer; color: #14458a; }
@media (max-width: 40rem) { .square, .verdict { grid-template-columns: 1fr; } }
"""
)
