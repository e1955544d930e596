"""A command that refuses, before any of them is converted, values that no option can mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperCommand

from smooth_rt.errors import InputError
from smooth_rt.ranges import check_text, shown

__all__ = ["CheckedCommand"]

PROMPTS = ("prompt", "negative_prompt", "source_prompt")  # the empty prompt is one


class CheckedCommand(TyperCommand):
    """Looks at the values as typed: converted to a path, an empty one is the current folder and looks meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as every command does.

        Raises:
            InputError: a value is empty, a prompt is not valid UTF-8, or an option that takes several values has taken
                the next option for one of them.
        """
        typed, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        for param in self.params:
            name = str(param.name)
            # An argument is shown as on the help page: IMAGE... is IMAGE.
            named = param.opts[0] if param.param_type_name == "option" else getattr(param, "metavar", None) or name
            option = named.strip("[].")
            given = typed.get(name)
            if param.nargs > 1 and isinstance(given, tuple) and any(str(one).startswith("--") for one in given):
                raise InputError(f"{option}: takes {param.nargs} values; got {' '.join(map(str, given))}")
            for value in _strings(given):
                if name in PROMPTS:
                    check_text(option, value)
                elif not value.strip():
                    raise InputError(f"{option}: empty; give a value, or leave it out")
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            given = typed.get(str(getattr(error.param, "name", "")))
            # What a library says of a wrong value need not name it.
            if isinstance(given, str) and given not in error.message:
                error.message = f"{shown(given)}: {error.message}"
            raise


def _strings(given: Any) -> Iterator[str]:
    """The strings in what the parser found: one, several, or none at all."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, (list, tuple)):
        for one in given:
            yield from _strings(one)
