"""Scans of data sets: one pass through a network, merged into a store."""
