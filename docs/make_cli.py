"""Write docs/cli.md from the command line itself. `python docs/make_cli.py --check` fails where the page is out of date."""

import sys
from pathlib import Path

import click

from wina_calib.cli import COMMANDS, main

PAGE = Path(__file__).parent / "cli.md"


def page() -> str:
    """The whole page."""
    context = click.Context(main, info_name="wina-calib", terminal_width=100, **main.context_settings)
    parts = ["# Command line", "", "Made by `python docs/make_cli.py`.", "", _block(main.get_help(context))]
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        own = click.Context(command, info_name=name, parent=context, max_content_width=100, terminal_width=100)
        parts += [f"## `wina-calib {name}`", "", _block(command.get_help(own))]
    return "\n".join(parts)


def _block(text: str) -> str:
    return f"```text\n{text}\n```\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text("utf-8") == page() else f"{PAGE} is out of date: run `make docs`")
    PAGE.write_text(page(), "utf-8")
