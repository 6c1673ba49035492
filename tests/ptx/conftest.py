"""The PTX machine is a compiled module; its tests need it."""

from __future__ import annotations

import pytest

pytest.importorskip("resnet_fast._ptx", reason="built with RESNET_FAST_BUILD_HOST=1", exc_type=ImportError)
