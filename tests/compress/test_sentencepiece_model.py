"""Ids of a SentencePiece model read by us: those of its algorithm, written down literally."""

from pathlib import Path

import baichuan
import pytest
from baichuan import BYTE, NORMAL, SPACE
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import import_protobuf

from edgeprune.sentencepiece_model import read_sentencepiece
from edgeprune_runtime.errors import EdgepruneError

TEXTS = ["", " ", "  ", " a", "the then", "in  the   ththe", "T3h3! 中国中", "Ünï\t\n🙂", "a" * 9, "<s> the"]


def literal_ids(model: bytes, text: str) -> list[int]:
    """SentencePiece's BPE: of all neighbours that make a piece the best one joins, leftmost first; then bytes."""
    proto = import_protobuf().ModelProto.FromString(model)
    number = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    score = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    prefix = " " if proto.normalizer_spec.add_dummy_prefix and text else ""
    symbols = list((prefix + text).replace(" ", SPACE))
    while True:
        joins = [(-score[a + b], at) for at, (a, b) in enumerate(zip(symbols, symbols[1:])) if a + b in score]  # noqa: B905, RUF007 - of unequal length
        if not joins:
            break
        _, at = min(joins)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids: list[int] = []
    for symbol in symbols:
        ids += [number[symbol]] if symbol in score else [number[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return ids


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "dummy-prefix"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    file.write_bytes(baichuan.sentencepiece(dummy_prefix=request.param))
    return file


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_ids_are_those_of_the_algorithm(model: Path, text: str) -> None:
    tokenizer = read_sentencepiece(model)
    ids = tokenizer.encode(text).ids
    assert ids == literal_ids(model.read_bytes(), text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=f"thein anrT中国 \n🙂{SPACE}", max_size=30))
def test_ids_of_any_text(model: Path, text: str) -> None:
    assert read_sentencepiece(model).encode(text).ids == literal_ids(model.read_bytes(), text)


def test_control_symbols_are_special(model: Path) -> None:
    tokenizer = read_sentencepiece(model)
    ids = tokenizer.encode("<s>the</s>").ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "the"


def change(model: bytes, name: str) -> bytes:
    proto = import_protobuf().ModelProto.FromString(model)
    if name == "unigram":
        proto.trainer_spec.model_type = 1
    elif name == "suffix":
        proto.trainer_spec.treat_whitespace_as_suffix = True
    elif name == "unescaped":
        proto.normalizer_spec.escape_whitespaces = False
    elif name == "unused":
        proto.pieces[-1].type = 5
    elif name == "symbols":
        proto.normalizer_spec.add_dummy_prefix = True
        proto.pieces[-1].piece, proto.pieces[-1].type = SPACE * 4, 4
    elif name == "no unknown":
        proto.pieces[0].type = BYTE
    return bytes(proto.SerializeToString())


@pytest.mark.parametrize("name", ["unigram", "suffix", "unescaped", "unused", "symbols", "no unknown"])
def test_what_cannot_be_converted_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(change(baichuan.sentencepiece(), name))
    with pytest.raises(EdgepruneError, match=r"cannot be converted; save the tokenizer as tokenizer\.json"):
        read_sentencepiece(file)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"PK\x03\x04 no protobuf"])
def test_damaged_file(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(EdgepruneError, match="is no SentencePiece model"):
        read_sentencepiece(file)


def test_symbols_of_the_user_are_not_cut(tmp_path: Path) -> None:
    """A symbol is found before any merge, spaces and all."""
    proto = import_protobuf().ModelProto.FromString(baichuan.sentencepiece())
    proto.pieces[-1].piece, proto.pieces[-1].type = "the" + SPACE, 4
    file = tmp_path / "tokenizer.model"
    file.write_bytes(proto.SerializeToString())
    ids = read_sentencepiece(file).encode("in the th").ids
    assert 319 in ids
    assert ids[-1] == {piece.piece: index for index, piece in enumerate(proto.pieces)}["th"]
