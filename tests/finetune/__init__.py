"""Tests of mixtral_jax.finetune."""
