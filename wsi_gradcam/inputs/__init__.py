"""Turns files, folders, patterns, lists and URLs into slides with unique ids.

`find` returns them as `SlideEntry`s, `lists` reads lists with mpp, masks and labels, and `search` walks folders. This
room knows which files are slides, but nothing about pixels; it may use `slides`.
"""
