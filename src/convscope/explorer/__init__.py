"""The explorer: a network's pages in the browser, live (`server`, `embed`) and published (`publish`)."""
