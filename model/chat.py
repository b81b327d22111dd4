"""Conversations to token ids: rendering by the chat template, with a mask of what the assistant wrote.

Text can never forge structure: control tokens come from the template alone. Where a user, a file or a tool writes
"<|im_end|>" or "</think>", those are plain characters, tokenized as such. An assistant's own content may use the tags
that replies are made of (<think>, <answer>, <tool_call>), but no marker of a turn.

    from transformers import AutoTokenizer
    from model.chat import render

    tokenizer = AutoTokenizer.from_pretrained("model")
    input_ids, assistant_mask = render(tokenizer, [{"role": "user", "content": "你好"}], add_generation_prompt=True)

The template runs in a jinja2 sandbox of our own instead of apply_chat_template, because the ids must be known to come
from the template or from text, and transformers tokenizes the two joined. For ordinary text the ids are the same.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

# text that comes back from outside the model: not even an assistant message may write these as control tokens
TOOL_RESULT_TAGS = frozenset(("<tool_response>", "</tool_response>"))
PRIVATE_USE = range(0xE000, 0xF900)


class Rendered(NamedTuple):
    """A rendered conversation: the ids, and for each id 1 where it belongs to an assistant reply or its end marker."""

    input_ids: list[int]
    mask: list[int] | None

    @property
    def assistant_mask(self) -> list[int]:
        """0 or 1 per id; raises ValueError for a template that does not mark the assistant's replies."""
        if self.mask is None:
            raise ValueError(
                "this tokenizer's chat template has no {% generation %} markers, so the assistant's replies cannot be "
                "told from the rest: use the shipped model/chat_template.jinja "
                "(scripts/train_tokenizer.py --template, or tokenizer.chat_template = its text)"
            )
        return self.mask


def render(
    tokenizer,
    messages: Sequence[dict],
    tools: Sequence[dict] | str | None = None,
    add_generation_prompt: bool = False,
    **template_kwargs: Any,
) -> Rendered:
    """Render a conversation with the tokenizer's chat template and tokenize it.

    Args:
        messages: dicts with role and content (text, or OpenAI's list of text parts), and optionally reasoning_content
            and tool_calls. tool_calls and the system message's tools may be JSON strings, as in the data files.
        tools: function schemas; without them the first message's own `tools` are taken.
        add_generation_prompt: end with the header of an assistant reply.
        template_kwargs: variables for the template: enable_thinking, open_thinking.

    A reply starts at a token boundary (so does its end marker): the prompt of inference ends there as well, and a reply
    that begins with spaces must not see them merged into the newline of the header. This is the one place where ids
    may differ from tokenizing the rendered text at once.

    Raises:
        ValueError: a malformed message, or what the template itself refuses; says which and why.
    """
    parts = _tokenizer_parts(tokenizer)
    template, marked = _compile(tokenizer.get_chat_template(tools=tools))
    messages, tools = _normalise(messages, tools)
    split_mark, start_mark, end_mark = _unused_characters(messages, tools, template_kwargs)
    neutral = _Neutraliser(parts, split_mark)
    try:
        text = template.render(
            **tokenizer.special_tokens_map,
            **neutral.strings(template_kwargs),
            messages=[neutral.message(message) for message in messages],
            tools=neutral.strings(tools),
            documents=None,
            add_generation_prompt=add_generation_prompt,
            generation_start=start_mark,
            generation_end=end_mark,
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
    input_ids, mask = parts.encode_marked(text, split_mark, start_mark, end_mark)
    return Rendered(input_ids, mask if marked else None)


def encode_text(tokenizer, text: str) -> list[int]:
    """Tokenize plain text: no control token, whatever the text says, and none added around it."""
    return _encode(_tokenizer_parts(tokenizer).plain, text)


def encode_texts(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """encode_text for many texts at once, on all cores."""
    plain = _tokenizer_parts(tokenizer).plain
    try:
        return [encoding.ids for encoding in plain.encode_batch_fast(list(texts), add_special_tokens=False)]
    except (TypeError, UnicodeEncodeError):
        return [_encode(plain, text) for text in texts]  # one of them is not text: this names it


def _encode(plain: Tokenizer, text: str) -> list[int]:
    try:
        return plain.encode(text, add_special_tokens=False).ids
    except (TypeError, UnicodeEncodeError) as error:
        if not isinstance(text, str):
            raise ValueError(f"expected text, found {type(text).__name__}: {text!r:.80}") from error
        found = re.search("[\ud800-\udfff]", text)
        place = f"{found.group()!r} at character {found.start()}" if found else repr(error)
        raise ValueError(f"the text is not valid Unicode (half of a surrogate pair): {place}") from error


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer taken apart: control strings here, plain text there


class _TokenizerParts:
    """What a tokenizer knows of control tokens, and a copy of it that knows none."""

    def __init__(self, tokenizer):
        if not tokenizer.is_fast:
            raise ValueError("this needs a fast tokenizer (with a tokenizer.json); the one given has no such file")
        # some tokenizers add runs of spaces as tokens: those are text
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        self.ids = {token.content: i for i, token in added.items()}
        self.size = len(tokenizer)
        self.plain = self._without_control_tokens(tokenizer.backend_tokenizer)
        reply_tags = [token.content for token in added.values() if not token.special]
        # headers come again and again: "user\n" is looked up, not tokenized each time
        self.encode_short = lru_cache(maxsize=4096)(partial(_encode, self.plain))
        self.any_control = _alternatives(self.ids)
        self.not_in_replies = _alternatives(set(self.ids) - (set(reply_tags) - TOOL_RESULT_TAGS))

    def _without_control_tokens(self, backend: Tokenizer) -> Tokenizer:
        data = json.loads(backend.to_str())
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in self.ids]
        for token in data["added_tokens"]:  # an added token is renumbered on loading, unless the vocabulary has it
            data["model"]["vocab"][token["content"]] = token["id"]
        data["post_processor"] = data["truncation"] = data["padding"] = None
        return Tokenizer.from_str(json.dumps(data))

    def encode_marked(self, text: str, split_mark: str, start_mark: str, end_mark: str) -> tuple[list[int], list[int]]:
        """Tokenize rendered text: control strings to their ids, the generation marks to the mask, the rest as text."""
        input_ids: list[int] = []
        mask: list[int] = []
        in_reply = 0
        # with a capturing group, split() returns text and separator in turn
        for piece in re.split(f"({self.any_control.pattern}|{start_mark}|{end_mark})", text):
            if piece == start_mark:
                in_reply = 1
            elif piece == end_mark:
                in_reply = 0
            elif piece:
                ids = self.encode_piece(piece, split_mark)
                input_ids += ids
                mask += [in_reply] * len(ids)
        return input_ids, mask

    def encode_piece(self, piece: str, split_mark: str) -> list[int]:
        if piece in self.ids:
            return [self.ids[piece]]
        text = piece.replace(split_mark, "")
        return self.encode_short(text) if len(text) < 16 else _encode(self.plain, text)


_PARTS: WeakKeyDictionary[Any, _TokenizerParts] = WeakKeyDictionary()


def _tokenizer_parts(tokenizer) -> _TokenizerParts:
    parts = _PARTS.get(tokenizer)
    if parts is None or parts.size != len(tokenizer):  # tokens were added since
        parts = _PARTS[tokenizer] = _TokenizerParts(tokenizer)
    return parts


def _alternatives(strings) -> re.Pattern:
    """A pattern of exactly these strings, the longest first; one that matches nothing when there are none."""
    return re.compile("|".join(re.escape(s) for s in sorted(strings, key=len, reverse=True)) or r"(?!)")


class _Neutraliser:
    """Copies data with a mark put into every control string, so that it is none when the template comes to it."""

    def __init__(self, parts: _TokenizerParts, split_mark: str):
        self.parts = parts
        self.split_mark = split_mark

    def text(self, text: str, pattern: re.Pattern) -> str:
        return pattern.sub(lambda found: found.group()[0] + self.split_mark + found.group()[1:], text)

    def strings(self, value):
        """Neutralise all strings in nested dicts and lists, keys too."""
        if isinstance(value, str):
            return self.text(value, self.parts.any_control)
        if isinstance(value, dict):
            return {self.strings(key): self.strings(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.strings(item) for item in value]
        return value

    def message(self, message: dict) -> dict:
        neutral = self.strings(message)
        if message.get("role") == "assistant" and isinstance(message.get("content"), str):
            neutral["content"] = self.text(message["content"], self.parts.not_in_replies)
        return neutral


def _unused_characters(*values) -> list[str]:
    """Three private-use characters that occur in none of the strings."""
    text = "".join(string for value in values for string in _strings_in(value))
    unused = list(islice((chr(code) for code in PRIVATE_USE if chr(code) not in text), 3))
    if len(unused) < 3:
        raise ValueError("the conversation uses all private-use characters of Unicode; rendering needs three of them")
    return unused


def _strings_in(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings_in(key)
            yield from _strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings_in(item)


# ---------------------------------------------------------------------------------------------------------------------
# messages as people and files write them -> messages as templates expect them


def _normalise(messages: Sequence[dict], tools) -> tuple[list[dict], list[dict] | None]:
    """Parse JSON strings, join text parts, drop empty keys; take the tools from the first message if none are given."""
    if isinstance(messages, str | dict) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages must be a list of dicts such as {'role': 'user', 'content': 'text'}")
    if not tools and messages:
        tools = messages[0].get("tools") or messages[0].get("functions")
    tools = _parse_list(tools, "tools") if tools else None
    return [_normalise_message(number, message) for number, message in enumerate(messages, 1)], tools


def _normalise_message(number: int, message: dict) -> dict:
    where = f"message {number} ({message.get('role')})"
    result = {
        key: value
        for key, value in message.items()
        if key in ("role", "content") or (value is not None and key not in ("tools", "functions"))
    }
    if not isinstance(message.get("role"), str):
        raise ValueError(f"message {number} has no role: use system, user, assistant or tool")
    content = message.get("content")
    if isinstance(content, list):
        content = _join_parts(content, where)
    if message.get("tool_calls"):
        calls = _parse_list(message["tool_calls"], f"tool_calls of {where}")
        result["tool_calls"] = [_normalise_call(call, where) for call in calls]
        content = content or ""
    elif not isinstance(content, str):
        found = "no content" if content is None else f"content of type {type(content).__name__}"
        raise ValueError(f"{where} has {found}: give text (only an assistant message with tool_calls may go without)")
    result["content"] = content
    return result


def _join_parts(parts: list, where: str) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{where} has a content part of type {kind!r}: this model reads text parts only")
    return "".join(part["text"] for part in parts)


def _parse_list(value, name: str) -> list[dict]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is not valid JSON: {error}") from error
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list | tuple) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{name} must be a list of objects, or a JSON string of one")
    return list(value)


def _normalise_call(call: dict, where: str) -> dict:
    """OpenAI's {"function": {...}} or the bare {...} -> the bare form, its arguments as an object if they are one."""
    call = call.get("function") or call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError(f"a tool call of {where} has no function name: {call!r:.80}")
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
            arguments = parsed if isinstance(parsed, dict) else arguments
        except json.JSONDecodeError:
            pass  # a model may write anything: what is no JSON is shown to it as it was
    return {"name": call["name"], "arguments": arguments}


# ---------------------------------------------------------------------------------------------------------------------
# the template engine: what transformers offers to templates, and nothing of it imported


class _GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}: put the two mark variables around what is between."""

    tags = {"generation"}

    def parse(self, parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (
            nodes.Output([nodes.Name(name, "load")], lineno=line) for name in ("generation_start", "generation_end")
        )
        return [start, *body, end]


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # jinja's own tojson escapes < and > for HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=16)
def _compile(source: str) -> tuple[jinja2.Template, bool]:
    """Compile a chat template; the flag says whether it marks the assistant's replies."""
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
    return _environment().from_string(source), marked
