"""Files, reading ahead, timing, the command line: nothing of the field."""
