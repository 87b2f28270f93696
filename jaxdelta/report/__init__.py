"""What a run shows: tables for the terminal."""
