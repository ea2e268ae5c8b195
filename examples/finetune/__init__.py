"""Recipes for ``python -m mixtral_jax.finetune``, and a task that the embedded model never saw."""
