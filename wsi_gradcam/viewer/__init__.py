"""The viewer: a web server of a run's results and slides, and the page (in `page/`) that shows them in a browser.

`app.view` starts it. Requests pass its checks, reach the handlers in `app`, and are answered by `queries` (JSON),
`images` (tiles) or `files`. This room reads results, slides and audits, and writes nothing but marks, through
`results.marks`; it knows nothing of how runs are made.
"""
