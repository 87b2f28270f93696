"""Two or more runs compared: tables and a page."""
