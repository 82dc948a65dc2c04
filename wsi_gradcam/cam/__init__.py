"""Class activation maps: taps, layers, targets, methods, and the engine that combines them.

This room turns images and targets into logits and raw signed maps. It knows models, but neither slide files nor
results; `facts` and `targets` need no torch, so that clients of a cluster stay light.
"""
