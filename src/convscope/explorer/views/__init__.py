"""Pages of the explorer: one module per page, each with a `build` function, and what they share."""
