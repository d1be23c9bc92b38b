"""What any program needs; nothing here knows what a mask is."""
