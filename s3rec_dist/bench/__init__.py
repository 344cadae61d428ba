"""Benchmarks: the command, and what measures one part each."""
