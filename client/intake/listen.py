"""A C-STORE service class provider (PS3.4 annex B) that trusts nobody on the network.

pynetdicom speaks the protocol. What it leaves open to a hostile or broken peer is closed here: a
message unit's length is believed only up to a bound, a data set goes to the inbox as it arrives
and not to memory, a handshake or a half-sent message holds up nobody but its sender, and each has
its time. Only C-ECHO and C-STORE are served, to callers who are on the list.

Nothing that is logged comes from a data set. What a stranger calls himself is quoted and cut.
"""

from __future__ import annotations

import io
import logging
import queue
import socket
import socketserver
import ssl
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AE, _config, evt
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import C_ECHO_RQ, C_STORE_RQ, DIMSEMessage
from pynetdicom.dimse_primitives import C_ECHO, C_STORE
from pynetdicom.dsutils import create_file_meta, encode_file_meta
from pynetdicom.dul import DULServiceProvider
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.service_class import StorageServiceClass
from pynetdicom.sop_class import register_uid, uid_to_service_class
from pynetdicom.transport import AssociationSocket, RequestHandler, ThreadedAssociationServer

from client.intake.inbox import TAKEN, Arrival, Bounds, Inbox, Names, NotKeptError, Trouble
from client.intake.quiet import quiet
from client.intake.reception import Listen
from common.clock import Clock
from common.errors import ConfigError

if TYPE_CHECKING:
    from pynetdicom.association import Association
    from pynetdicom.events import Event
    from pynetdicom.pdu_primitives import P_DATA

LOG = logging.getLogger("cloister.listen")

_SYNTAX = "1.2.840.10008.1.2"
SYNTAXES = tuple(
    _SYNTAX + suffix
    for suffix in (
        ".1", "",  # explicit and implicit VR, little endian
        ".4.70", ".4.57", ".4.80", ".4.90", ".4.201", ".4.202", ".5", ".1.99", ".2",  # lossless
        ".4.203", ".4.91", ".4.81", ".4.50", ".4.51",
    )
)  # fmt: skip
"""What can be decoded here; of those that a caller offers, the first is chosen."""

VERIFICATION = "1.2.840.10008.1.1"
_SUCCESS, _CLASS_NOT_SUPPORTED = 0x0000, 0x0122
_STATUS = {  # PS3.4 table B.2-1
    Trouble.TOO_LARGE: 0xA700,
    Trouble.DISK_FULL: 0xA700,
    Trouble.STUDY_FULL: 0xA700,
    Trouble.FOREIGN: 0xA900,
    Trouble.UNREADABLE: 0xC000,
}
_PDU_BYTES = 2**17
_LONGEST_PDU = 2**18
"""What is announced, and what is read: a request for association has no announced bound."""
_COMMAND_BYTES = 2**14
_WAITING_MESSAGES = 2
_HEARD_OUT = 4
"""So many times the greatest object are heard, so that its sender gets its answer."""
_CONNECTIONS_AN_ASSOCIATION = 4
_IDLE = "Sta1"  # PS3.8 9.2.1: no association
_REJECTED_FOR_GOOD, _BY_USER = 1, 1  # PS3.8 table 9-21
_CALLING_UNKNOWN, _CALLED_UNKNOWN = 3, 7
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
_SHOWN = 16
_TALKATIVE = logging.getLogger("pynetdicom")


class _Broken(Exception):  # noqa: N818
    """What a peer sends is not what it may send; the association is aborted."""


@dataclass
class Listener:
    """The service: use `serving`, and watch `inbox` and `turned_away`.

    Args:
        settings: the table ``[listen]``.
        home: folder that its paths are relative to.
        inbox: an open one.
        host: address to listen at instead of the one of the settings.
        clock: for the times that peers have.

    Attributes:
        turned_away: callers, by why.
        port: where it listens.
    """

    settings: Listen
    home: Path
    inbox: Inbox
    host: str | None = None
    clock: Clock = field(default_factory=Clock)
    turned_away: Counter[str] = field(default_factory=Counter)
    stopping: bool = False

    @contextmanager
    def serving(self, grace: float = 10.0) -> Iterator[None]:
        """Listen as long as this lasts.

        At the end nobody new is let in. An association in which nothing is going on is aborted,
        one that is sending has `grace` seconds to end its object.

        Raises:
            ConfigError: if the address or a certificate cannot be used.
        """
        tls = Tls(self.settings, self.home)
        with quiet(), _quiet_protocol():
            self._server = self._bind(tls)
            thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
            thread.start()
            try:
                yield
            finally:
                self._stop(grace)
                thread.join()

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self._server.server_address[1])

    @property
    def associations(self) -> int:
        """How many peers are connected."""
        return len(self._server.active_associations)

    def turn_away(self, why: str, who: str) -> None:
        """Note a peer that was not let in."""
        self.turned_away[why] += 1
        LOG.warning("turned away: %s, %s", who, why)

    def _bind(self, tls: Tls) -> _Server:
        settings = self.settings
        ae = AE(settings.ae_title)
        ae.maximum_associations = settings.greatest_associations
        ae.maximum_pdu_size = _PDU_BYTES
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = settings.idle_seconds
        ae.require_called_aet = True
        ae.require_calling_aet = [caller.ae_title for caller in settings.callers]
        address = (self.host or settings.address, settings.port)
        try:
            return _Server(
                ae,
                address,
                settings.ae_title,
                contexts(),
                evt_handlers=[
                    (evt.EVT_REQUESTED, self._judge),
                    (evt.EVT_C_STORE, self._store),
                    (evt.EVT_FSM_TRANSITION, self._end),
                ],
                request_handler=_Handler,
                listener=self,
                tls=tls,
            )
        except OSError as error:
            raise ConfigError(
                f"[listen] {address[0]}:{address[1]}: cannot listen there ({error.strerror}); "
                "expected an address of this machine and a free port"
            ) from error

    def _stop(self, grace: float) -> None:
        self.stopping = True
        self._server.shutdown()
        until = self.clock.now() + grace
        while left := self._server.active_associations:
            for association in left:
                if not association.is_established:
                    _hang_up(association)
                elif not _messages(association).busy or self.clock.now() >= until:
                    association.abort()
            self.clock.sleep(0.05)

    def _end(self, event: Event) -> None:
        """Wake the thread that still waits for a request on a connection that has ended."""
        if event.next_state == _IDLE:
            cast(queue.Queue[Any], event.assoc.dul.to_user_queue).put(None)

    def _judge(self, event: Event) -> None:
        """Turn away who is not on the list (PS3.8 9.3.4); whoever cannot be judged is."""
        association = event.assoc
        try:
            self._judge_caller(association)
        except Exception as error:  # noqa: BLE001
            # An error here would be swallowed, and the caller let in.
            LOG.error("a caller cannot be judged (%s)", type(error).__name__)
            association.abort()

    def _judge_caller(self, association: Association) -> None:
        request = cast(A_ASSOCIATE, association.requestor.primitive)
        address = _address(association)
        calling, called = str(request.calling_ae_title), str(request.called_ae_title)
        if called.strip() != self.settings.ae_title:
            reason, why = _CALLED_UNKNOWN, "asks for another AE title than this node's"
        elif not self.settings.admits(calling.strip(), address):
            reason, why = _CALLING_UNKNOWN, "not on the list of callers"
        else:
            return
        self.turn_away(why, f"{calling[:_SHOWN]!r} at {address}")
        association.acse.send_reject(_REJECTED_FOR_GOOD, _BY_USER, reason)
        association.kill()

    def _store(self, event: Event) -> Dataset:
        """Answer a C-STORE request once its object is on the disk, or is not kept."""
        messages, request = _messages(event.assoc), cast(C_STORE, event.request)
        body = cast(_Body, request.DataSet)
        try:
            return self._answer(event, request, body)
        finally:
            body.drop()
            messages.serving = False

    def _answer(self, event: Event, request: C_STORE, body: _Body) -> Dataset:
        announced = Names(str(request.AffectedSOPClassUID), str(request.AffectedSOPInstanceUID))
        if announced.sop_class != event.context.abstract_syntax:
            return _status(_CLASS_NOT_SUPPORTED, "not the class that was agreed on")
        try:
            if body.arrival is None:
                raise NotKeptError(Trouble.UNREADABLE)
            self.inbox.keep(body.arrival, announced)
        except NotKeptError as error:
            LOG.warning("not taken from %s: %s", _address(event.assoc), error)
            return _status(_STATUS[error.trouble], str(error))
        return _status(_SUCCESS)


def bounds(settings: Listen) -> Bounds:
    """How much the inbox takes by the settings."""
    return Bounds(
        settings.greatest_object_mib * 2**20,
        int(settings.least_free_gib * 2**30),
        settings.greatest_objects_a_study,
    )


def contexts() -> list[PresentationContext]:
    """What is agreed on: verification, and storage of the classes in `TAKEN`."""
    for number, uid in enumerate(sorted(TAKEN)):
        if uid_to_service_class(uid) is not StorageServiceClass:  # retired ones, and newer ones
            register_uid(uid, f"CloisterStorage{number}", StorageServiceClass)
    storage = [build_context(uid, list(SYNTAXES)) for uid in sorted(TAKEN)]
    return [build_context(VERIFICATION), *storage]


def tls_context(settings: Listen, home: Path) -> ssl.SSLContext | None:
    """TLS as BCP 195 has it (PS3.15 B.9 to B.12): 1.3, or 1.2 with forward secrecy; no older one.

    A certificate in ``callers_certificates`` may be an authority's, or a caller's own.

    Raises:
        ConfigError: if a file cannot be used, or others may read the key.
    """
    if settings.transport == "plain":
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    certificate, key = home / str(settings.certificate), home / str(settings.key)
    _check_key(key)
    with _usable(certificate, "a certificate and its key as PEM, the key without a password"):
        context.load_cert_chain(certificate, key, password=lambda: "")
    if settings.ask_callers_for == "certificate":
        known = home / str(settings.callers_certificates)
        with _usable(known, "certificates as PEM"):
            context.load_verify_locations(known)
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


class Tls:
    """TLS as the files on the disk have it: a new certificate is taken with the next connection.

    Raises:
        ConfigError: if they cannot be used at the start. Later, what was in force stays so.
    """

    def __init__(self, settings: Listen, home: Path) -> None:
        self._settings, self._home = settings, home
        self._lock = threading.Lock()
        self._refused: tuple[object, ...] = ()
        self._seen = self._stamp()
        self._context = tls_context(settings, home)

    @property
    def context(self) -> ssl.SSLContext | None:
        """For one connection; None where TLS is not asked for."""
        with self._lock:
            stamp = self._stamp()
            if stamp not in (self._seen, self._refused):
                try:
                    self._context, self._seen = tls_context(self._settings, self._home), stamp
                    LOG.info("a new certificate is in force")
                except ConfigError as error:
                    self._refused = stamp
                    LOG.warning("the certificate on the disk is not taken: %s", error)
            return self._context

    def _stamp(self) -> tuple[object, ...]:
        said = self._settings
        return tuple(
            _stamp_of(self._home / str(path))
            for path in (said.certificate, said.key, said.callers_certificates)
            if path is not None
        )


def _stamp_of(path: Path) -> object:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode


def _check_key(path: Path) -> None:
    with _usable(path, "the key of the certificate as PEM"):
        mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"{path}: this key has mode {mode:04o}, others may reach it; expected 0600: run "
            f"`chmod 600 {path}` and think about who has read it"
        )


@contextmanager
def _usable(path: Path, expected: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        why = getattr(error, "strerror", None) or type(error).__name__
        raise ConfigError(f"[listen] {path}: {why}; expected {expected}") from None


@contextmanager
def _quiet_protocol() -> Iterator[None]:
    """Keep pynetdicom from logging: it logs what it receives, data sets among it."""
    level, handlers = _TALKATIVE.level, _config.LOG_HANDLER_LEVEL
    _TALKATIVE.setLevel(logging.CRITICAL + 1)
    _config.LOG_HANDLER_LEVEL = "none"
    try:
        yield
    finally:
        _TALKATIVE.setLevel(level)
        _config.LOG_HANDLER_LEVEL = handlers


class _Body(io.BytesIO):
    """Stands where pynetdicom collects a data set in memory, and hands it on to the inbox."""

    def __init__(self, begin: Callable[[], Arrival], most: int) -> None:
        super().__init__()
        self.arrival: Arrival | None = None
        self._begin = begin
        self._most = most

    def write(self, data: Any, /) -> int:
        """Take in more of it; what is too large is heard to its end, but not for ever."""
        if self.arrival is None:
            self.arrival = self._begin()
        self.arrival.write(data)
        if self.arrival.heard > self._most:
            raise _Broken
        return len(data)

    def drop(self) -> None:
        """Leave nothing of what is not kept."""
        if self.arrival is not None:
            self.arrival.drop()


class _Command(io.BytesIO):
    """A command set; all of those that are served fit in a fraction of the bound."""

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > _COMMAND_BYTES:
            raise _Broken
        return super().write(data)


class _Messages(DIMSEServiceProvider):
    """Puts messages together (PS3.7 6.3.1), of those that are served, within bounds."""

    def __init__(self, association: Association, listener: Listener) -> None:
        super().__init__(association)
        self.serving = False
        self._listener = listener
        self._begun = 0.0

    @property
    def busy(self) -> bool:
        """Whether a message is arriving, or one has no answer yet."""
        return self.message is not None or self.serving or not self.msg_queue.empty()

    def receive_primitive(self, primitive: P_DATA) -> None:
        """Add what arrived to the message; abort the association over what may not be sent."""
        try:
            self._receive(primitive)
        except Exception as error:  # noqa: BLE001
            # Parsers raise whatever the bytes of a broken message drive them to.
            LOG.warning(
                "a message of %s is broken or too slow (%s)",
                _address(self.assoc), type(error).__name__,
            )  # fmt: skip
            self.drop()
            self.dul.event_queue.put("Evt19")

    def drop(self) -> None:
        """Leave nothing of the message that is arriving, and of those that nobody answered."""
        if self.message is not None and isinstance(self.message.data_set, _Body):
            self.message.data_set.drop()
        self.message = None
        with suppress(queue.Empty):
            while True:
                _, request = self.msg_queue.get_nowait()
                if isinstance(body := getattr(request, "DataSet", None), _Body):
                    body.drop()

    def _receive(self, primitive: P_DATA) -> None:
        clock, settings = self._listener.clock, self._listener.settings
        if self.message is None:
            self.message = self._new()
            self._begun = clock.now()
        if clock.now() - self._begun > settings.object_seconds:
            raise _Broken
        message = self.message
        if not message.decode_msg(primitive, self.assoc):
            return
        if not isinstance(message, C_ECHO_RQ | C_STORE_RQ):
            raise _Broken
        request = cast(C_ECHO | C_STORE, message.message_to_primitive())
        if not request.is_valid_request:
            raise _Broken
        self.serving = isinstance(message, C_STORE_RQ)
        self.msg_queue.put((cast(int, message.context_id), request))
        self.message = None

    def _new(self) -> DIMSEMessage:
        if self.msg_queue.qsize() >= _WAITING_MESSAGES:  # one operation at a time was agreed on
            raise _Broken
        message = DIMSEMessage()
        message.encoded_command_set = _Command()
        most = _HEARD_OUT * self._listener.inbox.bounds.object_bytes
        message.data_set = _Body(lambda: self._arrival(message), most)
        return message

    def _arrival(self, message: DIMSEMessage) -> Arrival:
        """Begin a file with what the command says of the object (PS3.10 7.1)."""
        if not isinstance(message, C_STORE_RQ):
            raise _Broken
        command, context = message.command_set, self.assoc._accepted_cx[message.context_id or 0]
        meta = create_file_meta(
            sop_class_uid=UID(command.AffectedSOPClassUID),
            sop_instance_uid=UID(command.AffectedSOPInstanceUID),
            transfer_syntax=context.transfer_syntax[0],
        )
        arrival = self._listener.inbox.arrival()
        arrival.write(bytes(128) + b"DICM" + encode_file_meta(meta))
        return arrival


class _UpperLayer(DULServiceProvider):
    """The upper layer of one association: whatever ends it, nothing half received is left."""

    def run_reactor(self) -> None:
        try:
            super().run_reactor()
        except Exception as error:  # noqa: BLE001
            # A thread that dies of an error prints it, with what the peer has sent in it.
            LOG.warning(
                "an association with %s broke (%s)", _address(self.assoc), type(error).__name__
            )
        finally:
            _messages(self.assoc).drop()


class _Socket(AssociationSocket):
    """A socket that reads no more than a message unit may have, and does not wait for ever."""

    def __init__(self, association: Association, connection: Any, listener: Listener) -> None:
        super().__init__(association, client_socket=connection)
        self._listener = listener
        connection.settimeout(listener.settings.idle_seconds)

    def recv(self, nr_bytes: int) -> bytearray:
        """All the bytes, or fewer if the connection ends.

        Raises:
            OSError: if they are too many, or do not come in time.
        """
        if nr_bytes > _LONGEST_PDU:
            LOG.warning("a message unit of %s is too long", _address(self.assoc))
            raise OSError
        clock, connection = self._listener.clock, self.socket
        until = clock.now() + self._listener.settings.idle_seconds
        data, read = bytearray(nr_bytes), 0
        with memoryview(data) as view:
            while connection is not None and read < nr_bytes:
                if clock.now() > until:
                    raise TimeoutError
                count = connection.recv_into(view[read:])
                if not count:
                    break
                read += count
        return data[:read]


class _Handler(RequestHandler):
    """Takes a connection over, with the parts above in the places of pynetdicom's own."""

    server: _Server

    def _create_association(self) -> Association:
        association = super()._create_association()
        listener = self.server.listener
        association.dul = _UpperLayer(association)
        association.dimse = _Messages(association, listener)
        association.set_socket(_Socket(association, self.request, listener))
        seconds = listener.settings.idle_seconds
        association.acse_timeout = association.network_timeout = seconds
        return association


class _Server(ThreadedAssociationServer):
    """Accepts connections; each one's handshake is in its own thread, and has its time."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, *arguments: Any, listener: Listener, tls: Tls, **options: Any) -> None:
        self.listener = listener
        self._tls = tls
        self._handshakes = threading.Semaphore(
            _CONNECTIONS_AN_ASSOCIATION * listener.settings.greatest_associations
        )
        super().__init__(*arguments, **options)

    def get_request(self) -> Any:
        connection, address = cast(Any, self.socket).accept()
        connection.settimeout(self.listener.settings.idle_seconds)
        return connection, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether a caller may be there, and there is room for one more connection."""
        address, settings = str(client_address[0]), self.listener.settings
        most = _CONNECTIONS_AN_ASSOCIATION * settings.greatest_associations
        if not any(caller.calls_from(address) for caller in settings.callers):
            self.listener.turn_away("no caller's address", address)
        elif len(self.active_associations) < most and self._handshakes.acquire(blocking=False):
            return True
        else:
            self.listener.turn_away("too many connections", address)
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._handshakes.release()
            raise

    def finish_request(self, request: Any, client_address: Any) -> None:
        try:
            context = self._tls.context
            if context is not None:
                request = self._secured(request, context)
            super().finish_request(request, client_address)
        finally:
            self._handshakes.release()

    def _secured(self, connection: Any, tls: ssl.SSLContext) -> ssl.SSLSocket:
        """Shake hands, all in all within the time that a single answer may take."""
        secured = tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        late = threading.Timer(self.listener.settings.idle_seconds, _shut, [secured])
        late.daemon = True
        late.start()
        try:
            secured.do_handshake()
        except BaseException:
            secured.close()
            raise
        finally:
            late.cancel()
        return secured

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        why = getattr(error, "reason", None) or type(error).__name__
        self.listener.turn_away(f"no TLS ({why})", str(client_address[0]))

    def shutdown(self) -> None:
        socketserver.BaseServer.shutdown(self)
        self.server_close()


def _hang_up(association: Association) -> None:
    connection = association.dul.socket.socket if association.dul.socket else None
    if connection is not None:
        _shut(connection)


def _shut(connection: socket.socket) -> None:
    """Wake whoever waits on a connection; what TLS would like to say before is not said."""
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _messages(association: Association) -> _Messages:
    return cast(_Messages, association.dimse)


def _address(association: Association) -> str:
    information = association.requestor.address_info
    return information.address if information is not None else "nowhere"


def _status(status: int, comment: str = "") -> Dataset:
    answer = Dataset()
    answer.Status = status
    if comment:
        answer.ErrorComment = comment[:64]
    return answer
