"""The command line: parses arguments, calls the package's public functions and prints what they return.

It may use every other room, and none uses it. `wsi-gradcam --help` and mistakes in arguments must be answered at once,
so that `main` and `flags` import whatever is heavy only when a command needs it.
"""
