"""Where `wina-calib` and `python -m wina_calib` begin."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C is one line from the very start."""
    try:
        from wina_calib.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted; nothing was left behind.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
