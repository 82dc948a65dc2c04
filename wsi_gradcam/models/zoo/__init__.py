"""Small CNNs that come with the package, each beside its weights, model file and model card."""
