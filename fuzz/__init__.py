"""Hostile bytes for the core: docs/fuzzing.md."""
