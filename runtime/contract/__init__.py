"""What every part keeps to: configuration, specs, routes, scopes, and how they are checked.

It imports the wire, checkpoints and the ground of runtime/. Only `config` reads files."""
