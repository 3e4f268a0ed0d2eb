"""``[intake]`` of ``node.toml``: the hospital's choices for taking in, and where its keys are.

Reading it imports no DICOM: a person at the command line does not wait for that.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from client.intake.deid.profile import Profile
from client.keyfile import KEY_BYTES, read_key
from common.errors import ConfigError
from common.spec import Section

PathText = Annotated[str, Field(pattern=r"^\P{Cc}*$")]  # a control character is no part of a name
_LONGEST_OUTPUT = 4096
_HEX_KEY = re.compile(rb"\s*([0-9a-fA-F]{%d})\s*" % (2 * KEY_BYTES))


class Encryption(Section):
    """Where the key of sealed cohorts comes from: a file, or a command that prints it.

    Attributes:
        key_file: 64 hexadecimal digits, readable by its owner alone.
        key_command: a program and its arguments, run without a shell in the folder of
            ``node.toml``; it prints 64 hexadecimal digits.
        command_seconds: how long it may take.
    """

    key_file: Annotated[PathText, Field(min_length=1)] | None = None
    key_command: Annotated[tuple[PathText, ...], Field(min_length=1)] | None = None
    command_seconds: Annotated[float, Field(gt=0, le=600)] = 30.0

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.key_file is None) == (self.key_command is None):
            seen = "neither" if self.key_file is None else "both"
            raise ValueError(f"{seen} of key_file and key_command; expected exactly one of them")
        if self.key_command is not None and not self.key_command[0]:
            raise ValueError("key_command: its first entry is empty; expected a program")
        return self

    @property
    def origin(self) -> str:
        """Where the key comes from, in a word: the file, or the program."""
        return self.key_file or (self.key_command or ("",))[0]


class Reidentification(Section):
    """A sealed table of who each pseudonym stands for, which the intake can only add to.

    Attributes:
        public_key: of the person who alone may read it, PEM (``cloister intake officer-key``).
        table: the file.
    """

    public_key: Annotated[PathText, Field(min_length=1)]
    table: Annotated[PathText, Field(min_length=1)] = "reidentification.sealed"


class IntakeSettings(Section):
    """How this hospital takes in; paths are relative to ``node.toml``.

    Attributes:
        site_key: file of the key of all pseudonyms.
        profile: the confidentiality profile and its options.
        encryption: None leaves cohorts unsealed.
        reidentification: None keeps no table.
    """

    site_key: Annotated[PathText, Field(min_length=1)] = "site.key"
    profile: Profile = Profile()
    encryption: Encryption | None = None
    reidentification: Reidentification | None = None


def cohort_key(folder: Path, settings: IntakeSettings) -> bytes | None:
    """The key that seals this site's cohorts; None if they are not sealed.

    Args:
        folder: that of ``node.toml``.
        settings: its ``[intake]``.

    Raises:
        ConfigError: if the key cannot be had. What a command printed is never part of it.
    """
    encryption = settings.encryption
    if encryption is None:
        return None
    if encryption.key_file is not None:
        return read_key(folder / encryption.key_file, "cohort key")
    return _KeyCommand(folder, encryption.key_command or (), encryption.command_seconds).key()


@dataclass(frozen=True)
class _KeyCommand:
    """A command that prints a key.

    What else it says could be the key as well: nothing of it is shown or kept.
    """

    folder: Path
    command: tuple[str, ...]
    seconds: float

    def key(self) -> bytes:
        printed = self._printed()
        found = _HEX_KEY.fullmatch(printed)
        if found is None:
            expected = f"expected {2 * KEY_BYTES} hexadecimal digits"
            raise self._refused(f"it printed {len(printed)} bytes that are no key; {expected}")
        return bytes.fromhex(found[1].decode())

    def _printed(self) -> bytes:
        try:
            with subprocess.Popen(  # noqa: S603 - the hospital's own file names it
                self.command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            ) as process:
                try:
                    return self._output_of(process)
                finally:
                    if process.returncode is None:  # and all that it has started
                        os.killpg(process.pid, signal.SIGKILL)
        except (TimeoutError, subprocess.TimeoutExpired):
            raise self._refused(f"it took longer than {self.seconds:g} s") from None
        except (OSError, ValueError) as error:
            raise self._refused(f"it cannot be run ({error})") from error

    def _output_of(self, process: subprocess.Popen[bytes]) -> bytes:
        """All that it prints until it ends, or a little more than could be a key."""
        end, printed = time.monotonic() + self.seconds, b""
        with selectors.DefaultSelector() as selector:
            descriptor = selector.register(process.stdout or 0, selectors.EVENT_READ).fd
            while len(printed) <= _LONGEST_OUTPUT:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError
                chunk = os.read(descriptor, _LONGEST_OUTPUT)
                if not chunk:
                    break
                printed += chunk
            else:
                return printed
        status = process.wait(max(0.0, end - time.monotonic()))
        if status:
            raise self._refused(f"it ended with status {status}")
        return printed

    def _refused(self, why: str) -> ConfigError:
        return ConfigError(
            f"intake.encryption.key_command {self.command[0]!r}: {why}; run it by hand to see "
            "what it says"
        )
