"""What the documentation names is there, and what is generated in it is current."""
