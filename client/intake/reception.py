"""Who may bring DICOM to this node over the network, and how much: ``[listen]`` of node.toml.

Pure, and light to import: the service itself stands in `client.intake.listen`.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from common.spec import Count, Positive, Section

# PS3.5 6.2: at most 16 characters, no backslash, no control characters; outer spaces say nothing.
AeTitle = Annotated[str, Field(pattern=r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$")]
FilePath = Annotated[str, Field(pattern=r"^\P{Cc}+$")]
LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"  # noqa: S104


class Caller(Section):
    """An application entity that may send here.

    Attributes:
        ae_title: as it calls itself; upper and lower case differ.
        addresses: from where, such as ``["10.1.2.3", "10.1.4.0/24"]``; from anywhere if empty.
    """

    ae_title: AeTitle
    addresses: tuple[str, ...] = ()

    @field_validator("addresses")
    @classmethod
    def _addresses_are_networks(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        for address in addresses:
            _network(address)
        return addresses

    def calls_from(self, address: str) -> bool:
        """Whether it may call from there."""
        seen = ip_address(address)
        mapped = seen.ipv4_mapped if isinstance(seen, IPv6Address) else None
        return not self.addresses or any(
            (mapped or seen) in _network(allowed) for allowed in self.addresses
        )


class Listen(Section):
    """The table ``[listen]``: a C-STORE service class provider (PS3.4 annex B).

    Attributes:
        inbox: folder for what is received, relative to the file.
        ae_title: what this node is called; a caller that asks for another name is turned away.
        callers: who may send; everybody else is turned away.
        port: TCP port; below 1024 only with the rights for it.
        host: address to listen at; by default every one under TLS, and this machine alone
            without it.
        transport: ``tls``; or ``plain``, which anybody on the way can read and change.
        certificate, key: this node's own, as PEM, relative to the file; a chain in order.
        callers_certificates: PEM of the callers' authority, or of their own certificates.
        ask_callers_for: ``certificate`` (mutual TLS), or ``nothing``: then an AE title, which
            anybody can say, is all that a caller has to show.
        silence_seconds: a study to which nothing was added for so long is complete.
        keep_days: a complete study is removed after so many days; left out: never.
        greatest_object_mib: of one object.
        greatest_objects_a_study: of one study.
        least_free_gib: what has to stay free on the inbox's disk.
        greatest_associations: at the same time.
        idle_seconds: without a sign of life, or for one message unit to arrive.
        object_seconds: for one object to arrive.
    """

    inbox: FilePath = "inbox"
    ae_title: AeTitle = "CLOISTER"
    callers: Annotated[tuple[Caller, ...], Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65535)] = 11112
    host: FilePath | None = None
    transport: Literal["tls", "plain"] = "tls"
    certificate: FilePath | None = None
    key: FilePath | None = None
    callers_certificates: FilePath | None = None
    ask_callers_for: Literal["certificate", "nothing"] = "certificate"
    silence_seconds: Positive = 120.0
    keep_days: Count | None = None
    greatest_object_mib: Count = 2048
    greatest_objects_a_study: Count = 20_000
    least_free_gib: Annotated[float, Field(ge=0)] = 10.0
    greatest_associations: Annotated[int, Field(ge=1, le=64)] = 8
    idle_seconds: Positive = 30.0
    object_seconds: Positive = 1800.0

    @model_validator(mode="after")
    def _transport_is_whole(self) -> Self:
        if self.transport == "plain":
            return self
        for name in ("certificate", "key"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"{name} is missing; expected a PEM file of this node's own, or "
                    'transport = "plain" where nobody can listen on the way'
                )
        if self.ask_callers_for == "certificate" and self.callers_certificates is None:
            raise ValueError(
                "callers_certificates is missing; expected a PEM file of the callers' authority, "
                'or ask_callers_for = "nothing"'
            )
        return self

    @property
    def address(self) -> str:
        """Where to listen."""
        return self.host or (LOOPBACK if self.transport == "plain" else EVERYWHERE)

    def admits(self, ae_title: str, address: str) -> bool:
        """Whether a caller of that name may call from there."""
        return any(
            caller.ae_title == ae_title and caller.calls_from(address) for caller in self.callers
        )


def _network(text: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(text)
    except ValueError as error:
        raise ValueError(
            f"{text!r}: expected an address such as 10.1.2.3, or a network such as 10.1.4.0/24"
        ) from error
