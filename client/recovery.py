"""What stands of a node's ledger, and how a node goes on after one was lost.

`inspect` is the judgement of an audit: it reads what is whole, names the first entry that is not,
and compares with every witness at hand. `recover` is the way on after a ledger was lost, damaged,
put back in time or halted. Nobody can know then what was spent in the part that is gone, so the
whole lifetime budget counts as spent, unless a person signs for less (docs/privacy.md 11); and
never for less than what can still be read.

Where the chain is whole the ledger goes on: it jumps over the numbers that were lost, and what any
witness saw before is signed for. Where it is not, it is moved aside with its kept releases, and a
new one begins after the highest number that anybody knows of. Nothing is deleted.
"""

from __future__ import annotations

import math
import re
import secrets
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from client.book import Book, Entry, Kind, Limit
from client.chain import WAY_OUT
from client.folder import KEY_FILE, LEDGER, NodeFolder
from client.keyfile import NodeKey
from client.ledger import Ledger, Place, Signed
from client.witness import Witnesses, genuine, highest_number, highest_witnesses, last_witnesses
from common import accounting
from common.clock import Clock
from common.errors import ConfigError, LedgerError
from common.files import flush_folder, locked

_TOKEN = re.compile(r"([0-9]{1,12}):[0-9a-f]{64}:[0-9a-f]{64}")
_UNVERIFIED = 10**12  # no node books as much; a number that cannot be verified is believed below it


@dataclass(frozen=True)
class Standing:
    """What stands of a node's ledger.

    Attributes:
        ledger: open, unless there is none that can be read; to be looked at alone.
        book: of the entries before the first that is not whole.
        faults: everything that is wrong, in words; none if the ledger can be relied on.
        highest: the highest number of an entry that a file or a witness knows of.
        witnesses: how many of the witnesses at hand this node made, and could be compared.
        key_read: whether the node's key could be read.
        continues: whether this very ledger can go on after a recovery.
    """

    ledger: Ledger | None
    book: Book
    faults: tuple[str, ...]
    highest: int
    witnesses: int
    key_read: bool
    continues: bool

    @property
    def sound(self) -> bool:
        """Whether the node can work with it."""
        return not self.faults

    @property
    def after_the_break(self) -> list[Entry]:
        """Unverified: what lies in the file after the last entry that is whole, if legible."""
        found: list[Entry] = []
        if self.ledger is not None:
            with suppress(LedgerError, sqlite3.Error, UnicodeError):
                found += self.ledger.entries(self.book.last + 1)
        return found


@dataclass(frozen=True)
class Recovered:
    """What a recovery did.

    Attributes:
        epsilon: what counts as spent from here on.
        divergence: the same as the filter counts it.
        first: number of the first entry from here on.
        anew: whether a new ledger began; what was admitted and decided is not known to it.
        moved: what lies aside now.
    """

    epsilon: float
    divergence: float
    first: int
    anew: bool
    moved: tuple[Path, ...]


class _Debt(NamedTuple):
    """What is taken over: a divergence under a budget, after an entry's number, signed for."""

    limit: Limit
    total: float
    after: int
    signed: Signed

    @property
    def epsilon(self) -> float:
        return accounting.epsilon_of(self.total, self.limit.delta, self.limit.order)


def inspect(home: NodeFolder, tokens: Iterable[str] = ()) -> Standing:
    """Judge the ledger in `home` by itself, by its witness file, and by these `tokens`.

    Raises:
        ConfigError: for a token that this node never made.
    """
    given, kept = list(tokens), last_witnesses(home.witness)
    try:
        key = home.key
    except ConfigError as error:
        told = [int(found[1]) for token in given if (found := _TOKEN.match(token))]
        numbers = [highest_number(home.witness, below=_UNVERIFIED), *told]
        return Standing(None, Book(), (str(error),), max(numbers), 0, False, False)
    kept += map(Witnesses(key).token, highest_witnesses(home.witness, key))
    for token in given:
        if not genuine(key, [token]):
            raise ConfigError(f"{token}: not a witness that this node made with the key it has")
    known = genuine(key, [*kept, *given])
    highest = max((witness.number for witness in known), default=0)
    try:
        salvage = Ledger.salvaged(home.place)
    except LedgerError as error:
        fault = _shortened(str(error))
        return Standing(None, Book(), (fault,), highest, len(known), True, False)
    book, reached = salvage.book, max(highest, salvage.book.last + salvage.unread)
    broken = salvage.fault or ("" if book.last else f"{home.place.database}: holds no entry")
    if broken:
        broken = _shortened(broken)
        return Standing(salvage.ledger, book, (broken,), reached, len(known), True, False)
    faults = tuple(_contradictions(home, salvage.ledger, kept, given))
    unruly = "" if faults else _opening(home)
    if unruly:
        return Standing(salvage.ledger, book, (unruly,), reached, len(known), True, False)
    reached = max(reached, book.witnessed)
    return Standing(salvage.ledger, book, faults, reached, len(known), True, True)


def _contradictions(
    home: NodeFolder, ledger: Ledger, kept: list[str], given: list[str]
) -> Iterator[str]:
    """What is wrong with a ledger whose chain is whole, by everything that was ever seen of it."""
    ours = [token for token in (*kept, *given) if genuine(home.key, [token])]
    yield from dict.fromkeys(fault for token in ours if (fault := ledger.contradiction(token)))
    if not genuine(home.key, kept):
        yield f"{home.witness}: holds no witness of this ledger"
    if ledger.book.halted:
        yield f"halted: {ledger.book.halted}"


def _opening(home: NodeFolder) -> str:
    """What else keeps the node from opening its ledger; empty if nothing."""
    try:
        home.ledger().disconnect()
    except LedgerError as error:
        return _shortened(str(error))
    return ""


def recover(
    home: NodeFolder,
    signed: Signed,
    *,
    spent: float | None = None,
    tokens: Iterable[str] = (),
    new_key: bool = False,
) -> Recovered:
    """Let a node go on whose ledger cannot be relied on.

    Args:
        home: the node's folder.
        signed: who takes responsibility, and why.
        spent: the epsilon that the site has spent over its life, all of it, at the budget's delta
            and order (the filter's figure, not the lower one by PLD), as the signer says; None:
            the whole budget.
        tokens: witnesses from elsewhere, such as the coordinator's record.
        new_key: make a new key, where the old one is lost or has been read by others.

    Raises:
        ConfigError: if there is nothing to recover, if less is signed for than can be read or
            than a single release costs, or if the key is lost and no new one is asked for;
            nothing has changed then.
    """
    try:
        with locked(home.path):
            return _recover(home, signed, spent, list(tokens), new_key)
    except BlockingIOError:
        raise ConfigError(
            f"{home.path}: its node runs, or somebody else is recovering it; stop the node first"
        ) from None
    except OSError as error:
        raise ConfigError(f"{home.path}: cannot be recovered ({error})") from error


def _recover(
    home: NodeFolder, signed: Signed, spent: float | None, tokens: list[str], new_key: bool
) -> Recovered:
    if spent is not None and not (math.isfinite(spent) and spent >= 0):
        raise ConfigError(f"--spent {spent}: expected a finite number, 0 or more")
    standing = inspect(home, tokens)
    if standing.sound and not new_key:
        raise ConfigError(
            f"{home.path}: nothing to recover: the ledger is whole and agrees with its witness "
            "file; to change the budget there is `cloister node set-budget`"
        )
    if not standing.key_read and not new_key:
        raise ConfigError(
            f"{standing.faults[0]}; put the key back from your copy. Without it nobody can read "
            "the kept releases or check the ledger any more: if it is gone for good, say --new-key"
        )
    limit = _limit(home, standing)
    debt = _Debt(limit, _total(limit, standing, spent), standing.highest, signed)
    home.witness.open("ab").close()  # whether it can be written is better known now
    if standing.continues and standing.ledger and not new_key:
        return _go_on(standing.ledger, debt)
    if standing.ledger:
        standing.ledger.disconnect()
    return _begin_anew(home, debt, new_key)


def _limit(home: NodeFolder, standing: Standing) -> Limit:
    """The budget to go on with: the one that is booked, or where that is lost, the file's."""
    policy, booked = home.policy, standing.book.limit
    if policy.budget is None:
        raise ConfigError(f"{home.path}: without a budget there is nothing to recover")
    limit = policy.budget.limit
    if standing.continues and booked != limit:
        raise ConfigError(
            f"node.toml has the budget {limit}, but this ledger has {booked}: write the booked one "
            "into node.toml, recover, and then book the new one with `cloister node set-budget`"
        )
    used = standing.book.charges or standing.book.carried
    if booked and used and booked[1:] != limit[1:]:
        raise ConfigError(
            f"node.toml: [budget] has delta {limit.delta} and order {limit.order}, but what can "
            f"be read was spent at delta = {booked.delta} and order = {booked.order}: write these"
        )
    return limit


def _total(limit: Limit, standing: Standing, spent: float | None) -> float:
    """What is to count as spent, as a divergence.

    Attempts after an entry that was altered cannot be verified, but they lie there to be read, and
    nobody signs for less.

    Raises:
        ConfigError: if `spent` is less than what can be read.
    """
    whole = accounting.divergence_within(limit.epsilon, limit.delta, limit.order)
    verified = _readable(standing.book, limit)
    read = max(verified, min(whole, verified + _unverified(standing, limit)))
    if spent is None:
        return max(whole, read)
    total = max(0.0, accounting.divergence_within(spent, limit.delta, limit.order))
    if total < read * (1 - 1e-9):
        least = accounting.epsilon_of(read, limit.delta, limit.order)
        raise ConfigError(
            f"--spent {spent:g}: what can still be read of the ledger comes to epsilon "
            f"{least:.4f} at delta {limit.delta:g} and order {limit.order:g}; sign for that or more"
        )
    if spent > 0 and total == 0:
        begins = -accounting.divergence_within(0.0, limit.delta, limit.order)
        raise ConfigError(
            f"--spent {spent:g}: at delta {limit.delta:g} and order {limit.order:g} the first "
            f"release costs more than epsilon {begins:.4f}; sign for the filter's figure, as "
            "`cloister node budget` showed it, or for 0 if nothing was ever released"
        )
    return max(total, read)


def _readable(book: Book, limit: Limit) -> float:
    """What was spent or carried, as far as it can be read."""
    return book.carried + sum(accounting.divergence(m, limit.order) for m in book.spent())


def _unverified(standing: Standing, limit: Limit) -> float:
    """What attempts behind the first bad entry say that they spent, as far as that is legible."""
    total = 0.0
    for entry in standing.after_the_break:
        with suppress(ValueError, TypeError):
            mechanism = entry.mechanism if entry.kind == Kind.RESERVED else None
            total += accounting.divergence(mechanism, limit.order) if mechanism else 0.0
    return total


def _go_on(ledger: Ledger, debt: _Debt) -> Recovered:
    """Carry what is missing, in the same ledger, after all numbers that were ever used."""
    for run in ledger.book.open_runs():
        ledger.lapse(run)
    more = max(0.0, debt.total - _readable(ledger.book, debt.limit))
    beyond = max(debt.after, ledger.book.last + 1)  # a gap: older witnesses are signed for
    ledger.carry(more, debt.signed, after=beyond)
    return Recovered(debt.epsilon, debt.total, ledger.book.last, False, ())


def _begin_anew(home: NodeFolder, debt: _Debt, new_key: bool) -> Recovered:
    """Make a new ledger aside, whole, and only then put it in the place of the old one."""
    mark = Clock().date().strftime("%Y%m%dT%H%M%SZ-") + secrets.token_hex(2)
    made_key = home.path / f"{KEY_FILE}.new-{mark}"
    key = NodeKey.create(made_key) if new_key else home.key
    made, old = home.path / f"ledger.new-{mark}", Place(home.path / LEDGER, key, home.witness)
    first = debt.after + 1
    try:
        begin = Place(made, key)
        ledger = Ledger.create(begin, site=home.policy.site, by=debt.signed.by, first=first)
        ledger.set_budget(debt.limit, debt.signed)
        ledger.carry(debt.total, debt.signed)
        ledger.disconnect()
        places = [(made_key, home.path / KEY_FILE)] if new_key else []
        moved = _put([*places, (made, old.folder)], mark)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        if new_key:
            made_key.unlink(missing_ok=True)
        raise
    flush_folder(home.path)
    Ledger.salvaged(old).ledger.tell()
    return Recovered(debt.epsilon, debt.total, first, True, moved)


def _put(pairs: list[tuple[Path, Path]], mark: str) -> tuple[Path, ...]:
    """Put each first in the place of its second, and that aside; all of them, or none.

    Returns:
        What lies aside now.
    """
    done: list[tuple[Path, Path]] = []
    asides = [path.with_name(f"{path.name}.aside-{mark}") for _, path in pairs if path.exists()]
    try:
        for made, path in pairs:
            aside = path.with_name(f"{path.name}.aside-{mark}")
            for before, after in ((path, aside), (made, path)):
                if before.exists():
                    before.rename(after)
                    done.append((before, after))
    except BaseException:
        for before, after in reversed(done):
            after.rename(before)
        raise
    return tuple(asides)


def _shortened(fault: str) -> str:
    """Without the way out, which is said once."""
    return fault.removesuffix(f"; {WAY_OUT}")
