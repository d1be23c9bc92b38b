"""`python -m wina_calib` is `wina-calib`."""

from wina_calib.cli import main

if __name__ == "__main__":
    main()
