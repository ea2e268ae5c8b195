"""Proof: perplexity, exact answers and expert loads of checkpoints, alone and compared."""
