"""Processes, threads and signals of the machine that we run on. Nothing here knows of pathology, models or results."""
