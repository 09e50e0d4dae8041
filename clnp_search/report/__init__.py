"""What a reader sees of a run: figures from records."""
