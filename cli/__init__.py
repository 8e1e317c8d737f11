"""The `stoker` command: composition roots and the operator's commands."""
