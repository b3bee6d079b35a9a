"""The names of array axes, as the shape annotations and `einops` patterns of this package use them.

========= =====================================================================
batch     texts read together, padded to one length
pos       token positions of a text
row       one token position of the cache, the same position in both models
d_model   width of the residual stream
d_sae     features of a dictionary
k         active features of a row
vocab     rows of the embedding table
layer     residual streams: 0 is the one after block 0
edit      one (row, direction, dose) whose effect is measured
cluster   tasks: the unit of every interval and permutation
column    quantities that share rows and clusters
========= =====================================================================
"""
