"""The demo: explains real tissue with a bundled model, and measures how well the heatmap agrees with the truth.

`run` has the examples, and `slide` makes a whole slide from a micrograph. Nothing is downloaded. The demo uses the
public functions like any other program; the command line prints what it returns.
"""
