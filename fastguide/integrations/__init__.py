"""One module for each project whose calls fastguide takes over."""
