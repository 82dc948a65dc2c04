"""Models: `spec.read_spec` finds the specification that `--model` names, `load.load_model` builds the network."""
