"""HTTP layer of the explorer: routes, security, requests in threads."""
