"""The front door: who is served now, who waits, and the bytes in between."""
