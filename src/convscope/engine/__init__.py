"""The engine: models, their layer tables, and passes through a network with hooks."""
