"""The cells: one file each, with the name of the op and `CELL`, its Implementation."""
