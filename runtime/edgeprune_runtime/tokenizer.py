"""Text to token ids and back on the device: `tokenizers`, and the chat template in a sandbox."""

import json
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from edgeprune_runtime.bundle import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Bundle
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.untrusted import Json, blaming, read_json

Message = Mapping[str, str]
"""One turn of a chat: `role` ("system", "user", "assistant") and `content`."""

_MAX_TOKENIZER_BYTES = 256 << 20
_MAX_CONFIG_BYTES = 16 << 20
_MAX_PRODUCT = 1 << 20
"""Characters, items or bits that an operator of a chat template may make; whole chats are shorter."""
# What a decoder prints for bytes that are not yet a whole character.
_REPLACEMENT = "\ufffd"
# A UTF-8 character has at most four bytes; a run of more broken bytes is broken for good.
_MAX_PENDING_TOKENS = 4


@dataclass(frozen=True)
class Tokenizer:
    """A bundle's tokenizer; `chat_template` is None where the model has none."""

    fast: FastTokenizer
    special_tokens: Mapping[str, str]
    chat_template: str | None

    @classmethod
    def load(cls, bundle: Bundle) -> "Tokenizer":
        """The tokenizer of a bundle.

        Raises:
            EdgepruneError: if its files are missing, broken, or make ids outside the bundle's vocabulary.
        """
        fast = read_tokenizer(bundle.file(TOKENIZER_FILE))
        config = read_json(bundle.file(TOKENIZER_CONFIG_FILE), limit_bytes=_MAX_CONFIG_BYTES)
        template = _read_template(bundle, config)
        return cls(fast, _special_tokens(config), template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokens the tokenizer puts around one unless told not to.

        Raises:
            EdgepruneError: if the tokenizer fails on it.
        """
        with blaming("the bundle's tokenizer fails on this text", "give another text, or copy the bundle again"):
            return self.fast.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out.

        Raises:
            EdgepruneError: if the tokenizer fails on them.
        """
        with blaming("the bundle's tokenizer makes no text of its tokens", "copy the bundle again"):
            return self.fast.decode(list(ids), skip_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat that waits for the assistant's turn; the template writes its special tokens itself.

        Raises:
            EdgepruneError: if there is no chat template, or it refuses the messages.
        """
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The chat as text, up to where the assistant begins to speak.

        Raises:
            EdgepruneError: if there is no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise EdgepruneError("this bundle has no chat template; give the prompt as plain text with --raw")
        with blaming("the chat template refuses these messages", "try --raw"):
            template = _sandbox().from_string(self.chat_template)
            return template.render(
                **self.special_tokens, messages=[dict(message) for message in messages], add_generation_prompt=True
            )


def read_tokenizer(path: Path) -> FastTokenizer:
    """A `tokenizer.json`, without the padding and truncation that one made for batches may carry.

    Raises:
        EdgepruneError: if it is broken.
    """
    if path.stat().st_size > _MAX_TOKENIZER_BYTES:
        raise EdgepruneError(f"{path} is larger than {_MAX_TOKENIZER_BYTES >> 20} MiB; it is not a tokenizer")
    with blaming(f"{path} is not a tokenizer", "copy the folder again"):
        fast = FastTokenizer.from_file(str(path))
    fast.no_padding()
    fast.no_truncation()
    return fast


class TextStream:
    """Text of ids that arrive one by one; what it gives never ends inside a UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown_ids = 0
        self._prefix_ids = 0

    def push(self, token: int) -> str:
        """The text that this token completes, "" while a character is not whole."""
        self._ids.append(token)
        return self._advance(is_last=len(self._ids) - self._shown_ids > _MAX_PENDING_TOKENS)

    def finish(self) -> str:
        """What was held back, its broken bytes as replacement characters."""
        return self._advance(is_last=True)

    def _advance(self, *, is_last: bool) -> str:
        # Decoding starts at tokens already shown: a decoder may drop the space of the first word it sees.
        before = self._tokenizer.decode(self._ids[self._prefix_ids : self._shown_ids])
        now = self._tokenizer.decode(self._ids[self._prefix_ids :])
        if len(now) <= len(before) or (now.endswith(_REPLACEMENT) and not is_last):
            return ""
        self._prefix_ids, self._shown_ids = self._shown_ids, len(self._ids)
        return now[len(before) :]


def _read_template(bundle: Bundle, config: Mapping[str, Json]) -> str | None:
    if (bundle.folder / CHAT_TEMPLATE_FILE).exists():
        return _read_text(bundle.file(CHAT_TEMPLATE_FILE))
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates; "default" is the one for a plain chat
        named = (entry for entry in template if isinstance(entry, Mapping) and entry.get("name") == "default")
        template = next(named, {}).get("template")
    return template if isinstance(template, str) else None


def _read_text(path: Path) -> str:
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise EdgepruneError(f"{path} is larger than {_MAX_CONFIG_BYTES >> 20} MiB; it is not a chat template")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise EdgepruneError(f"{path} is not UTF-8 text; copy the bundle again") from error


def _special_tokens(config: Mapping[str, Json]) -> dict[str, str]:
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        content = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a short expression makes no huge value either: `"a" * 10**11`, `9 ** (9 ** 9)`."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The product or power; refused if it is too large."""
        many, times = (left, right) if isinstance(right, int) else (right, left)
        size = 0
        if isinstance(many, Sized):
            size = len(many) * times
        elif isinstance(many, int):
            size = many.bit_length() * (times if operator == "**" else 1)
        if size > _MAX_PRODUCT:
            raise SecurityError(f"{operator} would make more than {_MAX_PRODUCT:,} characters, items or bits")
        return super().call_binop(context, operator, left, right)


def _sandbox() -> ImmutableSandboxedEnvironment:
    """The environment that transformers renders chat templates in, so that the same template gives the same text."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterable[str]:
    """Pieces of text as the tokens arrive, each of whole characters."""
    stream = TextStream(tokenizer)
    for token in tokens:
        if piece := stream.push(token):
            yield piece
    if rest := stream.finish():
        yield rest
