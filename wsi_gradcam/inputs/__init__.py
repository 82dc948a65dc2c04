"""From what a user names (files, folders, patterns, lists, URLs) to slides with unique ids.

`find` returns them as `SlideEntry`s, `lists` reads lists with mpp, masks and labels, `search` walks folders. This room
knows which files are slides, and no pixels; it may use `slides`.
"""
