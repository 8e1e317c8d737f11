"""Models as files: their names, what their headers say, and tiny ones to try. No network.

It imports the wire and the ground of runtime/."""
