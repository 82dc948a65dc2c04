"""What a run leaves on disk, and who writes it."""
