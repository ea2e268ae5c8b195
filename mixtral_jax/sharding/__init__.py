"""Where every weight and activation lives on a device mesh."""
