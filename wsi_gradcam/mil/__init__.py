"""Multiple-instance learning: models that answer for a whole slide from the feature vectors of its patches.

This room reads files of slide-level models, builds their aggregators, and gives each patch of a bag its relevance to
the slide's answer. It knows models and targets, but neither what a run stores nor how it is carried out.
"""
