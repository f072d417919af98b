"""Drop-in replacements: one module for each project whose functions fastguide can replace."""
