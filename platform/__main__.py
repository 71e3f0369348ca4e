"""Entry point of `linflab`; signals are watched before the slow modules are imported."""

import sys

from linflab.platform import signals
from linflab.platform.extras import missing_extra


def main() -> None:
    """Run the command line."""
    signals.watch()
    status = 1
    try:
        try:
            from linflab.platform.cli.main import main as run
        except ModuleNotFoundError as error:
            if (line := missing_extra(error)) is None:
                raise
            sys.stderr.write(f"linflab: {line}\n")
            raise SystemExit(2) from None
        run()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        raise
    except KeyboardInterrupt:  # raised by `guarded` and not caught
        signals.end_interrupted()
    finally:
        signals.command_ended(status)


if __name__ == "__main__":
    main()
