"""Spell a conversation by a model's chat template, which is a Jinja program out of its folder.

Templates come with models, so they run in Jinja's sandbox: no attribute that begins with an
underscore, no change of what they are given, no files. What they may use is what templates for
transformers use: `raise_exception`, `strftime_now`, `tojson`, `break`, and `{% generation %}`,
which marks the model's own words and means nothing here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}: the body as it is."""

    tags = {"generation"}  # noqa: RUF012 (the extension's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _PlainNamespace(Namespace):
    """A namespace without attributes that begin with an underscore."""

    def __init__(self, **attributes: Any) -> None:
        for name in attributes:
            _refuse_private(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def render_chat(
    template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str]
) -> str:
    """The text of a conversation up to where the model answers.

    tokens: what the template may know of the tokenizer, such as bos_token. Raises
    jinja2.TemplateError where the template is wrong or refuses the conversation.
    """
    world = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    known: dict[str, Any] = world.globals  # pyright: ignore[reportAssignmentType]
    known.update(
        raise_exception=_refuse, strftime_now=_now, namespace=_PlainNamespace, dict=_make_dict
    )
    world.filters["tojson"] = _to_json
    said = [{str(key): str(text) for key, text in message.items()} for message in messages]
    return world.from_string(template).render(
        messages=said, add_generation_prompt=True, tools=None, documents=None, **tokens
    )


def _refuse(reason: str) -> None:
    raise jinja2.TemplateError(reason)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _make_dict(**entries: Any) -> dict[str, Any]:
    return entries


def _to_json(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **form)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}")
