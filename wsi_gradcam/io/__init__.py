"""Where bytes lie: folders, object stores, atomic writes, URLs, Zarr stores. Knows nothing of slides or models."""
