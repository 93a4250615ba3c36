"""Formats of other projects: their names and configurations as ours, and their files."""
