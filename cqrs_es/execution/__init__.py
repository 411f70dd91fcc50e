"""From commands to outcomes: one code path for one command or for many."""
