"""The checker behind the import hook of conftest.py."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# As type checkers read PEP 484: an int is welcome where a float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
