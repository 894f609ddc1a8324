"""The one exception for a mistake the user can mend.

Everything a user can get wrong (a flag, a file, a row format, a combination that does not exist) is raised as
:class:`UserError` with a message that names the flag or file, the value and the way out. The command line prints
it as a single line and exits non-zero; a traceback therefore always means a defect of tessera itself.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake the user can mend; the message names the flag or file, the value and the fix.

    ``exit_code`` is what the process ends with: 2 for a wrong command line, 1 for anything found later.
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
