"""The drop-in replacements, against the projects that they replace."""
