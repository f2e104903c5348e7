"""The explorer as a widget: requests travel over the channel between a notebook and its kernel, not over a port."""
