"""What is raised where a user can do something about it, and nothing else of this package is needed."""


class UsageError(ValueError):
    """A flag's value is unknown, contradicts another, or asks for what cannot be."""
