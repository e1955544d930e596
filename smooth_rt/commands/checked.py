"""A command that refuses, before any of them is converted, values that no option can mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.core import TyperCommand

from smooth_rt.errors import InputError

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
            shown = param.opts[0] if param.param_type_name == "option" else getattr(param, "metavar", None) or name
            option = shown.strip("[].")
            given = typed.get(name)
            if param.nargs > 1 and isinstance(given, tuple) and any(str(one).startswith("--") for one in given):
                raise InputError(f"{option}: takes {param.nargs} values; got {' '.join(map(str, given))}")
            for value in _strings(given):
                if name in PROMPTS:
                    _check_text(option, value)
                elif not value.strip():
                    raise InputError(f"{option}: empty; give a value, or leave it out")
        return super().parse_args(ctx, args)


def _strings(given: Any) -> Iterator[str]:
    """The strings in what the parser found: one, several, or none at all."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, (list, tuple)):
        for one in given:
            yield from _strings(one)


def _check_text(option: str, value: str) -> None:
    # Bytes of the command line that are not UTF-8 reach Python as lone surrogates, which no tokenizer takes.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        where = f"character {error.start + 1}"
        raise InputError(f"{option}: {where} is not valid UTF-8; type the prompt as UTF-8") from error
