"""How a command reaches a region: what an argument names, and how the command becomes a peer."""
