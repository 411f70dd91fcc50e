"""The bank's read side."""
