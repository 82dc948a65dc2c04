"""From what a user names (files, folders, patterns, lists, URLs) to slides with ids that never collide."""
