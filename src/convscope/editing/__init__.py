"""Change units or positions of a layer, and measure what that does to the network's answers."""
