"""Parts of HTML pages that need no script and no other file. Knows nothing of what they show."""
