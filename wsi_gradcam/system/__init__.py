"""The machine: crashes of processes, signals to stop, memory, threads and timers.

`isolation` outlives decoders that crash, and finishes what is in work after Ctrl-C; `confinement` has processes that
may do little. Nothing here knows of slides, models or results.
"""
