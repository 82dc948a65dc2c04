"""From files, folders, patterns, lists and URLs to slides with unique ids.

`find` returns them as `SlideEntry`s, `lists` reads lists with mpp, masks and labels, `search` walks folders. This room
knows which files are slides, but no pixels; it may use `slides`.
"""
