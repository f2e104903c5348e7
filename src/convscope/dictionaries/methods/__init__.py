"""Methods of dictionary learning, one per file."""
