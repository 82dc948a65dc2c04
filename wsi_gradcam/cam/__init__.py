"""Class activation maps: the tap, the layer, the targets, the methods and the engine that joins them.

This room turns images and targets into logits and raw signed maps. It knows models, but no slides' files and no
results; `facts` and `targets` need no torch, so that clients of a cluster stay thin.
"""
