"""What `compress` opens before its first step: the journal, the dense model, the calibration text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.cli.options import Options, graded_sequences, held_out_sequences

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from edgeprune.calibration import Calibration
    from edgeprune.distributed import Ranks
    from edgeprune.journal import Entry, Journal
    from edgeprune.memory import Footprint
    from edgeprune.pruning import Settings
    from edgeprune.sources import Source
    from edgeprune.sparsify import Sparsity
    from edgeprune.streaming import Decoder
    from edgeprune_runtime.text import Text

DENSE_CHECKPOINT = "dense"  # in the journal's folder: a model that was not stored as safetensors, converted


def read_eval_text(options: Options) -> "Text | None":
    """The user's own text for the perplexity, if he brings one."""
    from edgeprune_runtime.text import read_text

    if options.eval_text is None:
        return None
    return read_text(options.eval_text, rows_joined=options.eval_rows_joined)


@contextmanager
def open_journal_of(
    options: Options, source: "Source", settings: "Settings", sparsity: "Sparsity | None", ranks: "Ranks"
) -> "Iterator[Journal]":
    """The journal of this command: beside the output, or in a temporary folder for a dry run, which leaves nothing."""
    import torch
    import transformers

    import edgeprune_runtime
    from edgeprune.calibration import hash_file
    from edgeprune.journal import open_journal, passing_journal
    from edgeprune.sources import identity
    from edgeprune_runtime.output import remove_parts

    if options.dry_run:
        with passing_journal() as journal:
            yield journal
        return
    fingerprint = {
        "model": identity(source),
        "setting": [asdict(settings), asdict(sparsity) if sparsity else None, options.dtype, options.max_memory],
        "calibration text": [
            options.calibration,
            hash_file(options.calibration),
            options.calibration_sequences,
            options.calibration_tokens,
            options.seed,
            held_out_sequences(options),
        ],
        "versions": [edgeprune_runtime.__version__, torch.__version__, transformers.__version__],
        "number of processes": ranks.size,
    }
    with open_journal(options.output, fingerprint, rank=ranks.rank) as journal:
        if ranks.is_first:
            remove_parts(options.output)
        yield journal


def open_dense(
    source: "Source", tokenizer: "PreTrainedTokenizerBase", journal: "Journal", *, exports: bool
) -> "tuple[Decoder, Path]":
    """The dense model, and its folder of safetensors; a model of another form is converted into one first.

    One that is stored as safetensors in a form of its own is converted only if it is to be exported: pruning reads it
    as it is.
    """
    from edgeprune.checkpoint import open_decoder
    from edgeprune.configs import unpacking
    from edgeprune.sources import load, stored_folder
    from edgeprune.streaming import Decoder

    stored = stored_folder(source)
    if stored is not None and not (exports and unpacking(stored)):
        return open_decoder(stored), stored
    if journal.folder is None:
        return Decoder.of(load(source)), source.path
    folder = journal.folder / DENSE_CHECKPOINT
    if not folder.is_dir():
        convert(source, tokenizer, folder)
    return open_decoder(folder), folder


def convert(source: "Source", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write a dense model as a checkpoint folder of a stock type, block by block where its blocks can be read so.

    Its licence goes along, its model card does not.
    """
    from edgeprune.checkpoint import open_decoder, save
    from edgeprune.groups import layer_widths
    from edgeprune.sources import load, load_licences, stored_folder
    from edgeprune.streaming import Decoder

    licences = load_licences(source)
    stored = stored_folder(source)
    decoder = Decoder.of(load(source)) if stored is None else open_decoder(stored)
    save(decoder, tokenizer, None, layer_widths(decoder.groups, {}), folder, beside=licences)


def find_dtype(name: str, journal: "Journal", ranks: "Ranks") -> "torch.dtype":
    """The dtype of this name; what "auto" has found once stays for all processes, and when the command continues."""
    import torch

    from edgeprune.journal import Entry
    from edgeprune.precision import fastest_dtype

    def probe() -> Entry:
        return Entry(facts=str(fastest_dtype()).removeprefix("torch."))

    if name == "auto":
        name = ranks.share(lambda: str(journal.remember("dtype", probe).facts))
    found: torch.dtype = getattr(torch, name)
    return found


def fit_memory(
    options: Options,
    settings: "Settings",
    sparsity: "Sparsity | None",
    decoder: "Decoder",
    dtype: "torch.dtype",
    limit_bytes: int | None,
) -> "Footprint":
    """How the run stays within --max-memory."""
    from edgeprune.memory import Sizes, Work, fit
    from edgeprune.statistics import Method

    work = Work(
        Method.parse(settings.method),
        refits=settings.refit != "none" and not options.dry_run,
        dtype=dtype,
        graded=graded_sequences(options, settings),
        judges=settings.reads_moments,
        compares=settings.compares_scores,
        searches=settings.holds_models,
        reconstructs="reconstruct" in (settings.mode, sparsity and sparsity.mode) and not options.dry_run,
        recovers=settings.recover_passes > 0 and not options.dry_run,
        zeros=sparsity.scope if sparsity and not options.dry_run else None,
        sums_products=sparsity is not None and "gram" in sparsity.needs,
    )
    return fit(Sizes.of(decoder, options.calibration_sequences, options.calibration_tokens), work, limit_bytes)


def calibrate(
    options: Options,
    decoder: "Decoder",
    tokenizer: "PreTrainedTokenizerBase",
    journal: "Journal",
    ranks: "Ranks",
    advance: Callable[[int, int], None],
) -> "tuple[Calibration, Calibration]":
    """The calibration text, and what of it is held out for the perplexity (all of it, if nothing is)."""
    from edgeprune import calibration as calibrating

    aside = held_out_sequences(options)

    def gather() -> "Entry":
        return calibrating.gather(
            options.calibration,
            tokenizer,
            decoder,
            sequences=options.calibration_sequences,
            held_out=aside,
            length_tokens=options.calibration_tokens,
            seed=options.seed,
            progress=advance,
        ).entry()

    gathered = ranks.share(lambda: calibrating.Calibration.from_entry(journal.remember("calibration", gather)))
    return calibrating.split(gathered, aside) if aside else (gathered, gathered)
