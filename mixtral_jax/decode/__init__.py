"""Tokens out: sampling, the two jitted steps, and the generation loop."""
