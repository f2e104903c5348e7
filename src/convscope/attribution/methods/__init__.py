"""The heatmap methods, one short function each."""
