"""The example page in a real browser writes the tokens that our runtime writes; its screenshots stay in `tmp_path`.

Of weights in blocks it multiplies the inputs as they are, which our runtime rounds to 8 bits on most processors: there
the tokens are those of our runtime told to do the same.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import javascript
import pytest
from consumed import BLOCKWISE, BUNDLES, VARIANTS, WithFloatProducts, greedy, until_end

from edgeprune_runtime.bundle import MANIFEST_FILE, open_bundle
from edgeprune_runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.consumers

PAGE = javascript.EXAMPLES / "browser"
DRIVER = Path(__file__).with_name("browser.mjs")
PNG = b"\x89PNG\r\n\x1a\n"
PROMPTS = ("Why is the sky blue?", "Name three colours.", "What do bees make?", "Write a line about the sea.")
NEW_TOKENS = 16

Serve = Callable[[Path], str]


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest) -> Path:
    javascript.need_node(), javascript.need_browser()  # before a bundle is made
    return request.getfixturevalue(request.param)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve a bundle with the example's own server; gives the page's address."""
    servers: list[subprocess.Popen[str]] = []

    def start(bundle: Path) -> str:
        options = ("--node-modules", str(javascript.NODE_MODULES), "--port", "0")
        command = [sys.executable, str(PAGE / "serve.py"), str(bundle), *options]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        servers.append(server)
        assert server.stdout is not None
        return server.stdout.readline().strip()

    yield start
    for server in servers:
        server.terminate()
        server.wait()


def shown(folder: Path, url: str, *arguments: object) -> dict[str, Any]:
    """What the page shows for prompts; all that it loaded came from its own server, and nothing failed."""
    screenshot = folder / "screenshot.png"
    done = javascript.run(DRIVER, folder, javascript.need_browser(), url, screenshot, *arguments)
    [found] = javascript.results(done)
    assert found["state"] == "ready", found["status"]
    assert found["problems"] == []
    server = re.match(r"http://127\.0\.0\.1:\d+/", url)
    assert server is not None
    assert [address for address in found["requested"] if not address.startswith(server[0])] == []
    assert screenshot.read_bytes().startswith(PNG)
    return found


def assert_same(bundle: Path, variant: str, found: dict[str, Any], tokens: int = NEW_TOKENS) -> None:
    tokenizer = Tokenizer.load(open_bundle(bundle))
    for prompt, answer in zip(PROMPTS, found["answers"], strict=True):
        ids = tuple(tokenizer.encode_chat([{"role": "user", "content": prompt}]))
        ours = greedy(bundle, variant, ids, tokens)
        assert tuple(answer["prompt"]) == ids
        assert until_end(bundle, answer["ids"]) == ours
        assert answer["text"].strip() == tokenizer.decode(ours).strip()
        assert answer["speed"].startswith(f"{len(answer['ids'])} token")
        # text and speed each change while tokens come, not once at the end
        assert answer["changes"] > len(answer["ids"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_tokens_from_every_variant(
    bundle: Path, variant: str, with_float_products: WithFloatProducts, serve: Serve, tmp_path: Path
) -> None:
    found = shown(tmp_path, f"{serve(bundle)}?variant={variant}", *PROMPTS, "--tokens", NEW_TOKENS)
    assert_same(with_float_products(bundle) if variant in BLOCKWISE else bundle, variant, found)
    assert found["isIsolated"]  # so that WebAssembly may use threads
    assert found["status"].startswith(f"{variant} ready")


def test_page_as_it_opens_runs_the_default_variant(toy_bundle: Path, serve: Serve, tmp_path: Path) -> None:
    found = shown(tmp_path, serve(toy_bundle), *PROMPTS, "--tokens", NEW_TOKENS, "--width", 380, "--height", 700)
    assert_same(toy_bundle, open_bundle(toy_bundle).manifest.default_variant, found)


def test_any_static_server_will_do(toy_bundle: Path, tmp_path: Path) -> None:
    """Without the headers that allow shared memory: one thread, and the same tokens."""
    site = tmp_path / "site"
    site.mkdir()
    for file in PAGE.iterdir():
        (site / file.name).symlink_to(file)
    (site / "bundle").symlink_to(toy_bundle)
    (site / "node_modules").symlink_to(javascript.NODE_MODULES)
    handler = functools.partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        found = shown(tmp_path, url, *PROMPTS, "--tokens", NEW_TOKENS)
        server.shutdown()
    assert_same(toy_bundle, open_bundle(toy_bundle).manifest.default_variant, found)
    assert not found["isIsolated"]
    assert "1 thread" in found["status"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_webgpu_without_a_gpu(
    toy_bundle: Path, variant: str, with_float_products: WithFloatProducts, serve: Serve, tmp_path: Path
) -> None:
    """ONNX Runtime's WebGPU kernels on an adapter that computes on the CPU; says nothing of real GPUs."""
    url = f"{serve(toy_bundle)}?variant={variant}&device=webgpu"
    found = shown(tmp_path, url, *PROMPTS, "--tokens", NEW_TOKENS, "--software-gpu")
    assert found["device"] == "webgpu"
    assert_same(with_float_products(toy_bundle) if variant in BLOCKWISE else toy_bundle, variant, found)


@pytest.mark.parametrize("asks", ["address", "target"])
def test_webgpu_is_taken_where_it_is_asked_for(asks: str, toy_bundle: Path, serve: Serve, tmp_path: Path) -> None:
    bundle = toy_bundle if asks == "address" else for_webgpu(toy_bundle, tmp_path / "bundle")
    url = serve(bundle) + ("?device=webgpu" if asks == "address" else "")
    found = shown(tmp_path, url, PROMPTS[0], "--tokens", 1, "--software-gpu")
    assert (found["device"], found["notice"]) == ("webgpu", None)
    found = shown(tmp_path, f"{url.partition('?')[0]}?device=wasm", PROMPTS[0], "--tokens", 1, "--software-gpu")
    assert (found["device"], found["notice"]) == ("wasm", None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "This browser's WebGPU finds no graphics adapter"),
        (("--no-webgpu",), "This browser has no WebGPU here"),
    ],
)
@pytest.mark.parametrize("asks", ["address", "target"])
def test_browser_without_webgpu_says_so_and_uses_the_cpu(
    asks: str, options: tuple[str, ...], reason: str, toy_bundle: Path, serve: Serve, tmp_path: Path
) -> None:
    bundle = toy_bundle if asks == "address" else for_webgpu(toy_bundle, tmp_path / "bundle")
    url = serve(bundle) + ("?device=webgpu" if asks == "address" else "")
    found = shown(tmp_path, url, *PROMPTS, "--tokens", NEW_TOKENS, *options)
    assert found["device"] == "wasm"
    assert found["notice"] == f"{reason}: the model runs on the CPU instead."
    assert_same(toy_bundle, "fp32", found)


def test_an_answer_can_be_stopped(toy_bundle: Path, serve: Serve, tmp_path: Path) -> None:
    tokens = 900
    prompt = tuple(Tokenizer.load(open_bundle(toy_bundle)).encode_chat([{"role": "user", "content": PROMPTS[0]}]))
    assert len(greedy(toy_bundle, "fp32", prompt, tokens)) == tokens  # it would not stop by itself
    [answer] = shown(tmp_path, serve(toy_bundle), PROMPTS[0], "--tokens", tokens, "--stop")["answers"]
    assert 1 <= len(answer["ids"]) < tokens
    assert answer["ids"] == greedy(toy_bundle, "fp32", prompt, tokens)[: len(answer["ids"])]


def for_webgpu(bundle: Path, folder: Path) -> Path:
    """The same bundle (its files linked) whose manifest says that it was made for WebGPU."""
    shutil.copytree(bundle, folder, copy_function=os.link)
    manifest = json.loads((bundle / MANIFEST_FILE).read_text("utf-8"))
    (folder / MANIFEST_FILE).unlink()
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest | {"target": "webgpu"}), "utf-8")
    return folder


class QuietHandler(SimpleHTTPRequestHandler):
    """Python's own static file server, without its log."""

    def log_message(self, format: str, *args: object) -> None: ...
