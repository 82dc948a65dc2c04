"""The parts of a slide that are explained: tissue masks, quality, annotations, stain, and the grid of patches.

This room sees thumbnails and areas, never a model.
"""
