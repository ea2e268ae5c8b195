"""Serving: continuous batching of many requests on one model."""
