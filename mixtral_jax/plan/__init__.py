"""The bill before you rent: memory, traffic and time of a model on a mesh, without weights."""
