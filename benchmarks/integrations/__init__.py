"""The drop-ins, beside the projects whose calls they take over."""
