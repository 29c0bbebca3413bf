"""Addresses that only this machine reaches."""

from __future__ import annotations

import ipaddress


def is_loopback(address: str) -> bool:
    """Whether an address, or the name `localhost`, belongs to the loopback interface: no other machine reaches it."""
    if address.lower() == "localhost":
        return True
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None  # ::ffff:127.0.0.1
    return (mapped or parsed).is_loopback
