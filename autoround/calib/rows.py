# SPDX-License-Identifier: Apache-2.0
"""One row of any accepted shape to documents: plain text, templated text, or token ids.

Accepted: ``str``; ``{"text"}``; ``{"messages"}`` or ``{"conversations"}``; ``{"prompt",
"completion"}``; ``{"input_ids"[, "attention_mask"]}``; a dict with a single key; a list of token
ids or a 1-D/2-D tensor; a tuple (its first member counts); and batches of these, as a DataLoader
collates them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from torch import Tensor

from autoround.calib.spec import DatasetItem
from autoround.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTENT_KEYS = ("input_ids", "messages", "conversations", "prompt", "text")
ROW_KEYS = frozenset({*_CONTENT_KEYS, "completion", "attention_mask"})
LARGEST = 1 << 31  # of token ids: no model has so many
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # the ShareGPT names

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Text:
    """A text to tokenize; ``templated`` text already carries its special tokens."""

    text: str
    templated: bool = False


class Renderer:
    """Turns the rows of one dataset item into documents."""

    def __init__(self, item: DatasetItem, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._item = item
        self._tokenizer = tokenizer

    def documents(self, row: Any, where: str) -> Iterator[Text | list[int]]:
        """Every document in ``row``; ``where`` names the row in errors."""
        if isinstance(row, str):
            yield self._plain(row, where)
        elif isinstance(row, Tensor):
            yield from _tensor_ids(row, where)
        elif isinstance(row, Mapping):
            yield from self._mapping(row, where)
        elif isinstance(row, (list, tuple)):
            yield from self._sequence(row, where)
        elif hasattr(row, "__array__"):  # numpy rows, without importing numpy for them
            yield from self.documents(row.tolist(), where)
        else:
            raise _unusable(where, f"is of type {type(row).__name__}")

    def _plain(self, text: str, where: str) -> Text:
        if not self._item.chat:
            return Text(text)
        return self._chat([{"role": "user", "content": text}], where)

    def _sequence(self, row: Any, where: str) -> Iterator[Text | list[int]]:
        if not row:
            return
        first = row[0]
        if _is_id(first):
            yield _checked_ids(row, where)
        elif isinstance(first, Mapping) and _is_message(first):
            yield self._messages(row, where)
        elif _only_first_is_input(row):
            yield from self.documents(first, where)
        else:
            for member in row:
                yield from self.documents(member, where)

    def _mapping(self, row: Mapping[str, Any], where: str) -> Iterator[Text | list[int]]:
        if row.get("input_ids") is not None:
            yield from self._ids(row["input_ids"], row.get("attention_mask"), where)
        elif row.get("messages") is not None:
            yield from self._conversations(row["messages"], where)
        elif row.get("conversations") is not None:
            yield from self._conversations(row["conversations"], where)
        elif row.get("prompt") is not None and "completion" in row:
            yield from self._pair(row["prompt"], row["completion"], where)
        elif row.get("text") is not None:
            yield from self.documents(row["text"], where)
        elif len(row) == 1:
            yield from self.documents(next(iter(row.values())), where)
        else:
            raise _unusable(where, f"has the keys {', '.join(map(repr, row)) or 'none'}")

    def _ids(self, ids: Any, mask: Any, where: str) -> Iterator[list[int]]:
        """Token ids without their padding: positions with mask 0 are left out."""
        rows, masks = _id_rows(ids, where), _id_rows(mask, where) if mask is not None else None
        for index, row in enumerate(rows):
            if masks is None:
                yield row
                continue
            if len(masks) != len(rows) or len(masks[index]) != len(row):
                raise _unusable(where, "has an attention_mask of another shape than its input_ids")
            yield [token for token, keep in zip(row, masks[index], strict=True) if keep]

    def _conversations(self, value: Any, where: str) -> Iterator[Text]:
        """One conversation, or a collated list of them."""
        if not isinstance(value, (list, tuple)):
            raise _unusable(where, f"holds messages of type {type(value).__name__}")
        if value and isinstance(value[0], (list, tuple)):
            for conversation in value:
                yield self._messages(conversation, where)
        elif value:
            yield self._messages(value, where)

    def _pair(self, prompt: Any, completion: Any, where: str) -> Iterator[Text]:
        if isinstance(prompt, str) and isinstance(completion, str):
            if not self._item.chat:
                yield Text(prompt + completion)
                return
            prompt = [{"role": "user", "content": prompt}]
            completion = [{"role": "assistant", "content": completion}]
        if not (isinstance(prompt, list) and isinstance(completion, list)):
            raise _unusable(where, "has a prompt and a completion of different kinds")
        if prompt and isinstance(prompt[0], str):  # collated columns of strings
            for one, other in zip(prompt, completion, strict=True):
                yield from self._pair(one, other, where)
        else:
            yield self._messages([*prompt, *completion], where)

    def _messages(self, raw: Any, where: str) -> Text:
        messages = [_message(entry, where) for entry in raw]
        if self._item.chat is False:
            return Text("\n\n".join(_content_text(m["content"]) for m in messages))
        return self._chat(messages, where)

    def _chat(self, messages: list[Message], where: str) -> Text:
        tokenizer, prompt = self._tokenizer, self._item.system_prompt
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"{where} needs a chat template and the tokenizer has none: add "
                f"apply_chat_template=false to {self._item.name!r} to use the words alone"
            )
        if prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": prompt}, *messages]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates raise whatever their author or jinja2 chose
            raise InputError(f"{where}: the chat template refused it: {error}") from error
        return Text(str(text), templated=True)


# --- small readers ------------------------------------------------------------------------------


def _unusable(where: str, what: str) -> InputError:
    known = "'text', 'messages', 'prompt'+'completion' or 'input_ids'"
    return InputError(f"{where} {what}: a row must be a string, token ids, or a dict with {known}")


def _only_first_is_input(row: list[Any] | tuple[Any, ...]) -> bool:
    """Whether the other members are masks or labels, as ``(ids, mask)`` or ``[texts, labels]``.

    A DataLoader turns tuples into lists, so a list counts too when its members are whole batches
    or are not all tensors; a list of 1-D tensors is a list of rows.
    """
    first = row[0]
    if isinstance(first, Tensor):
        return isinstance(row, tuple) or first.ndim == 2
    mixed = any(isinstance(member, Tensor) for member in row[1:])
    return mixed or (isinstance(row, tuple) and not isinstance(first, str))


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # numpy's integers too


def _checked_ids(row: Any, where: str) -> list[int]:
    if not all(_is_id(value) and 0 <= value < LARGEST for value in row):
        raise _unusable(where, "holds something that is no token id")
    return [int(value) for value in row]


def _tensor_ids(row: Tensor, where: str) -> list[list[int]]:
    if row.ndim not in (1, 2) or row.is_floating_point() or row.is_complex():
        raise _unusable(where, f"is a tensor of {row.dtype} and {row.ndim} dimensions")
    rows = row.tolist() if row.ndim == 2 else [row.tolist()]
    return [_checked_ids([int(value) for value in ids], where) for ids in rows]


def _id_rows(value: Any, where: str) -> list[list[int]]:
    """int rows out of a list, a list of lists, or a tensor of 1 or 2 dimensions."""
    if isinstance(value, Tensor):
        return _tensor_ids(value, where)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise _unusable(where, f"holds input_ids of type {type(value).__name__}")
    if value and isinstance(value[0], bool):  # a mask
        return [list(map(int, value))]
    if value and not _is_id(value[0]):
        return [ids for member in value for ids in _id_rows(member, where)]
    return [_checked_ids(value, where)]


def _is_message(row: Mapping[str, Any]) -> bool:
    return ("role" in row and "content" in row) or ("from" in row and "value" in row)


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, Mapping) or not _is_message(entry):
        raise _unusable(where, "has a message without 'role' and 'content'")
    if "role" in entry:
        return {**entry, "content": entry["content"] if entry["content"] is not None else ""}
    role = str(entry["from"])
    return {"role": _ROLES.get(role, role), "content": entry["value"]}


def _content_text(content: Any) -> str:
    """Plain words of a message; of a list of parts only the text parts count."""
    if isinstance(content, list):
        return "".join(str(p.get("text", "")) for p in content if isinstance(p, Mapping))
    return str(content)
