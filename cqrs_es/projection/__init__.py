"""From events to views: each event affects each view once, in order (G7)."""
