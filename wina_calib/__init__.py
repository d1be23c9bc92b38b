"""wina_calib: calibrate once, load a sparse-ready checkpoint anywhere."""

__version__ = "0.1.0"
