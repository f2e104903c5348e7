"""Metrics of heatmaps, and the comparison of methods."""
