"""One function per fast path, a plain-JAX reference beside each, chosen by one table."""
