"""The machine: crashing processes, stop signals, memory, threads and timers.

`isolation` survives crashing decoders, and finishes current work after Ctrl-C; `confinement` starts processes with few
permissions. Nothing here knows about slides, models or results.
"""
