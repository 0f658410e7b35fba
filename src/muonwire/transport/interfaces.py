"""The network interfaces of this machine, and the one that leads to another."""

import ipaddress
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from muonwire.errors import ExchangeError

# The request for an interface's IPv4 address on Linux, and what it gives back: the address lies at these bytes.
_GET_ADDRESS, _AT = 0x8915, slice(20, 24)
_IPV6 = Path("/proc/net/if_inet6")
_SYSTEM = Path("/sys/class/net")
# What routers of the internet do not pass on: RFC 1918, 6598 (shared by the customers of a provider; tailscale has its addresses
# there), 3927, 4193 and 4291.
_PRIVATE = [
    ipaddress.ip_network(text)
    for text in (
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "169.254.0.0/16",
        "fc00::/7",
        "fe80::/10",
    )
]
# Linux's number for an interface without a link layer, which WireGuard's and those of other tunnels are; and the names that such
# interfaces have where the system does not say what they are.
_NO_LINK_LAYER = "65534"
_TUNNEL_NAMES = ("wg", "tun", "utun", "tailscale", "zt")


@dataclass(frozen=True, kw_only=True)
class Interface:
    """A network interface of this machine.

    Args:
        name: as the system calls it, such as eth0; empty where the system does not say.
        address: an address of it.
    """

    name: str
    address: str

    @property
    def is_loopback(self) -> bool:
        """Whether it leads to this machine only."""
        return ipaddress.ip_address(self.address).is_loopback

    @property
    def is_private(self) -> bool:
        """Whether the internet does not lead to its address, because it is private or belongs to a tunnel."""
        address = ipaddress.ip_address(self.address)
        return self.is_loopback or any(address in network for network in _PRIVATE) or self.is_tunnel

    @property
    def is_tunnel(self) -> bool:
        """Whether it is the end of a tunnel such as WireGuard's."""
        place = _SYSTEM / self.name
        if self.name and place.exists():
            return (place / "tun_flags").exists() or (place / "type").read_text().strip() == _NO_LINK_LAYER
        return self.name.startswith(_TUNNEL_NAMES)

    def __str__(self) -> str:
        """Name and address."""
        return f"{self.name} ({self.address})" if self.name else self.address


def interfaces() -> list[Interface]:
    """Every address of every interface."""
    return [
        Interface(name=name, address=str(address))
        for _, name in socket.if_nameindex()
        for address in _addresses(name)
    ]


def interface_to(host: str, port: int) -> Interface:
    """The interface through which this machine's packets to ``host`` leave.

    Args:
        host: name or address.
        port: any.

    Raises:
        ExchangeError: the name is unknown, or no route leads there.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # Connecting a datagram socket sends nothing; it asks for the route.
            probe.connect(place)
            address = ipaddress.ip_address(probe.getsockname()[0])
    except OSError as error:
        raise ExchangeError(
            f"replicas: there is no way from this machine to {host}: {error.strerror or error}; check the address of the master "
            "(--master-addr) and the network"
        ) from error
    # All of 127.0.0.0/8 is the loopback interface, which has one of those addresses.
    owners = [
        i.name for i in interfaces() if i.address == str(address) or (address.is_loopback and i.is_loopback)
    ]
    return Interface(name=owners[0] if owners else "", address=str(address))


def _addresses(name: str) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    # Without the module or an IPv4 address there is none to give.
    with suppress(ImportError, OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        import fcntl

        answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
        yield ipaddress.IPv4Address(answer[_AT])
    for line in _IPV6.read_text().splitlines() if _IPV6.exists() else []:
        digits, *_, owner = line.split()
        if owner == name:
            yield ipaddress.IPv6Address(bytes.fromhex(digits))
