"""Reports: HTML pages that combine several kinds of results."""
