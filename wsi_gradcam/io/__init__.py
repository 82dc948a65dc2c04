"""Files on disks and in object stores: paths, atomic writes, Zarr stores, URLs. Knows nothing of slides or models."""
