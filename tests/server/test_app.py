"""The server app that a bundle names."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import ConfigError
from server.app import app


def test_under_flower_s_own_server_no_run_is_conducted_without_a_roster():
    nobody: Any = None
    with pytest.raises(ConfigError, match="cloister coordinator"):
        app(nobody, nobody)
