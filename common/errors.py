"""Everything that can go wrong, split by whose fault it is.

    CloisterError
    ├── ConfigError          a file that a person wrote: run.toml, node.toml, a label table
    │   └── SpecError        the run's description
    ├── DataError            an input that cannot be used: DICOM, an image, a cohort
    │   ├── IntakeError      one source file, with the reason a person can act on
    │   │   └── ReviewError  a person has to look at it, and may let it through
    │   ├── SealError        sealed bytes: damaged, or of another key
    │   ├── CohortError      a cohort directory that is missing, damaged or of another shape
    │   └── PackageError     a trained model's folder: altered, unsigned, of another network
    ├── PeerError            the other side of the wire broke the protocol
    │   ├── MessageError     a message that is not on the closed list
    │   │   └── VersionError it is of another version of the protocol
    │   ├── LinkError        the coordinator cannot be reached, or breaks Flower's protocol
    │   │   ├── LinkRefusedError  it does not take this node, or no longer
    │   │   ├── LinkBusyError     it holds an earlier process of this node for alive
    │   │   └── LinkOverError     the run that this is about is over there
    │   ├── UpdateError      a site's update: shape, type, size, not finite
    │   └── IdentityError    it is not who it says, or may not take part (any more)
    ├── Refusal              this node will not do it; carries the code that may leave
    ├── LedgerError          the site's ledger is missing, damaged, altered or rolled back
    ├── ModelError           a network that cannot be trained under differential privacy
    └── RunError             a run that cannot go on: no quorum, a foreign checkpoint

A message names what was seen, what was expected, and the way out. The text of an error
stays where it was raised: only a `RefusalCode` or an incident number leaves a node.
"""

from __future__ import annotations

from enum import StrEnum


class CloisterError(Exception):
    """The root: catch it at the edge of a program, never in between."""


class ConfigError(CloisterError):
    """A file that a person wrote is wrong."""


class SpecError(ConfigError):
    """A run's description is wrong: names file, key, value and what was expected."""


class DataError(CloisterError):
    """An input cannot be used."""


class IntakeError(DataError):
    """One source file cannot become an image of a cohort; the text is the reason."""


class ReviewError(IntakeError):
    """A person has to look at this file, and may let it through."""


class SealError(DataError):
    """Sealed bytes cannot be opened: damaged, or of another key."""


class CohortError(DataError):
    """A cohort directory is missing, damaged, or does not fit the run."""


class PackageError(DataError):
    """A trained model's folder is damaged, altered, or vouched for by nobody."""


class PeerError(CloisterError):
    """The other side of the wire broke the protocol."""


class MessageError(PeerError):
    """A message holds something that is not on the closed list, or lacks what is."""


class VersionError(MessageError):
    """The other side speaks another version of the protocol."""


class LinkError(PeerError):
    """The coordinator cannot be reached, or does not keep to the protocol."""


class LinkRefusedError(LinkError):
    """The coordinator does not take this node, or no longer."""


class LinkOverError(LinkError):
    """The run that this is about is over at the coordinator, or nobody waits for this."""


class LinkBusyError(LinkError):
    """The coordinator does not know this node, or holds an earlier process of it for alive."""


class UpdateError(PeerError):
    """A site's update cannot be aggregated."""


class IdentityError(PeerError):
    """A certificate, key, request or bundle that is not to be believed."""


class LedgerError(CloisterError):
    """The site's ledger cannot be relied on: this node stops until a person has looked."""


class ModelError(CloisterError):
    """A network cannot be trained soundly under differential privacy."""


class RunError(CloisterError):
    """A run cannot start or go on."""


class RefusalCode(StrEnum):
    """Why a node said no: the whole vocabulary that may leave it.

    Every code depends on policy, spec, ledger and task alone, never on the cohort.

    - ``malformed``, ``version``: not a message of the closed list, or of another protocol.
    - ``spec``: the run makes no sense at this site's declared size.
    - ``policy``: beyond the hospital's limits; asking again does not help.
    - ``budget``: more than is left for life.
    - ``approval``: it waits for a person at the site, or was never invited; ask again later.
    - ``denied``: a person at the site said no.
    - ``later``: within the limits, but not now (hours, rounds a day, pace of the budget).
    - ``weights``: not finite, absurd, or not the network's.
    - ``replay``: the round was asked with other content, its release is gone, the run is over.
    - ``ledger``: this node's ledger needs a person.
    - ``incident``: a failure; its text stays at the node under a random number.
    """

    MALFORMED = "malformed"
    VERSION = "version"
    SPEC = "spec"
    POLICY = "policy"
    BUDGET = "budget"
    APPROVAL = "approval"
    DENIED = "denied"
    LATER = "later"
    WEIGHTS = "weights"
    REPLAY = "replay"
    LEDGER = "ledger"
    INCIDENT = "incident"


class Refusal(CloisterError):
    """This node will not do what it was asked.

    Args:
        code: what may leave the node.
        detail: for the node's own log; it never leaves.
    """

    def __init__(self, code: RefusalCode, detail: str) -> None:
        super().__init__(f"{code.value}: {detail}")
        self.code = code
        self.detail = detail
