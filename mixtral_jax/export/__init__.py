"""Serialized programs: prefill and decode_step for one platform, to run without this package."""
