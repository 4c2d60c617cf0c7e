"""The examples' own promises that need neither Node nor a browser: what the page's server gives out, and versions."""

import http.client
import importlib.util
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
CONSUMERS = Path(__file__).parent / "consumers"
Address = tuple[str, int]


def load_server() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_server", EXAMPLES / "browser" / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """The example's server over a stand-in for a bundle and for npm's packages, a secret beside them."""
    folder = tmp_path_factory.mktemp("served")
    files = {
        "secret": "secret",
        "bundle-other/secret": "secret",
        "bundle/edgeprune.json": "{}",
        "bundle/onnx/model.onnx": "graph",
        "modules/ort.mjs": "export {}",
        "modules/ort.wasm": "wasm",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    (folder / "bundle" / "link").symlink_to(folder / "secret")
    server = load_server().make_server(folder / "bundle", folder / "modules", 0)
    server.RequestHandlerClass.func.log_message = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address
    server.shutdown()
    server.server_close()


def get(address: Address, path: str, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    """An answer, the path sent as it is: browsers and urllib would tidy it up."""
    connection = http.client.HTTPConnection(*address, timeout=10)
    connection.putrequest(method, path, skip_accept_encoding=True)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


@pytest.mark.parametrize(
    ("path", "content_type", "body"),
    [
        ("/", "text/html", None),
        ("/page.js", "text/javascript", None),
        ("/worker.js?again", "text/javascript", None),
        ("/bundle/edgeprune.json", "application/json", b"{}"),
        ("/bundle/onnx/model.onnx", "application/octet-stream", b"graph"),
        ("/bundle/onnx/%6dodel.onnx", "application/octet-stream", b"graph"),
        ("/node_modules/ort.mjs", "text/javascript", b"export {}"),
        ("/node_modules/ort.wasm", "application/wasm", b"wasm"),
    ],
)
def test_server_gives_out_page_bundle_and_packages(
    served: Address, path: str, content_type: str, body: bytes | None
) -> None:
    answer, content = get(served, path)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == content_type
    assert content == body if body is not None else content
    # without these two a page has no memory that threads share
    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"


@pytest.mark.parametrize(
    "path",
    [
        "/bundle/../secret",
        "/bundle/%2e%2e/secret",
        "/bundle/..%2fsecret",
        "/bundle/onnx/../../secret",
        "/bundle/../bundle-other/secret",
        "/bundle/link",
        "/bundle//etc/hostname",
        "/bundle/%00",
        "/bundle/",
        "/bundle",
        "/node_modules/../bundle-other/secret",
        "/../secret",
        "//etc/hostname",
        "/serve.py",
        "/missing",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_server_gives_out_nothing_else(served: Address, path: str, method: str) -> None:
    answer, content = get(served, path, method)
    assert answer.status == 404
    assert b"secret" not in content


def test_server_hears_this_machine_alone(served: Address) -> None:
    assert served[0] == "127.0.0.1"


def test_pages_own_files_are_all_served() -> None:
    folder = EXAMPLES / "browser"
    on_disk = {path.name for path in folder.iterdir() if path.is_file()}
    assert set(load_server().PAGE_FILES) == on_disk - {"serve.py", "README.md"}


def test_example_and_its_tests_use_one_version_of_transformers_js() -> None:
    example, tests = (
        json.loads((folder / "package.json").read_text("utf-8"))["dependencies"] for folder in (EXAMPLES, CONSUMERS)
    )
    assert example.items() <= tests.items()
    for readme in EXAMPLES.glob("*/README.md"):
        assert f"@huggingface/transformers@{example['@huggingface/transformers']}" in readme.read_text("utf-8")


def test_lock_file_names_no_registry() -> None:
    """Versions and hashes are pinned; where packages come from is up to whoever installs them."""
    lock = json.loads((CONSUMERS / "package-lock.json").read_text("utf-8"))
    pinned = json.loads((CONSUMERS / "package.json").read_text("utf-8"))["dependencies"]
    packages = {name: package for name, package in lock["packages"].items() if name}
    assert all("integrity" in package and "resolved" not in package for package in packages.values())
    assert {name: packages[f"node_modules/{name}"]["version"] for name in pinned} == pinned
