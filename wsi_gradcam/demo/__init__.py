"""The demo: explains real tissue with a model that comes with the package, and measures how well the heatmap agrees.

`run` has the two examples, `layout` and `slide` make a whole slide of a micrograph. Nothing is downloaded. It uses the
public calls as any program does; the command line prints what it returns.
"""
