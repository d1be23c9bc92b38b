"""The commands of `wina-calib`, one module each; every module has one click command called `command`."""
