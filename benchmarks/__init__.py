"""Benchmarks, one file a question; see README.md. Not part of the installed package."""
