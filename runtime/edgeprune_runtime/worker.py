"""One measured round of a benchmark in a fresh process: `python -m edgeprune_runtime.worker`, JSON in, JSON out.

Standard input holds one `Request`, the last line of standard output one object: the figures of a `Round`, or
{"error": ..., "out_of_memory": bool}. Only this file's few imports come before the memory limit is set, so the limit
covers all that a device would have to hold.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.limits import limit_this_process, own_rss_bytes, peak_rss_bytes, rss_bytes

_WARM_STEPS = 4
_SEED = 0


@dataclass(frozen=True)
class Request:
    """What to measure.

    `vocab_size` bounds the random prompt, `group` is a control group to join. Without `takes_packed` a variant's own
    graph is run although it has a packed copy.
    """

    bundle: str
    variant: str | None
    provider: str
    threads: int
    prompt_tokens: int
    generate_tokens: int
    vocab_size: int
    memory_bytes: int | None = None
    group: str | None = None
    takes_packed: bool = True


@dataclass(frozen=True)
class Round:
    """Figures of one process: one load, and after a warm-up one request.

    `step_ms` is the time of each token after the first; `cpu_ms` is the processor time of the measured request, all
    threads together. `before_rss_bytes` is resident before the load, `load_own_rss_bytes` what the process has of its
    own behind it. Memory is None where the system does not tell.
    """

    load_ms: float
    load_peak_rss_bytes: int | None
    ttft_ms: float
    step_ms: tuple[float, ...]
    cpu_ms: float
    peak_rss_bytes: int | None
    enforcement: str | None
    nodes_by_provider: Mapping[str, int] = field(default_factory=dict)
    before_rss_bytes: int | None = None
    load_own_rss_bytes: int | None = None
    is_packed: bool = False

    @classmethod
    def from_json(cls, values: dict[str, object]) -> "Round":
        """The round that a worker printed."""
        steps = values.pop("step_ms")
        assert isinstance(steps, list)
        return cls(step_ms=tuple(steps), **values)  # type: ignore[arg-type] # our own worker wrote it


def measure(request: Request) -> Round:
    """One round, under the request's memory limit.

    Raises:
        EdgepruneError: if the bundle cannot be run or does not fit the limit.
    """
    enforcement = None
    if request.memory_bytes is not None:
        enforcement = limit_this_process(request.memory_bytes, Path(request.group) if request.group else None)
    import numpy as np

    from edgeprune_runtime.bundle import open_bundle
    from edgeprune_runtime.session import Decoder, nodes_by_provider

    bundle = open_bundle(request.bundle, request.variant)
    before = rss_bytes()
    begin = time.perf_counter()
    graph = None if request.takes_packed else bundle.graph_path
    decoder = Decoder(bundle, provider=request.provider, threads=request.threads, graph=graph)
    load_ms = _ms_since(begin)
    load_peak, load_own = peak_rss_bytes(), own_rss_bytes()
    prompt = np.random.default_rng(_SEED).integers(0, request.vocab_size, request.prompt_tokens)

    def generate(tokens: int) -> list[float]:
        """Milliseconds to the first token, then of each further one."""
        begin = time.perf_counter()
        logits, cache = decoder.prefill([prompt], room_tokens=tokens - 1)
        token = int(logits[0].argmax())
        times = [_ms_since(begin)]
        for _ in range(tokens - 1):
            begin = time.perf_counter()
            logits, cache = decoder.step([token], cache)
            token = int(logits[0].argmax())
            times.append(_ms_since(begin))
        return times

    generate(min(_WARM_STEPS, request.generate_tokens))
    cpu_begin = time.process_time()
    ttft_ms, *step_ms = generate(request.generate_tokens)
    return Round(
        load_ms=load_ms,
        load_peak_rss_bytes=load_peak,
        before_rss_bytes=before,
        load_own_rss_bytes=load_own,
        ttft_ms=ttft_ms,
        step_ms=tuple(step_ms),
        cpu_ms=(time.process_time() - cpu_begin) * 1e3,
        peak_rss_bytes=peak_rss_bytes(),
        enforcement=enforcement,
        nodes_by_provider=nodes_by_provider(decoder.session),
        is_packed=decoder.packed is not None,
    )


def main() -> None:
    """Measure the request on standard input and write the outcome to standard output."""
    request = Request(**json.load(sys.stdin))
    try:
        outcome = asdict(measure(request))
    except MemoryError:
        outcome = {"error": "memory ran out", "out_of_memory": True}
    except EdgepruneError as error:
        outcome = {"error": str(error), "out_of_memory": type(error).__name__ == "OutOfMemoryError"}
    json.dump(outcome, sys.stdout)


def _ms_since(begin: float) -> float:
    return (time.perf_counter() - begin) * 1e3


if __name__ == "__main__":
    main()
