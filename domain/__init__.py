"""The bank's rules, free of I/O."""
