"""The demo: a slide laid out from a real micrograph, and the main job on it."""
