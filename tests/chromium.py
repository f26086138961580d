"""Debian's Chromium for tests, without a screen and without a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def chromium(*, loopback: bool = False) -> Iterator[Any]:
    """A browser that opens files. Where it is missing the test is skipped, except where CI is set.

    Args:
        loopback: it reaches servers of this machine too.
    """
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver) and not os.environ.get("CI"):
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program or "chromium"
    for flag in (
        "--headless=new",
        "--no-sandbox",  # CI runs as root
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--window-size=1400,1000",
        "--host-resolver-rules=MAP * ~NOTFOUND" + " , EXCLUDE 127.0.0.1" * loopback,
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver or "chromedriver"))
    # Two workers on a slow machine: axe took over 30 s. The driver hangs up at 120 s.
    started.set_script_timeout(110)
    try:
        if not loopback:
            started.execute_cdp_cmd("Network.enable", {})
            conditions = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
            started.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)
        yield started
    finally:
        started.quit()
