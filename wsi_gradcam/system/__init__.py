"""Processes, their memory, signals and threads. Nothing here knows of slides' contents, models or results."""
