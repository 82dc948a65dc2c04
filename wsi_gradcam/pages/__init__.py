"""HTML by Jinja templates: the environment, the layout and the macros that all pages share.

Templates lie beside the code that fills them and are named by their path in the package. This room knows nothing of
what pages show; it may use `system`.
"""
