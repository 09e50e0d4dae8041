"""Projections of the run folder onto experiment trackers."""
