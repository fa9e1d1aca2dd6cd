"""The command `normistral`, and `python -m normistral`."""

import signal
import sys


def main() -> int:
    """Run the command line; Ctrl-C ends the process quietly also while its modules are imported."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # it may also be ignored, as in background jobs
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from normistral import cli

    signal.signal(signal.SIGINT, before)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
