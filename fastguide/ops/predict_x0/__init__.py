"""The predicted clean sample."""
