"""Small CNNs that come with the package, each beside its weights, model file and model card.

Their code, comments included, is part of their digests: results that exist are continued only while it stays the same.
"""
