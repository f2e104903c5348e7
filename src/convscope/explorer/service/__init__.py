"""Computations of the explorer, independent of the web."""
