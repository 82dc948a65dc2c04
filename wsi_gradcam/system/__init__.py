"""The machine: crashes of processes, signals to stop, memory, threads and timers.

`isolation` outlives decoders that crash, `stopping` finishes what is in work after Ctrl-C. Nothing here knows of
slides, models or results.
"""
