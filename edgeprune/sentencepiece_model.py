"""SentencePiece BPE models (`tokenizer.model`) as tokenizers of our own stack, without running a model's own code.

Pieces, scores, normalisation and the dummy prefix are read from the file itself, so that the ids are those of
SentencePiece. What cannot be said that way (unigram models, suffixed whitespace, unused pieces) is refused.
"""

from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it brings no types
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.tokenization_utils_base import generate_merges

from edgeprune_runtime.errors import EdgepruneError

BPE = 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Numbers of `ModelProto` for the algorithm, and for what a piece is."""

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""How pieces write a space."""


def read_sentencepiece(file: Path) -> Tokenizer:
    """The tokenizer of a SentencePiece BPE model; its ids are those of SentencePiece.

    Raises:
        EdgepruneError: if the file is damaged, or does what this cannot express.
    """
    proto = _parse(file)
    pieces, settings, normalizer = proto.pieces, proto.trainer_spec, proto.normalizer_spec
    kinds = {piece.type for piece in pieces}
    spaced = any(piece.type == USER_DEFINED and SPACE in piece.piece for piece in pieces)
    for is_met, what in (
        (settings.model_type != BPE, "is no BPE model"),
        (settings.treat_whitespace_as_suffix, "writes spaces behind words"),
        (not normalizer.escape_whitespaces, "does not escape spaces"),
        (UNUSED in kinds, "has unused pieces"),
        (UNKNOWN not in kinds, "has no piece for what it does not know"),
        (normalizer.add_dummy_prefix and spaced, "has symbols with spaces and adds one in front"),
    ):
        if is_met:
            raise EdgepruneError(
                f"{file} {what}, which cannot be converted; save the tokenizer as tokenizer.json beside it first"
            )
    vocab = {piece.piece: number for number, piece in enumerate(pieces)}
    # only normal pieces take part in merges
    apart = {piece.piece for piece in pieces if piece.type != NORMAL}
    scores = {piece.piece: piece.score for piece in pieces}
    (unknown,) = (piece.piece for piece in pieces if piece.type == UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=generate_merges(vocab, scores, apart),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=settings.byte_fallback,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(_normalizers(normalizer))
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(
        [AddedToken(piece.piece, normalized=False) for piece in pieces if piece.type in (UNKNOWN, CONTROL)]
    )
    # Matched after normalisation, in which a space is `SPACE`: a symbol with a plain one never occurs.
    symbols = [piece.piece for piece in pieces if piece.type == USER_DEFINED and " " not in piece.piece]
    tokenizer.add_tokens([AddedToken(symbol, normalized=not normalizer.add_dummy_prefix) for symbol in symbols])
    return tokenizer


def _normalizers(settings: Any) -> list[Any]:
    steps: list[Any] = []
    if settings.precompiled_charsmap:
        steps.append(normalizers.Precompiled(settings.precompiled_charsmap))
    if settings.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Replace(Regex("^ | $"), "")]
    if settings.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _parse(file: Path) -> Any:
    messages: Any = import_protobuf()  # its classes are made as it is imported
    proto = messages.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise EdgepruneError(f"{file} is no SentencePiece model ({error}); fetch it again") from error
    if not proto.pieces:
        raise EdgepruneError(f"{file} is no SentencePiece model: it holds no pieces; fetch it again")
    return proto
