"""Heatmaps: methods, targets and the runner that shares passes between them."""
