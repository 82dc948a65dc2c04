"""The results of a run: names, writers and readers of every file in OUT, and their validation.

This room knows slides, models' facts and storage paths, but not how a run is planned or carried out; everything about
formats on disk is defined here.
"""
