"""What the simulated parts share: virtual time, shared bandwidth, timing profiles. Pure."""
