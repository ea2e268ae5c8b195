"""The embedded model: its text, its training, its score. See README.md."""
