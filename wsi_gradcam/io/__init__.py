"""Files on disks and in object stores, behind one interface.

`paths.storage_path` makes a path of either kind, `zarr_stores` opens Zarr groups there, `cache` holds the one bounded
cache, `urls` what a URL is and how it is shown without its secrets. Nothing here knows of slides, models or results.
"""
