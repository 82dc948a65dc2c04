"""The audit: can an explanation be believed?

`questions` has a module for each question: what is measured, how it is judged, its figures and its words. `measures`
are pure functions on tensors, which `stages` call on workers; `running` and `images` are the two public calls; `report`
writes the pages. This room may import runs and executors; neither imports it.
"""
