"""Weights in few bits: makers, a source that quantizes while it is read, and the command."""
