"""The measures of the audit: pure functions of a model, patches and maps, with their formulae and papers.

They import torch; the client of a cluster never imports this package.
"""
