"""A plain numpy Mixtral that shares no line with the package, itself tested."""
