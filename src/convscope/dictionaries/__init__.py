"""Sparse dictionaries of a layer's activations: training, features as a layer, and how well they stand in for it."""
