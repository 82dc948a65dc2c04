"""Class activation maps: the tap, the layer, the targets, the methods and the engine that joins them."""
