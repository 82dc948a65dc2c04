"""What of a slide is looked at: tissue masks, quality, annotations, stain and the grid of patches."""
