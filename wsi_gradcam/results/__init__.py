"""What a run leaves in OUT: names, writers and readers of every file there, and their validation."""
