"""The command `normistral`, and `python -m normistral`."""

import signal
import sys


def main() -> int:
    """Run the command line; Ctrl-C ends the process quietly also while modules are imported, and while it ends."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # it may also be ignored, as in background jobs
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from normistral import cli

    signal.signal(signal.SIGINT, before)
    sys.unraisablehook = _tell_unraisable
    try:
        return cli.main()
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _tell_unraisable(what: "sys.UnraisableHookArgs") -> None:
    """As Python does, but for a Ctrl-C that came while an object was freed."""
    if not issubclass(what.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(what)


if __name__ == "__main__":
    sys.exit(main())
