"""lm-evaluation-harness's own command line, with the model "normistral" added.

    python -m normistral.evaluation.lm_eval --model normistral --model_args artifact=PATH,exact=true --tasks ...

The harness (0.4.13) has a fixed table of models and looks for no plug-ins, so it cannot find ours by itself.
"""

from __future__ import annotations

import sys

from normistral.errors import MissingExtraError, NormistralError, install_extra


def main() -> None:
    """Run `lm_eval` with this process's arguments.

    Exits as the command line does: an `error:` and a `hint:` line on stderr, and the error's exit code.
    """
    try:
        _run()
    except NormistralError as exc:
        sys.stderr.write(f"error: {exc.message}\n" + (f"hint: {exc.hint}\n" if exc.hint else ""))
        sys.exit(exc.exit_code)


def _run() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate

        from normistral.evaluation.lm_eval_model import register
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] != "lm_eval":
            raise
        raise MissingExtraError("lm-evaluation-harness is not installed", install_extra("lm-eval")) from exc
    register()
    cli_evaluate()


if __name__ == "__main__":
    main()
