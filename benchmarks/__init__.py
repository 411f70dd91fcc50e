"""Benchmarks, each a module that answers the question in its docstring's first line."""
