"""Slides with unique ids from what users name: files, folders, patterns, lists, URLs. Knows no pixels."""
