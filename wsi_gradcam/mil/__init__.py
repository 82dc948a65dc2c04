"""Multiple-instance learning: models that answer for a whole slide from the feature vectors of its patches.

This room reads files of slide-level models, builds their aggregators, and gives each patch of a bag its relevance for
the slide's answer. It knows models and targets, but neither what is stored of a run nor how one is carried out.
"""
