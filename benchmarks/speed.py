"""What pruning won in speed: a pruned bundle against the dense one, in one interleaved run.

    edgeprune compress smollm2-135m --ratio 0.2 -o pruned
    python benchmarks/speed.py --pruned pruned/bundle

Prefill and decode are different regimes and are reported apart. Prefill multiplies matrices by many tokens at once and
is bound by arithmetic; decoding one token at a time reads every weight once per token and is bound by memory bandwidth.
A cut of the weights helps both, but not equally, and the vocabulary projection, which is not cut, weighs on both.

Each round is a fresh process per bundle, the bundles take turns (dense, pruned, pruned, dense, ...), and ratios are
taken within a round, so a machine that slows down slows both sides; the interval is Student's t on the logarithms of
the rounds' ratios. To see how much of a ratio could be noise, give the dense bundle as --pruned too: its interval must
hold 1.
"""

from dataclasses import replace
from pathlib import Path

import common

from edgeprune.cli.stages import Stages
from edgeprune_runtime.bench import bench, report_bench
from edgeprune_runtime.report import Report


def main() -> Report:
    """Make the dense bundle if none is given, and compare."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--pruned", type=Path, required=True, help="bundle of the pruned model")
    parser.add_argument("--dense", type=Path, help="bundle of the dense model (default: made from --model)")
    parser.add_argument("--model", default=common.MODEL, help="the dense model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="fresh processes per bundle (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--generate-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="default: all that this process may use")
    args = parser.parse_args()
    stages = Stages(quiet=False)
    dense = args.dense
    if dense is None:
        with stages.stage("dense bundle"):
            dense = _dense_bundle(args.model)
    with stages.counted("dense and pruned in turns") as advance:
        result = bench(
            [dense, args.pruned],
            rounds=args.rounds,
            prompt_tokens=args.prompt_tokens,
            generate_tokens=args.generate_tokens,
            threads=args.threads,
            progress=advance,
        )
    return replace(report_bench(result), title="Dense (A) against pruned (B)")


def _dense_bundle(model_name: str) -> Path:
    from edgeprune_export.exporting import export

    source = common.save_dense(model_name, common.OUT / "dense-checkpoint")
    folder = common.OUT / "dense-bundle"
    export(common.OUT / "dense-checkpoint", folder, name=f"{source.name} (dense)", force=True)
    return folder


if __name__ == "__main__":
    common.run(main)
