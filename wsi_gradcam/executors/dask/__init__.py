"""Many processes through Dask: on this machine, or on a cluster that a scheduler address names.

Futures, not collections: a task is a slide and a few numbers, a window of them is in flight, workers keep the model
between tasks and write their own results. Several slides are in flight, so that no worker waits at a slide's end.
Only the modules of this package import distributed.
"""

from wsi_gradcam.executors.dask.executor import DaskExecutor
from wsi_gradcam.executors.dask.workers import ask_workers

__all__ = ["DaskExecutor", "ask_workers"]
