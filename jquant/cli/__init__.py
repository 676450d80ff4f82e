"""The `jquant` command: parse, call, show. Nothing is computed here.

Exit codes: 0 done, 2 bad arguments or input (one line: what was wrong, what was expected, what to change), 1 a failure
inside, 130 interrupted. Progress goes to standard error; with --json standard output ends in one JSON object on a line.
"""

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from jquant.cli.arguments import make_parser  # imports below wait until the arguments are known to be good

    options = make_parser().parse_args(argv)
    try:
        options.run(options)
    except ValueError as error:
        return _complain(str(error), 2)
    except BrokenPipeError:  # the reader of our output has left
        return 1
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        return _complain(f"{error.filename}: {error.strerror}; check the path", 2)
    except OSError as error:
        return _complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except MemoryError as error:
        return _complain(f"out of memory ({error}); --dry-run tells what a run needs", 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    return 0


def _complain(message: str, code: int) -> int:
    print(f"jquant: {' '.join(message.split())}", file=sys.stderr)
    return code
