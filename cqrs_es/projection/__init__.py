"""From events to views: each event affects each view once, in order (DESIGN G7)."""
