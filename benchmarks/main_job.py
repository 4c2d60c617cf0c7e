"""What the whole job costs: wall time, memory and where the time goes, from the command to the verdict.

    python benchmarks/main_job.py                       # the README's job, with the set-up already done
    python benchmarks/main_job.py -- --method wanda-sp  # everything behind -- goes to `edgeprune compress`

The job runs as a person starts it, `edgeprune compress MODEL --ratio R -o FOLDER --json` in a process of its own, so
the time holds Python's start and all imports. Two memory figures are given because they answer two questions. The
largest process is what one process ever held, by the kernel's own count (maximum resident set of all descendants),
which no sampling can miss. The sum over the process tree is what the job needs at once; it is sampled from /proc, and
pages that two processes share count twice, so it errs upwards. Stages are timed by the job itself; "not in a stage" is
what is left of the wall time: Python's start, imports, writing the report.

Memory needs Linux. Times on a machine under other load mean little: run it alone, and more than once.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.machine import this_machine
from edgeprune_runtime.report import Report, Table

PROC = Path("/proc")
GATE_MISSED = 1  # the job's exit code when it is complete and a gate of the user's was missed


def main() -> Report:
    """Run the job and measure it."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--model", default=common.MODEL, help="what to compress (default: %(default)s)")
    parser.add_argument("--ratio", default="0.2", help="share of all parameters to remove (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="a new folder (default: benchmarks/out/main-job, replaced)")
    parser.add_argument("--every-s", type=float, default=0.1, help="seconds between memory samples (default: 0.1)")
    parser.add_argument("options", nargs="*", help="options of `edgeprune compress`, behind --")
    args = parser.parse_args()
    if not PROC.is_dir():
        raise EdgepruneError("this system has no /proc to read memory from; run this benchmark on Linux")
    output = ["-o", str(args.output)] if args.output else ["-o", str(common.OUT / "main-job"), "--force"]
    job = ["compress", args.model, "--ratio", args.ratio, *args.options]
    outcome, wall_s, sum_bytes = run_job([sys.executable, "-m", "edgeprune", *job, *output, "--json"], args.every_s)
    # Linux counts in KiB.
    largest_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    seconds: dict[str, float] = outcome["data"]["seconds"]
    stages = {**seconds, "not in a stage": wall_s - sum(seconds.values())}
    figures = {
        "wall_s": wall_s,
        "largest_process_peak_rss_bytes": largest_bytes,
        "process_tree_peak_rss_bytes": sum_bytes,
        "perplexity_ratio": outcome["data"]["perplexity"]["ratio"],
        **{f"{ratio['name']} ratio": ratio["ratio"] for ratio in outcome["data"]["bench"]["ratios"]},
    }
    return Report(
        f"edgeprune {' '.join(job)}",
        this_machine(),
        (
            Table("What the job took and gave", ("figure", "value"), tuple(figures.items())),
            Table(
                "Where the time went",
                ("stage", "seconds", "share"),
                tuple((name, round(spent, 1), round(spent / wall_s, 3)) for name, spent in stages.items()),
            ),
        ),
        data={"figures": figures, "seconds": stages, "report": outcome},
    )


def run_job(command: list[str], every_s: float) -> tuple[dict[str, Any], float, int]:
    """Run a command that ends its output with JSON: that document, wall seconds, peak RSS of its process tree in bytes.

    Raises:
        EdgepruneError: if the command failed; it has said why on standard error.
    """
    peak_bytes = 0
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=output) as process:
            while process.poll() is None:
                peak_bytes = max(peak_bytes, sum(map(rss_bytes, tree(process.pid))))
                time.sleep(every_s)
        wall_s = time.perf_counter() - began
        if process.returncode not in (0, GATE_MISSED):
            raise EdgepruneError(f"the job ended with exit code {process.returncode}; see its message above")
        output.seek(0)
        lines = output.read().splitlines()
    if not lines:
        raise EdgepruneError("the job printed no report; see its message above")
    return json.loads(lines[-1]), wall_s, peak_bytes


def tree(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for folder in PROC.iterdir():
        if folder.name.isdigit() and (stat := _read(folder / "stat")):
            # "pid (name) state parent ...", and the name may hold spaces and brackets
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(folder.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def rss_bytes(pid: int) -> int:
    """Resident set of a process now; 0 if it is gone."""
    sizes = [line.split()[1] for line in _read(PROC / str(pid) / "status").splitlines() if line.startswith("VmRSS:")]
    return int(sizes[0]) << 10 if sizes else 0


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has ended since it was listed
        return ""


if __name__ == "__main__":
    common.run(main)
