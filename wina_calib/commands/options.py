"""Options and parameter types that commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from wina_calib.choices import DTYPES
from wina_calib.corpus.sources import CHAT, EVALUATED_TOKENS, HELDOUT

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
device_option = click.option("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1 ...")
dtype_option = click.option(
    "--dtype",
    default="auto",
    type=click.Choice(DTYPES),
    help="Compute dtype; auto is the stored one on a GPU, float32 on a CPU.",
)


def _trust(context: click.Context, _: click.Parameter, value: bool) -> None:
    """Trust code for as long as the command runs."""
    if value:
        from wina_calib.model.folder import remote_code

        context.with_resource(remote_code(True))


trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    expose_value=False,
    callback=_trust,
    help="Run Python code that the model folder brings. Read it first.",
)
folder_option = click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what exists.")
revision_option = click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub repository.")


def heldout_option(name: str) -> Callable[..., Any]:
    """An option for the text that a command measures on: `--data`, or `--heldout` beside calibration text."""
    about = f"Text to measure on; by default {HELDOUT}, for a model with a chat template {HELDOUT}:{CHAT} too."
    return click.option(name, multiple=True, metavar="SPEC", help=about)


def tokens_option(default: int = EVALUATED_TOKENS) -> Callable[..., Any]:
    """An option for how much of that text."""
    return click.option("--tokens", default=default, show_default=True, metavar="N", help="Tokens to measure on.")


class Share(click.ParamType[float]):
    """A share: `0.03` or `3%`; more than a whole only with the `%`, as a bare 3 may mean either."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """`3%` -> 0.03."""
        text = str(value).strip()
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            self.fail(f"{value!r} is not a share such as 3% or 0.03", param, ctx)
        if text.endswith("%"):
            return number / 100
        if number > 1:
            self.fail(f"{text} is {number * 100:g} %: write {text}% or {number / 100:g}", param, ctx)
        return number


class Fractions(click.ParamType[tuple[float, ...]]):
    """Comma-separated shares."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """`0.5,65%` -> (0.5, 0.65)."""
        if isinstance(value, tuple):
            return value
        return tuple(Share().convert(part, param, ctx) for part in str(value).split(",") if part.strip())


class Counts(click.ParamType[tuple[int, ...]]):
    """Comma-separated whole numbers."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """`1,16` -> (1, 16)."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers such as 1,16,256", param, ctx)


def flags(options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a flag for every field of a class of options."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for f in reversed(fields(options)):
            function = _flag(f)(function)
        return function

    return add


def _flag(f: Any) -> Callable[..., Any]:
    meta = f.metadata
    names = [f"--{f.name.replace('_', '-')}", *([meta["flag"]] if "flag" in meta else [])]
    extra: dict[str, Any] = {"help": meta["help"], "default": f.default, "show_default": f.default not in (None, False)}
    if "choices" in meta:
        extra["type"] = click.Choice(meta["choices"])
    elif isinstance(f.default, bool):
        extra["is_flag"] = True
    elif meta.get("multiple"):
        extra |= {"multiple": True, "metavar": meta["metavar"], "show_default": ", ".join(f.default) or False}
    elif isinstance(f.default, tuple):
        extra |= {
            "type": Counts() if meta.get("counts") else Fractions(),
            "metavar": meta["metavar"],
            "default": ",".join(map(str, f.default)),
            "show_default": bool(f.default),
        }
    else:
        plain = type(f.default) if f.default is not None else str
        extra |= {"type": Share() if meta.get("share") else plain, "metavar": meta.get("metavar")}
    return click.option(*names, **extra)
