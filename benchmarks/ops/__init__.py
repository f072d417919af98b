"""The operations: one module for each, named after it."""
