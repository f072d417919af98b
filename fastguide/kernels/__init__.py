"""The operations in Triton, one file each; `fastguide.backends` calls them as the backend ``triton``."""
