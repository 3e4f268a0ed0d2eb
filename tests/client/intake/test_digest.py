"""What the digest of de-identification covers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from client.intake import digest
from client.intake.deid.profile import Profile


def test_it_covers_every_module_that_a_worker_loads() -> None:
    program = "import sys, client.intake.dicom; print(*(m for m in sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    here = Path(digest.__file__).parent
    named = {
        here / f"{name.removeprefix('client.intake.').replace('.', '/')}.py"
        for name in loaded
        if name.startswith("client.intake.") and name != "client.intake.deid"
    }

    assert len(named) > 20
    assert named <= digest.modules()
    assert here / "listen.py" not in digest.modules()


def test_another_profile_is_another_digest() -> None:
    plain = digest.deidentification_digest(Profile())

    assert plain == digest.deidentification_digest(Profile())
    assert plain != digest.deidentification_digest(Profile(faces="keep"))
