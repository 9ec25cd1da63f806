"""Pure functions that decide who does what: no torch, no files, no network."""
