"""Models: `spec.read_spec` finds the specification that `--model` names, `load.load_model` builds the network.

This room turns a model file, a source or a module into a frozen network with a transform and a digest. It knows
pixels and stains, but neither layers and explanations nor results.
"""
