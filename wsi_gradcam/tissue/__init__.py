"""The parts of a slide to be explained: tissue masks, quality, annotations, stain, the grid of patches. No models."""
