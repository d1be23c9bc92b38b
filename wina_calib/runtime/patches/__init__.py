"""What is changed in libraries while a calibrated model runs."""
