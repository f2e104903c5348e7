"""A server of the Model Context Protocol: convscope's functions as tools for agents."""
