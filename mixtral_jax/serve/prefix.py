"""Which prefixes of prompts have their keys and values at hand: bookkeeping, no arrays.

Pure Python. Whole chunks are kept, each under the digest of everything that its keys and values
depend on: who may share it, the adapter, and all tokens up to its end. A digest that is present
therefore proves the whole prefix, and the longest run of present chunks is the longest prefix.
"""

from __future__ import annotations

import array
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Digest = bytes


def chunk_digests(
    prompt_ids: Sequence[int], chunk: int, *, cache_key: str, adapter_id: str | None
) -> Iterator[Digest]:
    """The digest of each whole chunk of a prompt, in order.

    Only tokens before the prompt's last are read ahead of decoding, so a chunk that ends with the
    last token is not one.
    """
    # Lengths first: no two pairs of names run together to the same bytes.
    names = [cache_key, "" if adapter_id is None else f"+{adapter_id}"]
    seed = b"".join(len(n.encode()).to_bytes(8, "little") + n.encode() for n in names)
    digest = hashlib.blake2b(seed, digest_size=32).digest()
    for end in range(chunk, len(prompt_ids), chunk):
        tokens = array.array("q", prompt_ids[end - chunk : end]).tobytes()
        digest = hashlib.blake2b(digest + tokens, digest_size=32).digest()
        yield digest


class Block(NamedTuple):
    """A chunk that is kept, by the number under which the device knows it."""

    id: int
    size: int


class PrefixCache:
    """Least recently used chunks leave first. Not thread-safe: the engine's thread owns it.

    Args:
        max_bytes: of all kept chunks; 0 keeps none.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._blocks: OrderedDict[Digest, Block] = OrderedDict()
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def longest(self, digests: Sequence[Digest]) -> list[int]:
        """Ids of the chunks of the longest prefix at hand."""
        found = []
        for digest in digests:
            block = self._blocks.get(digest)
            if block is None:
                break
            found.append(block.id)
        # The first chunk last: without it the others are of no use, so they leave before it.
        for digest in reversed(digests[: len(found)]):
            self._blocks.move_to_end(digest)
        return found

    def has(self, digest: Digest) -> bool:
        """Whether a chunk is kept."""
        return digest in self._blocks

    def keep(
        self, digest: Digest, size: int, before: Sequence[Digest] = ()
    ) -> tuple[int | None, list[int]]:
        """Makes room for a chunk.

        Args:
            digest: of the chunk, not kept yet.
            size: its bytes.
            before: of the chunks that it follows, without which it is of no use.

        Returns:
            Its new id (None: there is no room beside those before it), and the ids that left.
        """
        assert digest not in self._blocks
        spared = set(before)
        others = [d for d in self._blocks if d not in spared]
        room = self.max_bytes - self.num_bytes + sum(self._blocks[d].size for d in others)
        if size > room:
            return None, []
        left = []
        for other in others:
            if self.num_bytes + size <= self.max_bytes:
                break
            block = self._blocks.pop(other)
            self.num_bytes -= block.size
            left.append(block.id)
        self._next_id += 1
        self._blocks[digest] = Block(self._next_id, size)
        self.num_bytes += size
        self.longest([*before, digest])
        return self._next_id, left
