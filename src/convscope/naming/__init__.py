"""Names of units: words whose scores on the images of a scan go with a unit's activations."""
