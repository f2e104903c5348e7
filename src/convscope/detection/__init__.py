"""Detection: boxes with classes and scores."""
