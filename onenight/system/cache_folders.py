"""The folders in which libraries keep their caches, where the usual ones cannot be written to."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from configurator import UserError
from onenight.system.files import make_folder


def use_cache_folder(variable: str, usual: str):
    """Make sure that a library can write to its cache folder.

    The folder is that of the environment variable or, if it is not set, `usual`, in which "~" is
    the home directory. If it cannot be written to, the variable is set to a temporary folder, which
    is removed at the end of the process, and a line says so. Raises OSError if there is no room for
    temporary files either.
    """
    folder = Path(os.environ.get(variable) or usual)
    try:
        make_folder(folder.expanduser())
        return
    except UserError as error:
        problem = str(error)
    except RuntimeError:  # no HOME, and a user whom the system does not know
        problem = "there is no home directory"

    replacement = tempfile.mkdtemp(prefix="onenight-")
    atexit.register(shutil.rmtree, replacement, ignore_errors=True)
    os.environ[variable] = replacement
    print(f"{problem}: using {variable}={replacement}")
