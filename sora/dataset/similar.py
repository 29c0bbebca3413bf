"""Near-duplicates: videos whose perceptual signatures differ in few bits.

A signature is 192 bits (`VideoRecord.signature`). All pairs of a million videos are too many to compare. Two
signatures that differ in at most d bits agree on at least k of any d + k bands, so only those that share bands are
compared (the pigeonhole argument of multi-index hashing, Norouzi et al. 2012). Departures from the paper: the bits are
assigned to bands so that each band is equally telling (black bars make whole runs of bits equal), a bucket that is
still large is split by another shared band instead of being searched with flipped bits, and pairs that are already
connected are skipped, since only connectivity is needed.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from sora.core.errors import InputError

BITS = 192
_LEVELS = 3  # bands by which a bucket may be narrowed
_BUCKET = 48  # a larger one is narrowed first; at the last level each is compared with this many neighbours


def words(signatures: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Signatures as (n, 3) uint64, and (n,) bool: False if there is none ("" or None: too little texture)."""
    texts = list(signatures)
    known = np.array([isinstance(text, str) and len(text) == BITS // 4 for text in texts], bool)
    packed = bytes.fromhex("".join(text if ok else "0" * (BITS // 4) for text, ok in zip(texts, known, strict=True)))
    return np.frombuffer(packed, ">u8").astype(np.uint64).reshape(-1, BITS // 64), known


def distance(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The number of bits that differ; (…, 3) uint64 each, broadcast."""
    bits: np.ndarray = np.bitwise_count(left ^ right).sum(axis=-1, dtype=np.int16)
    return bits


def near_duplicates(manifest: pd.DataFrame, bits: int) -> np.ndarray:
    """Pairs of rows whose signatures differ in at most `bits` bits: (pairs, 2) int64 row numbers, the smaller first.

    Not all pairs, but enough to connect what they all connect (a spanning set): at most rows - 1. Rows without a
    signature are near nothing. If more than 48 different signatures agree on three bands and are not connected
    yet, each is compared with 48 others only, so such a pair may be missed. A million rows take 10 to 25 s.
    """
    signatures, known = words(manifest["signature"])
    rows = np.flatnonzero(known)
    if len(rows) < 2:
        return np.empty((0, 2), np.int64)
    order = np.lexsort(signatures[rows].T)
    rows = rows[order]
    equal = (signatures[rows[1:]] == signatures[rows[:-1]]).all(axis=1)
    chains = np.stack([rows[:-1][equal], rows[1:][equal]], axis=1)
    distinct = rows[np.concatenate([[True], ~equal])]
    links = distinct[_Search(signatures[distinct], bits).run()]
    pairs = np.sort(np.concatenate([chains, links]), axis=1)
    return pairs[np.lexsort(pairs.T[::-1])]


class _Search:
    """Links between distinct signatures (n, 3) uint64."""

    def __init__(self, signatures: np.ndarray, bits: int) -> None:
        self.signatures = signatures
        self.bits = bits
        self.component = np.arange(len(signatures))
        self.links: list[np.ndarray] = []

    def run(self) -> np.ndarray:
        """(links, 2) positions."""
        everyone = np.arange(len(self.signatures))
        together = np.zeros_like(everyone)
        if self.bits and len(everyone) <= 2048:
            self._compare(everyone, together, reach=len(everyone))
        elif self.bits:
            bands = self._bands(self.bits + _LEVELS)
            for first in range(self.bits + 1):
                self._narrow(everyone, together, bands, first, 1)
        return np.concatenate([np.empty((0, 2), np.int64), *self.links])

    def _bands(self, count: int) -> list[np.ndarray]:
        """One dense key per signature for each band: the bits are assigned in turns, the most telling first."""
        share = np.array([self._bit(bit).mean() for bit in range(BITS)])
        telling = np.argsort(np.abs(share - 0.5), kind="stable")
        bands = []
        for band in range(count):
            key = np.zeros(len(self.signatures), np.int64)
            for bit in telling[band::count]:
                key = (key << 1) | self._bit(bit)
            bands.append(np.unique(key, return_inverse=True)[1].astype(np.int32))
        return bands

    def _bit(self, bit: int) -> np.ndarray:
        return ((self.signatures[:, bit // 64] >> np.uint64(bit % 64)) & np.uint64(1)).astype(np.int64)

    def _narrow(self, members: np.ndarray, bucket: np.ndarray, bands: list[np.ndarray], band: int, level: int) -> None:
        """Splits each bucket by one more band; compares within small buckets, narrows the large ones further."""
        # Sorting values is several times faster than sorting indices, so the place is kept in the low bits: for a
        # million signatures 20 bits of bucket, 15 of band and 20 of place.
        low = len(members).bit_length()
        width = int(bands[band].max()).bit_length()
        if int(bucket[-1]).bit_length() + width + low > 63:
            raise InputError(f"{len(self.signatures):,} videos are too many to look for near-duplicates",
                             fix="set validate.duplicates: false")  # fmt: skip
        key = np.sort(((bucket << width | bands[band][members]) << low) | np.arange(len(members)))
        members, key = members[key & ((1 << low) - 1)], key >> low
        starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
        sizes = np.diff(np.concatenate([starts, [len(members)]]))
        bucket = np.repeat(np.arange(len(starts)), sizes)
        # A bucket whose members are already connected has nothing to add.
        component = self.component[members]
        news = np.logical_or.reduceat(component != np.repeat(component[starts], sizes), starts)
        small = (news & ((sizes <= _BUCKET) | (level == _LEVELS)))[bucket]
        self._compare(members[small], bucket[small], reach=_BUCKET)
        large = (news & (sizes > _BUCKET))[bucket]
        if level < _LEVELS and large.any():
            members, bucket = members[large], bucket[large]
            for further in range(band + 1, self.bits + level + 1):
                self._narrow(members, bucket, bands, further, level + 1)

    def _compare(self, members: np.ndarray, bucket: np.ndarray, reach: int) -> None:
        """Links members of one bucket (buckets are consecutive) that are at most `reach` places apart."""
        signatures = self.signatures[members]
        first = np.ascontiguousarray(signatures[:, 0])
        near = []
        for step in range(1, min(reach + 1, len(members))):
            same = bucket[step:] == bucket[:-step]
            if not same.any():
                break
            # One word rules out most pairs, at a third of the reading.
            likely = np.flatnonzero(same & (np.bitwise_count(first[step:] ^ first[:-step]) <= self.bits))
            likely = likely[distance(signatures[likely], signatures[likely + step]) <= self.bits]
            near.append(np.stack([members[likely], members[likely + step]], axis=1))
        links = np.concatenate([np.empty((0, 2), np.int64), *near])
        if len(links):
            self._connect(links)

    def _connect(self, links: np.ndarray) -> None:
        """Keeps the links that join separate parts, and no more than needed."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

        count = len(self.component)
        ends = self.component[links]
        apart = np.flatnonzero(ends[:, 0] != ends[:, 1])
        _, index = np.unique(np.sort(ends[apart], axis=1), axis=0, return_index=True)  # parallel ones would be summed
        links, ends = links[apart[index]], ends[apart[index]]
        numbered = coo_array((np.arange(1.0, len(links) + 1), (ends[:, 0], ends[:, 1])), shape=(count, count)).tocsr()
        tree = minimum_spanning_tree(numbered)
        self.links.append(links[np.sort(tree.data).astype(np.int64) - 1])
        self.component = connected_components(tree, directed=False)[1][self.component]
