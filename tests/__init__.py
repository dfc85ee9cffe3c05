"""The tests. A package, so that another distribution's ``tests`` cannot take its name."""
