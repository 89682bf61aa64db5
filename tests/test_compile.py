"""Compiled code is tested in a process of its own, where no shape is checked: the checks cannot be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_compiled_step():
    tests = Path(__file__).with_name("compiled_step.py")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--no-header", "--show-capture=no", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | {"MIXTRAL_LAB_SHAPES": "off"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
