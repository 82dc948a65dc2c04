"""A run over an archive: its settings and plan, the workload of explaining, its stages, and the driver.

`types` says what a workload, an executor and their tasks are, so that this room knows neither the executors nor the
audit. It may know all rooms below: slides, tissue, models, cam and results.
"""
