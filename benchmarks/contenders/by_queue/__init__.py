"""The bank as a team would write it without a framework for it, fed by a queue, in two ways."""
