"""Executors run the jobs of `workflow`: `serial` defines what is right, `dask` does the same on many processes."""
