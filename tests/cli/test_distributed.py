"""Several processes share the calibration and come to the plan of one."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commandline import Outcome, invoke
from safetensors.torch import load_file

from edgeprune.plan import PrunePlan
from edgeprune_runtime.errors import EdgepruneError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")
SMALL = (
    *("--align", 1, "--min-channels", 4, "--dtype", "float32", "--checkpoint-only", "--ratio", 0.2),
    *("--calibration-sequences", 13, "--calibration-tokens", 32, "--gradient-sequences", 9),
)


def free_port() -> int:
    with contextlib.closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def launcher() -> list[str]:
    """The command that starts a script or module in two processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return [*run, "--master-port", str(free_port())]


def _rank(rank: int, size: int, port: int, run: Callable[[int], Any], answers: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    answers.put((rank, run(rank)))


def on_ranks(size: int, run: Callable[[int], Any]) -> list[Any]:
    """What `run` returns in each of so many processes that torchrun would have started."""
    context = multiprocessing.get_context("fork")
    answers, port = context.Queue(), free_port()
    processes = [context.Process(target=_rank, args=(rank, size, port, run, answers)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        found = dict(answers.get(timeout=60) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize("method", ["wanda-sp", "fusion", "taylor-mixed", "fisher"])
def test_two_processes_make_the_plan_of_one(method: str, model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    def compress(output: Path) -> Outcome:
        return invoke("compress", model_folder, "-c", text_file, "-o", output, "--method", method, *SMALL)

    alone = compress(tmp_path / "alone")
    assert alone.code == 0, alone.err
    first, second = on_ranks(2, lambda rank: compress(tmp_path / "shared"))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "Plan" in first.out
    assert (second.out, second.err) == ("", "")
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "shared"}
    one, two = (PrunePlan.load(tmp_path / name) for name in ("alone", "shared"))
    assert one.keep == two.keep
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "shared"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        # not weight by weight: where a gradient is next to nothing, rounding decides which way Adam steps
        assert (found[name] - tensor).norm() < 1e-4 * tensor.norm(), name


def test_first_process_searches_for_all(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    searching = ("--allocation", "search:1", "--method", "wanda-sp", "--calibration-sequences", 16)

    def compress(output: Path) -> Outcome:
        return invoke("compress", model_folder, "-c", text_file, "-o", output, *SMALL, *searching)

    def searched(rank: int) -> Outcome:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr("edgeprune.pruning.judge", lambda *_, **__: pytest.fail("judged on the second process"))
            return compress(tmp_path / "shared")

    assert compress(tmp_path / "alone").code == 0
    first, second = on_ranks(2, searched)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert (second.out, second.err) == ("", "")
    one, two = (PrunePlan.load(tmp_path / name) for name in ("alone", "shared"))
    assert one.keep == two.keep


def test_error_of_a_search_ends_all_processes_with_one_line(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise EdgepruneError("no candidate can be judged")

    def compress(rank: int) -> Outcome:
        searching = ("--allocation", "search:1", "--method", "wanda-sp", "--calibration-sequences", 16, "-q")
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr("edgeprune.pruning.judge", broken)
            return invoke("compress", model_folder, "-c", text_file, "-o", tmp_path / "out", *SMALL, *searching)

    first, second = on_ranks(2, compress)
    assert (first.code, second.code) == (2, 2)
    assert first.err == "edgeprune: no candidate can be judged\n"
    assert (second.out, second.err) == ("", "")
    assert not list(tmp_path.iterdir())


def test_more_processes_than_sequences(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    few = (
        "--calibration-sequences",
        2,
        "--gradient-sequences",
        2,
        "--method",
        "taylor-fine",
        "--allocation",
        "protect",
        "--refit",
        "least-squares",
    )

    def compress(output: Path) -> Outcome:
        return invoke("compress", model_folder, "-c", text_file, "-o", output, *SMALL, *few)

    assert compress(tmp_path / "alone").code == 0
    assert [outcome.code for outcome in on_ranks(3, lambda _: compress(tmp_path / "shared"))] == [0, 0, 0]
    one, two = (PrunePlan.load(tmp_path / name) for name in ("alone", "shared"))
    assert one.keep == two.keep


def test_mistake_ends_all_processes_with_one_line(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Short.")

    def compress(_: int) -> Outcome:
        return invoke("compress", model_folder, "-c", tmp_path / "short.txt", "-o", tmp_path / "out", *SMALL, "-q")

    first, second = on_ranks(2, compress)
    assert (first.code, second.code) == (2, 2)
    assert first.err.count("\n") == 1
    assert "give more text, or fewer --calibration-tokens" in first.err
    assert (second.out, second.err) == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize("broken", [0, 1])
def test_error_on_one_process_does_not_hang_the_others(
    broken: int, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    models = {rank: tmp_path / f"model-{rank}" for rank in range(2)}
    for folder in models.values():
        shutil.copytree(model_folder, folder)
    tensors = (models[broken] / "model.safetensors").read_bytes()
    header = json.loads(tensors[8 : 8 + int.from_bytes(tensors[:8], "little")])
    start = 8 + int.from_bytes(tensors[:8], "little")
    begin = header["model.layers.2.mlp.up_proj.weight"]["data_offsets"][0] + start
    spoilt = tensors[:begin] + b"\xff\xff\xff\xff" + tensors[begin + 4 :]
    (models[broken] / "model.safetensors").write_bytes(spoilt)

    def compress(rank: int) -> Outcome:
        return invoke("compress", models[rank], "-c", text_file, "-o", tmp_path / "out", *SMALL, "-q")

    first, second = on_ranks(2, compress)
    assert (first.code, second.code) == (2, 2)
    assert first.err.count("\n") == 1
    assert "up_proj.weight holds 1 NaN" in first.err
    assert ("process 1: " in first.err) == (broken == 1)
    assert second.err == ""


def test_shared_run_that_was_killed_continues(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    def compress(output: Path) -> Outcome:
        return invoke("compress", model_folder, "-c", text_file, "-o", output, "--method", "taylor-fine", *SMALL)

    def interrupted(rank: int) -> Outcome:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:  # one that dies while the other waits for it
                patch.setattr("edgeprune.statistics.BlockWalk.tail", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            return compress(tmp_path / "out")

    on_ranks(2, interrupted)
    assert not (tmp_path / "out").exists()
    first, _ = on_ranks(2, lambda _: compress(tmp_path / "out"))
    assert first.code == 0, first.err
    assert "continues after the last block (statistics)" in first.err
    assert on_ranks(2, lambda _: compress(tmp_path / "undisturbed"))[0].code == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "undisturbed"))
    assert one == two
    assert {path.name for path in tmp_path.iterdir()} == {"out", "undisturbed"}


@pytest.mark.slow
def test_torchrun_from_the_command_line(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    command = ["-m", "edgeprune", "compress", model_folder, "-c", text_file, "-o", tmp_path / "out", *SMALL, "--json"]
    done = subprocess.run([*launcher(), *map(str, command)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["data"]["plan"]["ratio_asked"] == 0.2
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from edgeprune.distributed import joined\n"
        "with joined() as ranks:\n"
        "    import transformers.modeling_utils  # imports all of torch.distributed\n"
        "    assert ranks.gather(ranks.rank) == [0, 1]\n"
        "names = [file.read_text() for file in Path('/proc/self/task').glob('*/comm')]\n"
        "assert not [name for name in names if 'gloo' in name], names\n",
        encoding="utf-8",
    )
    done = subprocess.run([*launcher(), str(script)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
