"""A run over an archive: its settings, plan, stages, the workload that explains slides, and the driver.

`types` defines workloads, executors and their tasks, so that this room knows neither the executors nor the audit. It
may know all rooms below: slides, tissue, models, cam and results.
"""
