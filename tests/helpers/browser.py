"""The browser that pages are tested in.

The page under test is the rendered one plus a script that plays the user; the page's content policy is kept and only
gets the hash of that script.
"""

import base64
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--window-size=1280,1000",
)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium in PATH (apt-get install chromium)")

# Saves what the page's script finds as a second download, so that one mechanism brings everything back.
HARNESS = """
(async () => {
  const $ = (id) => document.getElementById(id);
  const fire = (node, type) => node.dispatchEvent(new Event(type, {bubbles: true, cancelable: true}));
  const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  const slide = (value) => { $("slider").value = value; fire($("slider"), "input"); };
  const cell = (i) => $("map").querySelector(`[data-cell="${i}"]`);
  const tiles = () => Object.fromEntries([...$("tiles").children].map(
    (tile) => [tile.querySelector("dt").textContent, tile.querySelector("dd").firstChild.textContent]));
  const shown = () => [...$("map").querySelectorAll("button")].map((made) => made.textContent);
  const result = {violations: []};
  document.addEventListener("securitypolicyviolation", (event) => result.violations.push(event.violatedDirective));
  window.addEventListener("error", (event) => { result.error = event.message; });
  try { %s } catch (error) { result.error = String(error && error.stack); }
  await new Promise((done) => setTimeout(done, 50));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(result)]));
  link.download = "result.json";
  link.click();
})();
"""


def drive(folder, page, actions, files=("result.json",)):
    """Open `page` in the browser, run `actions`, wait for the named downloads; returns result.json's content."""
    script = HARNESS % actions
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.count("script-src '") == 1
    page = page.replace("script-src '", f"script-src 'sha256-{digest}' '")
    document = folder / "page.html"
    document.write_text(page.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    profile = folder / "profile"
    (profile / "Default").mkdir(parents=True)
    preferences = {
        "download": {"default_directory": str(folder), "prompt_for_download": False},
        "profile": {"default_content_setting_values": {"automatic_downloads": 1}},
    }
    (profile / "Default" / "Preferences").write_text(json.dumps(preferences))
    process = subprocess.Popen(
        [BROWSER, *FLAGS, f"--user-data-dir={profile}", document.as_uri()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not all((folder / name).exists() for name in files):
            assert time.monotonic() < deadline, f"only {[path.name for path in folder.iterdir()]} after 60 seconds"
            assert process.poll() is None, "the browser ended early"
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)
    found = json.loads((folder / "result.json").read_text())
    assert "error" not in found, found["error"]
    assert found["violations"] == []
    return found
