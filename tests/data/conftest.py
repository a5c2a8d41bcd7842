"""What must be imported before warnings are errors, and logging left as it was."""

from tests.example.conftest import _logging_as_it_was  # noqa: F401
