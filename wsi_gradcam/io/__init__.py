"""Files on disks and in object stores, behind one interface.

`paths.storage_path` makes a path of either kind, `zarr_stores` opens Zarr groups there, `cache` has the one bounded
cache, and `urls` knows what a URL is and how to show it without its secrets. Nothing here knows about slides, models or
results.
"""
